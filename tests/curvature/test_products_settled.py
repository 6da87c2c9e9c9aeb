"""Gauss-Newton products of a kind of which many were taken: what is written down, and checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from gc import collect
from threading import Thread
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.curvature.test_norms_settled import batch
from tests.modules.test_settled_layers import (
    BEFORE,
    CHANGES,
    COUNT,
    HIDDEN,
    KINDS,
    Network,
    assert_same,
    normal,
)
from tests.modules.test_settled_layers import fresh as fresh  # a fixture of all tests here
from tests.settled.test_sweeps import Doubled, hooked, num_sweeps

SIZES = pytest.mark.parametrize("size", [1, 5])
TOLERANCE = 1e-10


def jacobian(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Plain gradients of every output of the whole batch, ``[B, M, *param]``."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out, values = model(x), [*params.values()]
    rows = [
        torch.autograd.grad(y, values, retain_graph=True, materialize_grads=True)
        for y in out.reshape(-1)
    ]
    every = [torch.stack(blocks) for blocks in zip(*rows, strict=True)]
    lead = len(x), -1
    return {name: block.unflatten(0, lead) for name, block in zip(params, every, strict=True)}


def expected(model: Any, x: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """``Jᵀ H J v`` from rows of J, and ``H`` of the mean cross entropy by its formula."""
    blocks = jacobian(model, x)
    pushed = sum(torch.einsum("bm...,...->bm", block, v[name]) for name, block in blocks.items())
    p = model(x).detach().softmax(1)
    weighed = (p * pushed - p * (p * pushed).sum(1, keepdim=True)) / len(x)
    return {name: torch.einsum("bm,bm...->...", weighed, block) for name, block in blocks.items()}


def vector(model: nn.Module) -> dict[str, Tensor]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.randn_like(p) for name, p in params.items()}


def settled(
    size: int = 5, model: Any = None, draw: Any = batch, loss: Any = F.cross_entropy
) -> Any:
    """A model, after products of this size that were taken as often as tests are told."""
    model = model or Network()
    ggn = jacfunc.ggn(model, loss)
    for _ in range(BEFORE["calls"] - 1):
        ggn(*draw(size)) @ vector(model)
    return model


def is_written() -> bool:
    """Were so many products taken that they are written down, if they can be?"""
    return BEFORE["calls"] > 16


def assert_right(model: Any, size: int = 5, draw: Any = batch) -> None:
    """At two points in a row products are right."""
    for _ in range(2):
        (x, y), v = draw(size), vector(model)
        assert_same(jacfunc.ggn(model, F.cross_entropy)(x, y) @ v, expected(model, x, v), TOLERANCE)


def test_a_written_product_moves_nothing_for_the_loss() -> None:
    """One vector needs no dimension of vectors, and where nothing is written more is left out."""
    if not is_written():
        pytest.skip("products are not written down")
    model, (x, labels) = settled(), batch(5)
    point, v = jacfunc.ggn(model, F.cross_entropy)(x, labels), vector(model)
    assert_same(point @ v, expected(model, x, v))  # the point is evaluated
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        _ = point @ v
    names = {event.name for event in seen.events() if event.cpu_parent is None}
    assert "aten::_softmax_backward_data" in names
    assert names.isdisjoint({"aten::mul_", "aten::squeeze", "aten::expand", "aten::view"})


@SIZES
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=type)
def test_a_point_is_evaluated_once_and_swept_never(size: int, loss: Any) -> None:
    model = settled(size)
    for _ in range(3):
        x, y = batch(size)
        v, w = vector(model), vector(model)
        COUNT["evaluations"] = 0
        G = jacfunc.ggn(model, loss)(x, y)
        sweeps = num_sweeps(lambda: G @ v)  # noqa: B023
        # what may catch errors is watched, and until then evaluated with tangents and without
        assert COUNT["evaluations"] == (1 if is_written() else 2)
        assert sweeps == (not is_written())
        assert_same(G @ v, expected(model, x, v), TOLERANCE)
        if is_written():
            before = COUNT["evaluations"]
            assert num_sweeps(lambda: G @ w) == 0  # noqa: B023
            assert COUNT["evaluations"] == before
        assert_same(G @ w, expected(model, x, w), TOLERANCE)
        with torch.no_grad():
            model.first.weight.mul_(0.9)


class Centered(nn.Module):
    """Normalizes over the batch, so that every sample changes all others."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-3).sqrt()


