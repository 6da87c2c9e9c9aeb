"""Modules with hooks: those that look are let be, and those that change a gradient do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.truth.batches import DOORS, Call, half


class Ruled(nn.Module):
    """Layers of which all uses of parameters are known by rules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Unruled(Ruled):
    """A network with a parameter in an operation that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.logaddexp(super().forward(x), self.shift)


def layers(net: Any) -> list[Any]:
    return [net.first, net.middle, net.last]


def extended(net: Any) -> None:
    """As BackPACK extends layers: inputs are kept, gradients of each sample made of them."""

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        module.input0, module.output = inputs[0], output

    def of_each(module: Any, _: Any, grads: Any) -> None:
        module.grad_batch = torch.einsum("bo,bi->boi", grads[0], module.input0)

    for layer in (net.first, net.last):
        layer.register_forward_hook(keep)
        layer.register_full_backward_hook(of_each)


def counting(net: Any) -> None:
    def count(module: Any, *_: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1

    for layer in layers(net):
        layer.register_full_backward_hook(count)
        layer.register_full_backward_pre_hook(count)
        layer.register_forward_hook(count)


def keeping_gradients(net: Any) -> None:
    def keep(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()

    for layer in layers(net):
        layer.register_forward_hook(keep)


def looking_at_tensors(net: Any) -> None:
    def look(module: Any, _: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: setattr(module, "seen", grad))

    net.middle.register_forward_hook(look)


def scaling(net: Any) -> None:
    net.middle.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],))
    net.last.register_full_backward_pre_hook(lambda _, grads: (3 * grads[0],))


def scaling_tensors(net: Any) -> None:
    def scale(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad / 2)

    net.middle.register_forward_hook(scale)


def reading_numbers(net: Any) -> None:
    def double(_: Any, grads: Any, __: Any) -> Any:
        return (2 * grads[0] if float(grads[0].detach().abs().sum()) > 0 else grads[0],)

    net.middle.register_full_backward_hook(double)


def scaling_layers(net: Any) -> None:
    """A pullback to what a layer returns passes the hook by, where it goes on to other layers."""

    def scale(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad / 2)

    net.first.register_forward_hook(scale)
    net.last.register_forward_hook(scale)


def scaling_at_nodes(net: Any) -> None:
    def scale(_: Any, __: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda grads: (3 * grads[0],))

    net.first.register_forward_hook(scale)
    net.last.register_forward_hook(scale)


def scaling_as_before(net: Any) -> None:
    """Module hooks of an older kind, which change what a node returns."""

    def twice(_: Any, grads: Any, __: Any) -> Any:
        return tuple(None if grad is None else 2 * grad for grad in grads)

    for layer in layers(net):
        layer.register_backward_hook(twice)


def branching_by_the_graph(net: Any) -> None:
    net.register_forward_hook(lambda _, __, y: y if y.is_leaf else 2 * y)
    net.register_forward_hook(lambda _, __, y: y if y.grad_fn is None else 3 * y)


LINEAR: dict[str, Callable[[Any], None]] = {
    "extended": extended,
    "counting": counting,
    "keeping gradients": keeping_gradients,
    "looking at tensors": looking_at_tensors,
    "scaling": scaling,
    "scaling tensors": scaling_tensors,
    "reading numbers": reading_numbers,
    "scaling layers": scaling_layers,
    "scaling at nodes": scaling_at_nodes,
    "scaling as before": scaling_as_before,
    "branching by the graph": branching_by_the_graph,
}
"""Hooks that leave a backward pass linear, and samples apart."""


def by_norm(grad: Tensor) -> Tensor:
    return grad / (1 + grad.norm())


def by_number(grad: Tensor) -> Tensor:
    return len(grad) * grad


def of_modules(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def hook(net: Any) -> None:
        net.middle.register_full_backward_hook(lambda _, grads, __: (change(grads[0]),))

    return hook


def of_tensors(change: Callable[[Tensor], Tensor], layer: str = "middle") -> Callable[[Any], None]:
    def hook(net: Any) -> None:
        def register(_: Any, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(change)

        getattr(net, layer).register_forward_hook(register)

    return hook


JOINT: dict[str, Callable[[Any], None]] = {
    "norms": of_modules(by_norm),
    "numbers": of_modules(by_number),
    "norms of tensors": of_tensors(by_norm),
    "numbers of tensors": of_tensors(by_number),
    "norms of what a layer returns": of_tensors(by_norm, "last"),
}
"""Hooks that look at the cotangents of all samples at once, or at how many there are."""

# torch says so of a hook on the first layer, whose input needs no gradient, and of older hooks
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]

NETS = {"ruled": Ruled, "unruled": Unruled}
EVERY_NET = pytest.mark.parametrize("net", NETS)


def call(net: str, hook: Callable[[Any], None]) -> Call:
    torch.manual_seed(0)
    module = NETS[net]().double()
    hook(module)
    return Call(module, torch.randn(3, 3).double())


@EVERY_NET
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("hook", LINEAR)
def test_hooks_do_what_they_do(hook: str, door: str, net: str) -> None:
    DOORS[door](call(net, LINEAR[hook]))


def test_what_hooks_leave_is_undone() -> None:
    at_batch = call("ruled", counting)
    before = [(list(vars(x)), list(x._backward_hooks)) for x in layers(at_batch.module)]
    jacfunc.module_jacobian(at_batch.module, per_sample=True)(at_batch.x)
    jacfunc.ntk(at_batch.module, None, at_batch.x)
    after = [(list(vars(x)), list(x._backward_hooks)) for x in layers(at_batch.module)]
    assert after == before


def norms_of_each(at_batch: Call) -> None:
    """Gradients of the loss of each sample alone: hooks need not be linear."""
    params, norms = list(at_batch.params.values()), []
    for sample in at_batch.x.split(1):
        loss = half(at_batch.module(sample), torch.zeros(()))
        grads = torch.autograd.grad(loss, params)
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
    got = jacfunc.gradient_norms(at_batch.module, at_batch.loss)(at_batch.x, at_batch.targets)
    at_batch.same(got, torch.stack(norms))


PRODUCTS = ("product", "operator")
"""Doors that pull the batch back as it is."""


@EVERY_NET
@pytest.mark.parametrize("door", [name for name in DOORS if name not in PRODUCTS])
@pytest.mark.parametrize("hook", JOINT)
def test_each_sample_is_pulled_back_alone(hook: str, door: str, net: str) -> None:
    (norms_of_each if door == "gradient_norms" else DOORS[door])(call(net, JOINT[hook]))


@EVERY_NET
@pytest.mark.parametrize("change", [torch.sign, torch.square, by_norm], ids=lambda f: f.__name__)
def test_products_need_a_linear_backward_pass(change: Callable[[Tensor], Tensor], net: str) -> None:
    at_batch = call(net, of_modules(change))
    with pytest.raises(NotImplementedError, match=r"ggn: products need .* is not linear"):
        DOORS["product"](at_batch)


def test_means_over_samples_are_refused() -> None:
    at_batch = call("ruled", of_modules(lambda grad: grad - grad.mean(0)))
    with pytest.raises(ValueError, match="derivatives in parameters that change with the other"):
        DOORS["ntk"](at_batch)
