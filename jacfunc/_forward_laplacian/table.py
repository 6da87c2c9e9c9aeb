"""The table of rules: for each function of torch what is done with jets instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc._faults import Norm, formula_of
from jacfunc._forward_laplacian import arithmetic, linear, reductions
from jacfunc._forward_laplacian import composed as written
from jacfunc._forward_laplacian.activations import ACTIVATIONS
from jacfunc._forward_laplacian.elementwise import FORMULAS, KERNELS, elementwise
from jacfunc._forward_laplacian.jet import Args, Kwargs
from jacfunc._forward_laplacian.propagation import Propagation, Rule


def composed(function: Callable[..., Any]) -> Rule:
    """The rule of a function of jets that is written in functions which have rules."""

    def rule(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
        with ctx:
            return function(*args, **kwargs)

    return rule


def _constant(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """What depends on shapes alone, or has derivatives of zero."""

    def value(argument: Any) -> Any:
        if isinstance(argument, tuple | list):
            return type(argument)(map(value, argument))
        return ctx.value(argument)

    return func(*map(value, args), **{name: value(x) for name, x in kwargs.items()})


def _tracked(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether a tensor requires a gradient: one that is differentiated does."""
    return True


def _same(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The identity."""
    return args[0]


def _normalized(ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A normalization, by the formula that stands for torch's kernel where that is wrong.

    Raises:
        NotImplementedError: if it may write statistics of the batch, or torch refuses the call.
    """
    norm = formula_of(func, args, kwargs)
    if not isinstance(norm, Norm) or not norm.is_regular or norm.writes:
        raise NotImplementedError("it takes statistics of the batch, and may write them")
    with ctx:
        return norm.value(norm.input.dtype)


PLACES = (torch, Tensor, F, torch.linalg, torch.special)

_CONSTANT = (
    *("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "isclose", "allclose"),
    *("equal", "logical_and", "logical_or", "logical_not", "signbit", "any", "all", "nonzero"),
    *("argmax", "argmin", "argsort", "sign", "sgn", "floor", "ceil", "round", "trunc", "fix"),
    *("detach", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "bernoulli"),
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_complex"),
    *("is_floating_point", "is_contiguous", "is_signed", "get_device", "__len__", "__bool__"),
    *("is_tensor", "result_type", "__repr__", "__format__", "searchsorted", "bucketize"),
    *("broadcast_shapes", "is_same_size", "is_nonzero", "count_nonzero", "histc"),
)
_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized"),
    *("is_meta", "names", "itemsize", "nbytes", "is_mps", "is_xpu"),
)
_LINEAR = (
    *("sum", "mean", "reshape", "view", "permute", "transpose", "t", "swapaxes", "swapdims"),
    *("movedim", "moveaxis", "adjoint", "unsqueeze", "squeeze", "flatten", "unflatten", "ravel"),
    *("expand", "broadcast_to", "repeat", "repeat_interleave", "tile", "roll", "flip", "flipud"),
    *("fliplr", "rot90", "narrow", "select", "index_select", "gather", "take", "trace"),
    *("take_along_dim", "diagonal", "diag", "diag_embed", "diagflat", "tril", "triu", "cumsum"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit"),
    *("unbind", "unsafe_chunk", "unsafe_split", "contiguous", "clone", "unfold"),
    *("atleast_1d", "atleast_2d", "atleast_3d", "sum_to_size", "__getitem__", "masked_fill"),
    *("pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "pixel_shuffle"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "pixel_unshuffle", "fold", "interpolate"),
    *("mm", "mv", "bmm", "dot", "inner", "outer", "ger", "vdot", "einsum", "tensordot", "kron"),
    *("cross", "bilinear", "chain_matmul", "multi_dot", "vecdot", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
_JOINTLY_LINEAR = (
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"),
    *("row_stack", "block_diag", "broadcast_tensors", "meshgrid", "index_add", "scatter_add"),
    *("diff", "select_scatter", "slice_scatter", "diagonal_scatter", "index_copy"),
)
_WRITTEN = (
    *("rms_norm", "group_norm", "var", "std", "vector_norm", "normalize", "cdist", "mse_loss"),
    *("addmm", "scaled_dot_product_attention", "logaddexp", "hypot", "prod", "addcmul", "lerp"),
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_CONSTANT, _constant),
    **dict.fromkeys(_LINEAR, linear.multilinear),
    **dict.fromkeys(_JOINTLY_LINEAR, linear.jointly_linear),
    **KERNELS,
    **{name: elementwise(formula) for name, formula in (FORMULAS | ACTIVATIONS).items()},
    **dict.fromkeys(("add", "__radd__"), arithmetic.added(1)),
    **dict.fromkeys(("sub", "subtract"), arithmetic.added(-1)),
    **dict.fromkeys(("rsub", "__rsub__"), arithmetic.added(-1, is_reversed=True)),
    **dict.fromkeys(("mul", "multiply", "__rmul__"), arithmetic.mul),
    **dict.fromkeys(("div", "divide", "true_divide"), arithmetic.div),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), arithmetic.rdiv),
    **dict.fromkeys(("matmul",), linear.matmul),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), linear.like_another),
    **dict.fromkeys(("to", "type", "type_as", "float", "double", "half"), linear.converted),
    **dict.fromkeys(("bfloat16", "cpu", "cuda", "long", "int", "bool"), linear.converted),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), arithmetic.dropped),
    "linear": linear.linear,
    "where": arithmetic.where,
    "positive": _same,
    "softmax": reductions.softmax,
    "log_softmax": reductions.log_softmax,
    "logsumexp": reductions.logsumexp,
    **dict.fromkeys(("max", "min"), reductions.extreme),
    **dict.fromkeys(("amax", "amin"), reductions.extreme_values),
    **dict.fromkeys(("maximum", "minimum"), reductions.extreme_of_two),
    **dict.fromkeys(("sort", "topk"), reductions.extreme_along),
    **dict.fromkeys(("pow", "__pow__"), reductions.power),
    "__rpow__": reductions.rpower,
    **dict.fromkeys(("atan2", "arctan2"), reductions.atan2),
    "slogdet": arithmetic.slogdet,
    "logdet": arithmetic.logdet,
    **dict.fromkeys(("inv", "inverse"), arithmetic.inv),
    "solve": arithmetic.solve,
    **{name: composed(getattr(written, name)) for name in _WRITTEN},
}


def _functions(name: str, places: Iterable[Any] = PLACES) -> Iterator[Callable[..., Any]]:
    """All functions of this name."""
    for place in places:
        function = getattr(place, name, None)
        if callable(function):
            yield function


def _getters(names: Iterable[str]) -> Iterator[Callable[..., Any]]:
    """What Python calls to read these attributes of a tensor."""
    for name in names:
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            yield attribute.__get__


RULES: dict[Callable[..., Any], Rule] = {
    **{function: rule for name, rule in _RULES.items() for function in _functions(name)},
    **dict.fromkeys(_getters(_ATTRIBUTES), _constant),
    **dict.fromkeys(_getters(("T", "mT", "H", "mH")), linear.multilinear),
    **dict.fromkeys(_getters(("real",)), _same),
    **dict.fromkeys(_getters(("requires_grad",)), _tracked),
    **dict.fromkeys(_functions("norm", (torch, Tensor)), composed(written.norm)),
    **dict.fromkeys(_functions("norm", (torch.linalg,)), composed(written.linalg_norm)),
    **{
        getattr(place, name): _normalized
        for name in ("layer_norm", "batch_norm", "instance_norm")
        for place in (F, torch)
    },
}
"""For each function of torch its rule."""