def coupled() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), Centered(), nn.Tanh(), nn.Linear(4, 2))


EVERY = {**KINDS, "samples that are coupled": (coupled, normal(3))}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [k for k in EVERY if k not in ("one number", "a matrix")])
def test_modules_of_all_kinds(kind: str, size: int) -> None:
    make, points = EVERY[kind]
    draw = lambda size: (points(size), torch.randint(2, (size,)))  # noqa: E731
    model = settled(size, make().double(), draw)
    assert_right(model, size, draw)
    if is_written() and kind not in ("tied", "recurrent"):
        G, v = jacfunc.ggn(model, F.cross_entropy)(*draw(size)), vector(model)
        assert num_sweeps(lambda: G @ v) == 0


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str) -> None:
    model = settled()
    CHANGES[change](model)
    assert_right(model)


@pytest.mark.parametrize(
    "how", ["twice", "without a rule", "as a view", "looks", "couples", "counts"]
)
def test_another_course_is_taken_anew(how: str) -> None:
    model = settled()
    for turn in (how, "", how, how, how, how, ""):
        HIDDEN["how"] = turn
        (x, y), v = batch(5), vector(model)
        if turn == "couples":  # other operations than at first: batches are compared
            with pytest.raises(ValueError, match="independent"):
                jacfunc.ggn(model, F.cross_entropy)(x, y) @ v
        else:
            product = jacfunc.ggn(model, F.cross_entropy)(x, y) @ v
            assert_same(product, expected(model, x, v), TOLERANCE)


@pytest.mark.parametrize(
    ("how", "error"),
    [("draws", NotImplementedError), ("raises", ArithmeticError), ("adds", RuntimeError)],
)
def test_what_is_refused_stays_refused(how: str, error: type[Exception]) -> None:
    model = settled()
    (x, y), v = batch(5), vector(model)
    HIDDEN["how"] = how
    before = [param.clone() for param in model.parameters()]
    if how == "adds":  # the copy that it writes into is its own
        jacfunc.ggn(model, F.cross_entropy)(x, y) @ v
    else:
        with pytest.raises(error):
            jacfunc.ggn(model, F.cross_entropy)(x, y) @ v
    assert all(map(torch.equal, before, model.parameters()))
    HIDDEN["how"] = ""
    assert_right(model)


def test_numbers_that_python_reads_are_looked_at() -> None:
    HIDDEN["how"] = "goes apart"
    model, draw = Network(), lambda size: (batch(size)[0].abs(), batch(size)[1])
    settled(5, model, draw)
    assert_right(model, 5, draw)
    x, y = batch(5)
    assert 0 < int((x[:, 0] > 0).sum()) < 5
    with pytest.raises(NotImplementedError, match="looks at numbers of the batch"):
        jacfunc.ggn(model, F.cross_entropy)(x, y) @ vector(model)


def test_the_point_is_that_of_the_call() -> None:
    model = settled()
    (x, y), v = batch(5), vector(model)
    right, own = expected(model, x, v), x.clone()
    G, kept = jacfunc.ggn(model, F.cross_entropy)(own, y), jacfunc.ggn(model, F.cross_entropy)
    bare = jacfunc.ggn(model, F.cross_entropy, copy=False)(x, y)
    assert_same(bare @ v, right, TOLERANCE)
    with torch.no_grad():
        own.zero_()
        for param in model.parameters():
            param.add_(1.0)
    model.scale = 7.0
    assert_same(G @ v, right, TOLERANCE)
    model.scale = 2.0
    assert_same(G @ v, right, TOLERANCE)
    with pytest.raises(ValueError, match="copy=False"):
        bare @ v
    assert_same(kept(x, y) @ v, expected(model, x, v), TOLERANCE)


def test_many_vectors_and_other_answers_are_of_the_same_point() -> None:
    model = settled()
    x, y = batch(5)
    G, v = jacfunc.ggn(model, F.cross_entropy)(x, y), vector(model)
    flat = torch.cat([block.flatten() for block in v.values()])
    single = G @ flat
    right = torch.cat([block.flatten() for block in expected(model, x, v).values()])
    torch.testing.assert_close(single, right, rtol=TOLERANCE, atol=TOLERANCE)
    both = G @ torch.stack([flat, 2 * flat], 1)
    torch.testing.assert_close(both, torch.stack([right, 2 * right], 1))
    torch.testing.assert_close(G.matrix() @ flat, right)


