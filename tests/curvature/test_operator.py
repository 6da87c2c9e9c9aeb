"""Gauss-Newton and Fisher matrices as linear operators, against matrices by loops of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc.operators import LinearOperator, linearize
from tests.curvature.test_curvature import CASES, flat, of_nobody, posed
from tests.kinds.programs import Cube

SOME = pytest.mark.parametrize(
    "name", ["mlp", "convolutions", "encoder", "heads", "lstm", "shared"]
)


def operator_of(name: str) -> tuple[jacfunc.GaussNewton, nn.Module, Tensor]:
    """An operator, its module, and the matrix by loops."""
    model, case, inputs, targets, true = posed(name)
    return jacfunc.ggn(model, case.loss)(inputs, targets), model, true.matrix


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@SOME
def test_vectors_flat_and_in_trees_one_and_many(name: str) -> None:
    G, model, matrix = operator_of(name)
    size = len(matrix)
    assert isinstance(G, LinearOperator)
    assert (G.shape, G.dtype, G.device) == ((size, size), torch.float64, torch.device("cpu"))
    assert G.T is G
    params = dict(model.named_parameters())
    assert G.domain.names == tuple(params)
    vectors = torch.randn(size, 3, dtype=torch.float64)
    near(G @ vectors, matrix @ vectors)
    near(G.rmm(vectors), matrix @ vectors)
    near(vectors.T @ G, vectors.T @ matrix)
    for vector in vectors.T:
        near(G @ vector, matrix @ vector)
        near(G.rmv(vector), matrix @ vector)
    trees = {
        key: rows.T.reshape(3, *params[key].shape)
        for key, rows in zip(
            params, vectors.split([p.numel() for p in params.values()]), strict=True
        )
    }
    many = G.mm(trees)
    one = G.mv({key: leaf[1] for key, leaf in trees.items()})
    near(flat({key: leaf[1] for key, leaf in many.items()}), matrix @ vectors[:, 1])
    near(flat(one), matrix @ vectors[:, 1])


@SOME
def test_matrices_and_blocks_by_products(name: str) -> None:
    G, model, matrix = operator_of(name)
    near(G.matrix(chunk_size=7), matrix)
    near(G.matrix(), matrix)
    blocks, params = G.tree(), dict(model.named_parameters())
    slices = jacfunc.param_slices(model)
    for row in params:
        for column in params:
            block = blocks[row][column].reshape(params[row].numel(), -1)
            error = block - matrix[slices[row], slices[column]]
            assert error.abs().max() <= 1e-10 * matrix.abs().max()


def test_sums_scalings_compositions_and_restrictions() -> None:
    G, model, matrix = operator_of("mlp")
    slices = jacfunc.param_slices(model)
    vector = torch.randn(len(matrix), dtype=torch.float64)
    near((2.0 * G + G) @ vector, 3 * matrix @ vector)
    near((G @ G) @ vector, matrix @ (matrix @ vector))
    near(G.restrict("2.*", "0.bias").matrix(), matrix[slices["2.weight"].start :, slices["0.bias"]])
    A = torch.randn(len(matrix), 4, dtype=torch.float64)
    _, into = linearize(lambda z: G.domain.tree(A @ z), torch.zeros(4, dtype=torch.float64))
    near((into.T @ G @ into).matrix(), A.T @ matrix @ A)


def test_solvers_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    G, _, matrix = operator_of("convolutions")
    largest = linalg.eigsh(G.to_scipy(), k=2, return_eigenvectors=False)
    near(torch.from_numpy(largest).sort().values, torch.linalg.eigvalsh(matrix)[-2:])


def test_of_a_function_in_the_tree_of_its_parameters() -> None:
    params = {"w": [torch.randn(4, 3).double()], "steps": 2, "b": torch.randn(3).double()}

    def func(params: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(x @ params["w"][0]) + params["b"]
        return out

    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    G = jacfunc.ggn(func, F.cross_entropy)(params, x, y)
    vectors = torch.randn(15, 2).double()
    near(G @ vectors, G.matrix() @ vectors)
    tree = G.domain.tree(vectors[:, 0])
    assert tree["steps"] is None
    near(G.domain.flat(G @ tree), G @ vectors[:, 0])


def test_of_one_tensor_of_parameters() -> None:
    weight, x = torch.randn(4, 3).double(), torch.randn(5, 4).double()
    G = jacfunc.ggn(lambda w, x: x @ w, F.mse_loss)(weight, x, torch.randn(5, 3).double())
    vector = torch.randn(4, 3).double()
    near((G @ vector).flatten(), G.matrix() @ vector.flatten())
    near(G @ vector.flatten(), G.matrix() @ vector.flatten())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_fisher_matrices_of_many_vectors(likelihood: Any) -> None:
    model, x = CASES["mlp"].make().double(), torch.randn(5, 4).double()
    found = jacfunc.fisher(model, likelihood, draws=3)(x)
    vectors = torch.randn(len(flat(dict(model.named_parameters()))), 4).double()
    near(found @ vectors, found.matrix() @ vectors)


def contrast(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out @ out.T, y)


def test_coupled_samples_have_a_matrix_by_products() -> None:
    model, x, y = CASES["mlp"].make().double(), torch.randn(5, 4).double(), torch.arange(5)
    G = jacfunc.ggn(model, contrast)(x, y)
    with pytest.raises(ValueError, match="ggn: the loss must be a sum or mean over samples"):
        G.matrix()
    jacobian = jacfunc.module_jacobian(model, flat=True)(x)
    point = model(x).detach()
    hessian: Any = torch.autograd.functional.hessian(lambda out: contrast(out, y), point)
    near(G.matrix(chunk_size=5), jacobian.T @ hessian.view(15, 15) @ jacobian)


class Counting(TorchDispatchMode):
    """Counts matrix products, with those of a batch as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> int:
    with Counting() as counter:
        run()
    return counter.count


