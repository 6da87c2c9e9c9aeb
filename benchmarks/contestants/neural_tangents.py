"""Neural-tangents' kernels of plain sequential networks, written in JAX's words; needs JAX."""

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.interpreters import ad
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

Step = Callable[[Any, Any], Any]


def kernel(model: nn.Module, images: Tensor, method: int) -> Callable[[], Tensor]:
    """Compiled; methods have the numbers of ``NtkImplementation``."""
    # one thread, as torch has: read when JAX first computes
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    # the library uses what JAX has moved, and its experimental part alone imports TensorFlow
    ad.source_info_util, ad.config = source_info_util, jax.config
    sys.modules.setdefault("neural_tangents.experimental", ModuleType("experimental"))
    from neural_tangents import empirical_ntk_fn

    scores, params = translated(model)
    ntk = empirical_ntk_fn(scores, trace_axes=(), vmap_axes=0, implementation=method)
    compiled, points = jax.jit(ntk), arrays(images)
    return lambda: from_dlpack(compiled(points, None, params).block_until_ready())


def translated(model: nn.Module) -> tuple[Step, dict[str, Any]]:
    """``scores(params, images)`` of a whole batch, and its parameters by name."""
    if not isinstance(model, nn.Sequential):
        raise NotImplementedError(f"{type(model).__name__} is not written in JAX here")
    steps = [_step(name, layer) for name, layer in model.named_children()]
    params = {name: arrays(param) for name, param in model.named_parameters()}

    def scores(params: Any, images: Any) -> Any:
        for step in steps:
            images = step(params, images)
        return images

    return scores, params


def arrays(tensor: Tensor) -> Any:
    """A copy for JAX."""
    return jnp.asarray(tensor.detach().cpu().numpy())


def _step(name: str, layer: nn.Module) -> Step:
    match layer:
        case nn.Flatten():
            return lambda params, x: x.reshape(len(x), -1)
        case nn.ReLU():
            return lambda params, x: lax.max(x, jnp.zeros_like(x))
        case nn.Linear():
            return _product(name)
        case nn.Conv2d():
            return _convolution(name, layer)
        case nn.MaxPool2d():
            least, window = -jnp.inf, (1, 1, layer.kernel_size, layer.kernel_size)
            return lambda _, x: lax.reduce_window(x, least, lax.max, window, window, "VALID")
    raise NotImplementedError(f"{type(layer).__name__} is not written in JAX here")


def _product(name: str) -> Step:
    """Without a transposed weight: that would hide its structure."""
    last, weight, bias = (((1,), (1,)), ((), ())), f"{name}.weight", f"{name}.bias"
    return lambda params, x: lax.dot_general(x, params[weight], last) + params[bias]


def _convolution(name: str, layer: nn.Conv2d) -> Step:
    margins = [(int(margin), int(margin)) for margin in layer.padding]
    layout = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}

    def convolution(params: Any, x: Any) -> Any:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        y = lax.conv_general_dilated(x, weight, layer.stride, margins, **layout)
        return y + bias.reshape(-1, 1, 1)

    return convolution