SECRET = {"scale": torch.ones(())}


class Secretive(Network):
    """Multiplies by a number of which nothing is told."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * SECRET["scale"]


@pytest.mark.parametrize("count", [1, 16, 20])
def test_what_changes_from_product_to_product_is_seen(count: int) -> None:
    SECRET["scale"] = torch.ones(())
    model = settled(5, Secretive())
    (x, y), v = batch(5), vector(model)
    right, G = expected(model, x, v), jacfunc.ggn(model, F.cross_entropy)(x, y)
    for _ in range(count):
        G @ v
    SECRET["scale"] = torch.full((), 2.0)
    for _ in range(3):
        assert_same(G @ v, right, TOLERANCE)
    if is_written():
        flat = torch.cat([block.flatten() for block in v.values()])
        with pytest.raises(NotImplementedError, match="ggn: "):
            G @ torch.stack([flat, flat], 1)
    SECRET["scale"] = torch.ones(())


def test_products_are_differentiated_by_their_vector() -> None:
    model = settled()
    (x, y), v = batch(5), vector(model)
    G = jacfunc.ggn(model, F.cross_entropy)(x, y)
    own = {name: block.clone().requires_grad_() for name, block in v.items()}
    total = sum(((G @ own)[name] * block).sum() for name, block in v.items())
    grads = torch.autograd.grad(total, [*own.values()])
    assert_same(dict(zip(own, grads, strict=True)), expected(model, x, v), TOLERANCE)
    rows = torch.func.vmap(lambda scale: G @ {name: scale * block for name, block in v.items()})
    products = rows(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert_same({n: p[1] / 3 for n, p in products.items()}, expected(model, x, v), TOLERANCE)


def test_autocast_of_the_call_counts() -> None:
    model = settled()
    (x, y), v = batch(5), vector(model)
    fresh_model = Network()
    fresh_model.load_state_dict(model.state_dict())
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            G = jacfunc.ggn(model, F.cross_entropy)(x, y)
            inside = G @ v
        assert_same(G @ v, inside, TOLERANCE)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(jacfunc.ggn(fresh_model, F.cross_entropy)(x, y) @ v, inside, TOLERANCE)
    with torch.no_grad(), torch.inference_mode():
        inside = jacfunc.ggn(model, F.cross_entropy)(x.clone(), y.clone()) @ v
    assert_same(inside, expected(model, x, v), TOLERANCE)


@pytest.mark.parametrize("select", ["last.*", ["first.weight", "last.bias"]], ids=str)
def test_chosen_parameters(select: Any) -> None:
    model = Network()
    ggn = jacfunc.ggn(model, F.cross_entropy, select=select)
    for _ in range(BEFORE["calls"]):
        (x, y), v = batch(5), vector(model)
        names = ggn(x, y).diagonal().keys()
        product = ggn(x, y) @ {name: v[name] for name in names}
        zeros = {name: block if name in names else 0 * block for name, block in v.items()}
        right = expected(model, x, zeros)
        assert_same(product, {name: right[name] for name in names}, TOLERANCE)


def test_functions_of_trees_of_parameters() -> None:
    def func(params: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ params["layers"][0]) @ params["layers"][1] + params["shift"]

    params = {
        "layers": [torch.randn(3, 4).double(), torch.randn(4, 2).double()],
        "shift": torch.randn(2).double(),
    }
    ggn = jacfunc.ggn(func, F.mse_loss)
    for _ in range(BEFORE["calls"]):
        x, y = normal(3)(5), normal(2)(5)
        G = ggn(params, x, y)
        leaves, spec = torch.utils._pytree.tree_flatten(params)
        v = [torch.randn_like(leaf) for leaf in leaves]
        product = torch.utils._pytree.tree_leaves(G @ torch.utils._pytree.tree_unflatten(v, spec))
        of_leaves = lambda *leaves: func(  # noqa: E731
            torch.utils._pytree.tree_unflatten(leaves, spec),  # noqa: B023
            x,  # noqa: B023
        )
        blocks = torch.autograd.functional.jacobian(of_leaves, tuple(leaves))
        rows = torch.cat([block.reshape(10, -1) for block in blocks], 1)
        flat = torch.cat([x.flatten() for x in v])
        right = rows.T @ (rows @ flat) * 2 / 10
        torch.testing.assert_close(torch.cat([p.flatten() for p in product]), right)


def test_losses_of_users_and_targets_that_do_not_fit() -> None:
    model = settled()
    for loss in (lambda out, y: F.cross_entropy(out, y), partial(F.cross_entropy, weight=None)):
        for _ in range(3):
            (x, y), v = batch(5), vector(model)
            product = jacfunc.ggn(model, loss)(x, y) @ v
            assert_same(product, expected(model, x, v), TOLERANCE)
    (x, y), v = batch(5), vector(model)
    for _ in range(4):
        with pytest.raises(IndexError, match="out of bounds"):
            jacfunc.ggn(model, F.cross_entropy)(x, y + 7) @ v
    assert_right(model)


def test_sizes_take_turns() -> None:
    model = settled(5)
    settled(10, model)
    for size in (5, 10, 3, 10, 5):
        assert_right(model, size)


@pytest.mark.parametrize(
    "step",
    [Doubled.apply, hooked, lambda h: checkpoint(torch.sin, h, use_reentrant=False)],
    ids=["a function with its own backward", "a hook", "a checkpoint"],
)
def test_code_of_users_runs_in_each_sweep(step: Callable[[Tensor], Tensor]) -> None:
    class Stepping(Network):
        def forward(self, x: Tensor) -> Any:
            return step(super().forward(x))

    model = Stepping()
    settled(5, model)
    x, y = batch(5)
    G, v, runs = jacfunc.ggn(model, F.cross_entropy)(x, y), vector(model), Doubled.runs
    assert num_sweeps(lambda: G @ v) > 0
    assert (Doubled.runs > runs) == (step == Doubled.apply)
    assert_right(model)


def test_threads_take_turns() -> None:
    model = settled()
    points = [(*batch(5), vector(model)) for _ in range(6)]
    results: dict[int, Any] = {}

    def take(number: int) -> None:
        x, y, v = points[number]
        for _ in range(10):
            results[number] = jacfunc.ggn(model, F.cross_entropy)(x, y) @ v

    threads = [Thread(target=take, args=(number,)) for number in range(len(points))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (x, _, v) in enumerate(points):
        assert_same(results[number], expected(model, x, v), TOLERANCE)


def test_no_product_is_memory_of_the_sweep() -> None:
    model = settled()
    G, v = jacfunc.ggn(model, F.cross_entropy)(*batch(5)), vector(model)
    first = G @ v
    before = {name: block.clone() for name, block in first.items()}
    for block in first.values():
        block.zero_()
    assert_same(G @ v, before)


def test_a_module_is_not_kept_alive() -> None:
    model = settled()
    seen = ref(model)
    del model
    collect()
    assert seen() is None


def test_conjugate_gradients_are_those_of_the_matrix() -> None:
    model, damping = Network(), 0.1
    ggn = jacfunc.ggn(model, F.cross_entropy)
    for turn in range(4):
        x, y = batch(5)
        rows = torch.cat([block.flatten(2) for block in jacobian(model, x).values()], 2)
        p = model(x).detach().softmax(1)
        H = (p.diag_embed() - p[:, :, None] * p[:, None, :]) / len(x)
        matrix = torch.einsum("bmp,bmn,bnq->pq", rows, H, rows)
        matrix += damping * torch.eye(len(matrix), dtype=matrix.dtype)
        b, G, products = torch.randn(len(matrix), dtype=matrix.dtype), ggn(x, y), 0
        solution, residual = torch.zeros_like(b), b.clone()
        direction, squares = b.clone(), b @ b
        while squares > 1e-26 and products < 60:
            image = G @ direction + damping * direction
            products += 1
            step = squares / (direction @ image)
            solution, residual = solution + step * direction, residual - step * image
            now = residual @ residual
            direction, squares = residual + (now / squares) * direction, now
        torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            model.first.weight.mul_(0.9 - 0.1 * turn)
    assert num_sweeps(lambda: ggn(*batch(5)) @ b) == 0
