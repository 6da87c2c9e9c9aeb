"""The Hessian of a module's loss, beside rows of two plain backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacfunc
from tests.functions.test_second import saved_in
from tests.module_operators.test_operator import MODULES
from tests.truth.oracles import float_leaves


def total(outputs: Any, targets: Tensor) -> Tensor:
    """A loss of whatever a module returns."""
    return sum(torch.log1p((x * targets).square()).mean() for x in float_leaves(outputs))


def double_backward(module: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """``[N, N]``, row by row."""
    params = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(total(module(x), scale), params, create_graph=True)
    rows = [
        torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        for entry in torch.cat([grad.flatten() for grad in grads])
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("name", MODULES)
def test_every_module(name: str) -> None:
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    hess = jacfunc.module_hessian(module, total)(x, scale)
    vector = torch.randn(hess.shape[1], 2, dtype=torch.float64)
    products, diagonal = hess @ vector, hess.diagonal()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    want = double_backward(module, x, scale)
    torch.testing.assert_close(products, want @ vector, rtol=1e-7, atol=1e-9)
    got = torch.cat([diagonal[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(got, want.diagonal(), rtol=1e-7, atol=1e-9)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 2)).double()


X, LABELS = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])


def test_dense_blocks_and_products_by_name() -> None:
    module = net().eval()
    hess = jacfunc.module_hessian(module, F.cross_entropy)(X, LABELS)
    matrix, blocks = hess.matrix(), hess.blocks()
    torch.testing.assert_close(matrix, matrix.T)
    columns = jacfunc.param_slices(module)
    for name, block in blocks.items():
        torch.testing.assert_close(block, matrix[columns[name], columns[name]])
    cross = hess["0.*", "3.weight"].matrix()
    torch.testing.assert_close(cross, matrix[:16, columns["3.weight"]])
    vector = {name: torch.ones_like(param) for name, param in module.named_parameters()}
    product = hess @ vector
    assert list(product) == list(vector)
    torch.testing.assert_close(product["3.bias"], matrix[columns["3.bias"]].sum(1))
    torch.testing.assert_close(hess.value, F.cross_entropy(module(X), LABELS).detach())


def test_chosen_parameters() -> None:
    module = net().eval()
    last = jacfunc.module_hessian(module, F.cross_entropy, select="3.*")(X, LABELS)
    whole = jacfunc.module_hessian(module, F.cross_entropy)(X, LABELS)
    assert last.domain.names == ("3.weight", "3.bias")
    torch.testing.assert_close(last.matrix(), whole.matrix()[16:, 16:])


def test_equal_to_gauss_newton_where_the_module_is_linear() -> None:
    module = nn.Linear(3, 2).double()
    hess = jacfunc.module_hessian(module, F.cross_entropy)(X, LABELS)
    ggn = jacfunc.ggn(module, F.cross_entropy)(X, LABELS)
    torch.testing.assert_close(hess.matrix(), ggn.matrix())


def test_detached_from_parameters_whatever_is_copied() -> None:
    module = net()
    for copy in (True, False):
        hess = jacfunc.module_hessian(module, F.cross_entropy, copy=copy)(X, LABELS)
        vector = torch.ones(hess.shape[1], dtype=torch.float64)
        assert not (hess @ vector).requires_grad
        assert not hess.gradient()["0.weight"].requires_grad
        assert saved_in(lambda h=hess, v=vector: h @ v) == 0  # no third-order graph
        first = hess.matrix()
        assert torch.equal(first, hess.matrix())  # one dropout mask


def test_it_answers_from_its_point_or_not_at_all() -> None:
    module, x = net().eval(), X.clone()
    hess = jacfunc.module_hessian(module, F.cross_entropy)(x, LABELS)
    own = jacfunc.module_hessian(module, F.cross_entropy, copy=False)(x, LABELS)
    before = hess.matrix()
    with torch.no_grad():
        module[0].weight.mul_(2)
        x.zero_()
    assert torch.equal(hess.matrix(), before)
    with pytest.raises(ValueError, match=r"^module_hessian: with copy=False"):
        own.matrix()


def test_a_loss_must_stay_as_it_is() -> None:
    weight = torch.ones(2, dtype=torch.float64)
    loss = lambda out, y: F.cross_entropy(out, y, weight=weight)  # noqa: E731
    hess = jacfunc.module_hessian(net().eval(), loss)(X, LABELS)
    weight[0] = 3
    with pytest.raises(ValueError, match=r"^module_hessian: .*the loss"):
        hess.matrix()


def test_functions_of_parameters() -> None:
    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w"]) @ params["v"]

    params = {"w": torch.randn(3, 4).double(), "v": torch.randn(4, 2).double()}
    hess = jacfunc.module_hessian(func, F.cross_entropy)(params, X, LABELS)
    _, want = jacfunc.hessian_operator(lambda p: F.cross_entropy(func(p, X), LABELS), params)
    torch.testing.assert_close(hess.matrix(), want.matrix())
    product = hess @ params
    assert list(product) == list(params)


def test_products_can_be_differentiated_by_their_vectors() -> None:
    hess = jacfunc.module_hessian(net().eval(), F.cross_entropy)(X, LABELS)
    v = torch.randn(hess.shape[1], dtype=torch.float64, requires_grad=True)
    (by_v,) = torch.autograd.grad((hess @ v).square().sum() / 2, v)
    matrix = hess.matrix()
    torch.testing.assert_close(by_v, matrix @ matrix @ v.detach())


def test_evaluates_once() -> None:
    module, calls = net().eval(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    hess = jacfunc.module_hessian(module, F.cross_entropy)(X, LABELS)
    made: list[Callable[[], Any]] = [hess.matrix, hess.blocks, hess.diagonal, hess.gradient]
    for make in made:
        make()
    assert len(calls) == 1
