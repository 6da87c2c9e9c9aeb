"""Every kind of function and module of the tables, compiled: right at other numbers, or listed.

The first call is compared with the derivative itself as it is compiled; what is judged here, by
loops of autograd, is a later call: at another point, or of a module after parameters and buffers
have become others. A sixth of the kinds is tried, ``JACFUNC_EVERY_KIND=1`` tries all, which takes
three minutes. What is listed is always tried, so that the list stays true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import jacfunc
from tests.compiled.test_matrix import EVERY, PART
from tests.conftest import DEVICE
from tests.house.test_coverage import (
    FUNCTIONS,
    MODULES,
    UNSURE,
    Called,
    bound,
    first_order,
    first_point,
    fresh,
    second_point,
    seeded,
)
from tests.kinds.modules import ModuleKind
from tests.truth.oracles import float_leaves

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, as in the coverage matrix

READS = "value out of a tracing tensor with aten._local_scalar_dense"
COMPARES = "value out of a tracing tensor with aten.(equal|allclose)"
BY_NUMPY = "numbers of a tensor are read by"
DRAWS = "draw no random numbers"
SELECTS = "shapes do not depend on numbers"
SPARSE = "Sparse|memory format"
WITHOUT_DERIVATIVE = "torch has no derivative|derivative for|is wrong here"
OVERWRITTEN = "modified by an inplace operation"

FUNCTIONS_LISTED: dict[str, str] = {
    name: words
    for words, names in {
        READS: "one_hot_product branch_on_data branch_on_item branch_on_assert count_from_tensor "
        "newton_until_converged halve_until_small stopped_by_python_float gaussian_nll "
        "adaptive_steps best_expert neo_hookean_stress",
        COMPARES: "covariance correlation fixed_point_until",
        BY_NUMPY: "numpy_inside numpy_with_vmap_rule numpy_constant",
        DRAWS: "dropout noise",
        # a distribution reads its arguments, unless torch's compiler was loaded before
        f"{DRAWS}|{READS}": "reparametrized_sample",
        SELECTS: "assign_by_mask sum_of_selected nonzero_product least_squares ctc unique_values",
        SPARSE: "sparse_coo_vector sparse_csr_constant",
        WITHOUT_DERIVATIVE: "bessel_j chebyshev_polynomial incomplete_gamma_by_order",
        OVERWRITTEN: "overwrites_what_backward_needs overwritten_sigmoid",
        "can't pull cotangents back": "torch_while_loop torch_scan",
        "INTERNAL ASSERT FAILED": "det_of_batch",
        "must return tensors, got str": "dataclass_with_a_name",
        "must return tensors and plain values, got type": "aux_of_anything",
        # a factor that is there at the first point alone
        "input is not positive-definite": "try_and_except",
    }.items()
    for name in names.split()
}
MODULES_LISTED: dict[str, str] = {
    name: words
    for words, names in {
        READS: "BatchNorm1d momentum None, GRU packed, branches on data, GaussianNLLLoss",
        DRAWS: "mlp RReLU train, FractionalMaxPool2d, FractionalMaxPool3d, "
        "LSTM dropout, MultiheadAttention dropout, Dropout train, Dropout in place, Dropout1d, "
        "Dropout2d, Dropout3d, AlphaDropout, FeatureAlphaDropout, reparametrized noise",
        SELECTS: "CTCLoss, AdaptiveLogSoftmaxWithLoss, routed experts",
        SPARSE: "sparse adjacency",
        WITHOUT_DERIVATIVE: "CrossMapLRN2d",
        "got ConcreteModuleType": "TorchScript script, TorchScript trace",
        "must not be reentrant": "checkpoint reentrant",
    }.items()
    for name in names.split(", ")
}
OTHER_KIND = {"expanded_input", "strided_input", "requires_grad_input", "parameter_input"}
"""Their second points are tensors of another kind than the first."""


def chosen(table: Mapping[str, Any], listed: Mapping[str, str]) -> list[str]:
    assert listed.keys() <= table.keys()
    return [name for n, name in enumerate(table) if EVERY or n % PART == 0 or name in listed]


def check(got: Any, want: Any, rtol: float) -> None:
    found, wanted = float_leaves(got), float_leaves(want)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("name", chosen(FUNCTIONS, FUNCTIONS_LISTED))
def test_functions(name: str) -> None:
    kind = FUNCTIONS[name]
    aux: dict[str, Any] = {"has_aux": True} if kind.has_aux else {}
    derive = jacfunc.jacrev(kind.func, kind.argnums, **aux)
    jac = jacfunc.compile(derive, backend="replay")
    if name in FUNCTIONS_LISTED:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=FUNCTIONS_LISTED[name]):
            [jac(*point(kind), **kind.kwargs) for point in (first_point, second_point)]
        return
    jac(*first_point(kind), **kind.kwargs)
    answer = jac(*second_point(kind), **kind.kwargs)
    sure = kind.unsure is None
    want, error = first_order(bound(kind), second_point(kind), kind.argnums, sure=sure)
    check(answer[0] if kind.has_aux else answer, want, max(kind.rtol, error))
    assert len(jac.compilations) == 1 + (name in OTHER_KIND)


def trained(model: nn.Module) -> nn.Module:
    """The module after its parameters and buffers have become others."""
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point() or param.is_complex():
                param.mul_(0.9)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.1)
    return model


@pytest.mark.skipif(DEVICE != "cpu", reason="the modules of the table live on the CPU")
@pytest.mark.parametrize("name", chosen(MODULES, MODULES_LISTED))
def test_modules(name: str) -> None:
    kind, model = MODULES[name], MODULES[name].make()
    wrt = Called(kind).wrt
    derive = jacfunc.module_jacobian(model, wrt if len(wrt) > 1 else wrt[0])
    jac = jacfunc.compile(derive, backend="replay")
    if name in MODULES_LISTED:
        with pytest.raises((ValueError, RuntimeError), match=MODULES_LISTED[name]):
            jac(*kind.inputs(), **kind.kwargs())
        return
    jac(*kind.inputs(), **kind.kwargs())
    trained(model)
    answer = jac(*kind.inputs(), **kind.kwargs())
    check_module(answer, replace(kind, make=lambda: trained(kind.make())))
    assert len(jac.compilations) == 1


def check_module(answer: Any, kind: ModuleKind) -> None:
    at, sure = Called(kind), kind.name not in UNSURE
    want, error = first_order(seeded(fresh(kind)), at.point, at.argnums, sure=sure)
    check(answer, want, max(kind.rtol, error))


OF_TWO_MODES = [
    *("BatchNorm1d train", "BatchNorm1d eval", "Dropout eval", "TransformerEncoderLayer eval"),
    *("InstanceNorm1d", "spectral_norm train"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="the modules of the table live on the CPU")
@pytest.mark.parametrize("name", [name for name in OF_TWO_MODES if name in MODULES])
def test_modules_in_the_other_mode(name: str) -> None:
    kind, model = MODULES[name], MODULES[name].make()
    jac = jacfunc.compile(jacfunc.module_jacobian(model, ("params", "inputs")), backend="replay")
    jac(*kind.inputs(), **kind.kwargs())
    model.train(not model.training)
    if "eval" in name and "Norm" not in name:
        with pytest.raises(ValueError, match=DRAWS):
            jac(*kind.inputs(), **kind.kwargs())
        return
    other = replace(kind, make=lambda: kind.make().train(model.training))
    check_module(jac(*kind.inputs(), **kind.kwargs()), other)
    assert len(jac.compilations) == 2