@pytest.mark.parametrize("loss", [F.cross_entropy, of_nobody])
def test_many_vectors_take_the_sweeps_of_one(loss: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    G = jacfunc.ggn(model, loss)(torch.randn(5, 4), torch.randint(3, (5,)))
    eight, vector = torch.randn(8, 51), torch.randn(51)
    for _ in range(3):  # then nothing is compared, and all graphs are there
        G @ vector
    assert 0 < count(lambda: G @ eight.T) <= count(lambda: G @ vector) + 2
    assert count(lambda: G @ eight[:4].T) == count(lambda: G @ eight.T)


def test_products_of_many_vectors_can_be_differentiated_by_them() -> None:
    G, _, matrix = operator_of("mlp")
    vectors = torch.randn(len(matrix), 3).double().requires_grad_()
    near(
        torch.autograd.grad((G @ vectors).square().sum(), vectors)[0], 2 * matrix @ matrix @ vectors
    )
    rows = torch.vmap(lambda v: G @ v)(vectors.detach().T)
    near(rows, vectors.detach().T @ matrix)


def test_refusals_of_vectors() -> None:
    G, _, matrix = operator_of("mlp")
    with pytest.raises(ValueError, match=r"ggn: vectors? must have 51 numbers .* got shape \(50,"):
        G @ torch.ones(50).double()
    with pytest.raises(ValueError, match=r"ggn: vectors must have 51 numbers .* got shape \(50, 2"):
        G.mm(torch.ones(50, 2).double())
    with pytest.raises(TypeError, match="ggn: vector must match in dtype"):
        G @ torch.ones(51)
    with pytest.raises(ValueError, match="ggn: two operators must agree"):
        G @ operator_of("heads")[0]
    with pytest.raises(NotImplementedError, match="ggn: products must be differentiated in revers"):
        torch.func.jvp(lambda v: G @ v, (matrix[0],), (matrix[1],))


# --- the evaluation that pushes and keeps the graph ---


class Counted(nn.Module):
    """Counts its evaluations where nothing looks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Any:
        EVALUATIONS.append(1)
        return self.inner(*args)


EVALUATIONS: list[int] = []


@pytest.mark.parametrize("name", CASES)
def test_later_points_of_a_kind(name: str) -> None:
    """The first product of the first point takes two evaluations, of others mostly one."""
    model, case, inputs, targets, true = posed(name)
    of = jacfunc.ggn(model, case.loss, independent=True)
    for _ in range(4):
        vector = {key: torch.randn_like(p) for key, p in model.named_parameters()}
        G = of(inputs, targets)
        for _ in range(3):
            near(flat(G @ vector), (true.matrix @ flat(vector)).detach())


def test_a_first_product_takes_one_evaluation() -> None:
    model = Counted(CASES["convolutions"].make())
    x, y = torch.randn(5, 2, 6, 6), torch.randint(3, (5,))
    of = jacfunc.ggn(model, F.cross_entropy)
    vector = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    counts = []
    for _ in range(3):
        G = of(x, y)
        EVALUATIONS.clear()
        for _ in range(3):
            G @ vector
        counts.append(len(EVALUATIONS))
    assert counts == [2, 1, 1]


class Written(nn.Module):
    """Writes into its parameters' products, normalizes, drops nothing, checkpoints a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        h.mul_(2).tanh_()
        h = torch.utils.checkpoint.checkpoint(self.norm, h, use_reentrant=False)
        return self.last(h.detach() + h)


def test_modules_that_write_normalize_and_checkpoint() -> None:
    model = Written().double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    expected = jacfunc.ggn(model, F.cross_entropy)(x, y).matrix()
    for _ in range(3):
        vector = torch.randn(len(expected)).double()
        near(jacfunc.ggn(model, F.cross_entropy)(x, y) @ vector, expected @ vector)


def test_a_module_that_draws_at_a_later_point() -> None:
    """Its mode is part of the kind: dropout is refused whatever the earlier calls were."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    x, y, vector = torch.randn(5, 4), torch.randint(3, (5,)), torch.randn(51)
    of = jacfunc.ggn(model, F.cross_entropy)
    for _ in range(2):
        of(x, y) @ vector
    model.train()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="ggn: per_sample must know how samples draw"):
            of(x, y) @ vector
    same = jacfunc.ggn(model, F.cross_entropy, randomness="same")
    for _ in range(3):
        G = same(x, y)
        torch.testing.assert_close(G @ vector, G.matrix() @ vector)


class Rare(nn.Module):
    """Takes another path for some numbers, of which forward mode has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return Cube.apply(out) if float(x[0, 0]) > 5 else out.tanh()


def test_what_forward_mode_refuses_at_a_later_point() -> None:
    model, x, y = Rare().double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    of = jacfunc.ggn(model, F.cross_entropy)
    for first in (0.0, 0.0, 9.0, 9.0):
        x[:, 0] = first
        G, vector = of(x, y), torch.randn(15).double()
        near(G @ vector, G.matrix() @ vector)
