"""Options that every door for modules has: numbers against loops, memory counted, words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import jacfunc
from jacfunc._memory.counting import PeakBytes


class Network(nn.Module):
    """An embedding-free network with a layer at several positions, a norm and raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 4)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.rand(24) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.wide(x))) * self.scale
        return self.head(self.narrow(hidden).flatten(-2))


def problem(size: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = Network().double()
    return module, torch.randn(size, 4, 8).double(), torch.randint(3, (size,))


def looped(module: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """The Jacobian ``[B, M, P]`` of chosen parameters, a row at a time."""
    params = [p for name, p in module.named_parameters() if names is None or name in names]
    out = module(x)
    rows = []
    for number in out.flatten():
        gradients = torch.autograd.grad(number, params, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(*out.shape, -1)


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What each sample adds to the gradient of the mean cross entropy, ``[B, P]``."""
    params = list(module.parameters())
    rows = []
    for sample, target in zip(x, y, strict=True):
        loss = F.cross_entropy(module(sample.unsqueeze(0)), target.unsqueeze(0)) / len(x)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    return torch.stack(rows)


def cut(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    sizes = [param.numel() for param in module.parameters()]
    named = zip(module.named_parameters(), flat.split(sizes), strict=True)
    return {name: part.view_as(param) for (name, param), part in named}


def gauss_newton(module: nn.Module, x: Tensor) -> Tensor:
    J, chances = looped(module, x), module(x).detach().softmax(-1)
    H = torch.diag_embed(chances) - chances.unsqueeze(2) * chances.unsqueeze(1)
    return torch.einsum("bmp,bmn,bnq->pq", J, H / len(x), J)


def kernel(module: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
    rows = looped(module, x)
    return torch.einsum("amp,bnp->abmn", rows, looped(module, *others) if others else rows)


def blocks(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    matrix, slices = gauss_newton(module, x), jacfunc.param_slices(module)
    return {name: matrix[columns, columns] for name, columns in slices.items()}


Ask = Callable[..., Any]
"""The answer of a door for a module, inputs and targets, with options."""

DOORS: dict[str, tuple[Ask, Ask]] = {
    "kernel": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, x, **ways),
        lambda m, x, y: kernel(m, x),
    ),
    "kernel of two batches": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, x, x[:30] + 1, **ways),
        lambda m, x, y: kernel(m, x, x[:30] + 1),
    ),
    "traced kernel of loaders": (
        lambda m, x, y, **ways: jacfunc.ntk(m, None, list(x.split(25)), trace_axes=0, **ways),
        lambda m, x, y: kernel(m, x).diagonal(0, 2, 3).sum(-1),
    ),
    "diagonal": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).diagonal(),
        lambda m, x, y: cut(m, gauss_newton(m, x).diagonal()),
    ),
    "blocks": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).blocks(),
        lambda m, x, y: blocks(m, x),
    ),
    "matrix": (
        lambda m, x, y, **ways: jacfunc.ggn(m, F.cross_entropy, **ways)(x, y).matrix(),
        lambda m, x, y: gauss_newton(m, x),
    ),
    "norms": (
        lambda m, x, y, **ways: jacfunc.gradient_norms(m, F.cross_entropy, **ways)(x, y),
        lambda m, x, y: gradients(m, x, y).norm(dim=1),
    ),
}


def drawn(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    F_ = jacfunc.fisher(module, "categorical", draws=3, generator=generator, **ways)(x)
    return torch.cat([part.flatten() for part in F_.diagonal().values()])


def drawn_by_loop(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same draws, and the squares of their gradients, one after the other."""
    chances, J = module(x).detach().softmax(-1), looped(module, x)
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(chances, 3, True, generator=generator)
    total = torch.zeros(J.shape[-1], dtype=J.dtype)
    for sample in range(len(x)):
        for target in classes[sample]:
            score = chances[sample] - F.one_hot(target, 3)
            total += (score @ J[sample]).square() / (3 * len(x))
    return total


def projection(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    return jacfunc.random_projection(module, 64, **ways)(x)


def with_one_matrix(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``J R``, with the R that the projection of a network's own unit gradients shows."""
    return looped(module, x) @ signs(module)


def signs(module: nn.Module) -> Tensor:
    """The matrix R of this module, read from projections of single entries of the parameters."""

    class Entries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, param in module.named_parameters():
                part, _, leaf = name.rpartition(".")
                if part and not hasattr(self, part):
                    self.add_module(part, nn.Module())
                holder = self.get_submodule(part) if part else self
                holder.register_parameter(leaf, nn.Parameter(param.detach().clone()))

        def forward(self, units: Tensor) -> Tensor:
            flat = torch.cat([param.flatten() for param in self.parameters()])
            return units * flat

    entries = Entries()
    assert [n for n, _ in entries.named_parameters()] == [n for n, _ in module.named_parameters()]
    total = sum(param.numel() for param in module.parameters())
    units = torch.ones(1, total, dtype=torch.float64)
    return jacfunc.random_projection(entries, 64, independent=True)(units)[0]


def projected_gradient(module: nn.Module, x: Tensor, y: Tensor, **ways: Any) -> Tensor:
    return jacfunc.random_projection(module, 64, F.cross_entropy, **ways)(x, y)


DOORS["fisher"] = drawn, drawn_by_loop
DOORS["projections"] = projection, with_one_matrix
DOORS["projected gradients"] = projected_gradient, lambda m, x, y: gradients(m, x, y) @ signs(m)


@pytest.mark.parametrize("share", [3.0, 0.7, 0.4])
@pytest.mark.parametrize("name", DOORS)
def test_a_door_keeps_to_its_budget(name: str, share: float) -> None:
    ask, expected = DOORS[name]
    module, x, y = problem()
    ask(module, x, y, independent=True)  # what is learned takes memory, too
    with PeakBytes() as whole:
        answer = ask(module, x, y, independent=True)
    torch.testing.assert_close(answer, expected(module, x, y))
    result = sum(leaf.nbytes for leaf in tree_leaves(answer))
    memory = result + int(share * (whole.peak - result))
    del answer
    ask(module, x, y, independent=True, memory=memory)
    with PeakBytes() as counter:
        answer = ask(module, x, y, independent=True, memory=memory)
    torch.testing.assert_close(answer, expected(module, x, y))
    assert memory / 4 < counter.peak <= memory or share > 1


@pytest.mark.parametrize("name", DOORS)
def test_a_door_takes_few_samples_at_once_where_one_says_so(name: str) -> None:
    ask, expected = DOORS[name]
    module, x, y = problem(7)
    sizes: list[int] = []
    module.register_forward_hook(lambda _, args, out: sizes.append(len(args[0])))
    answer = ask(module, x, y, independent=True, memory="1 GiB", chunk_size=1)
    assert max(sizes) <= 2 + 5 * ("fisher" in name)  # two are evaluated to learn from
    torch.testing.assert_close(answer, expected(module, x, y))


def test_a_budget_of_a_kernel_of_a_function() -> None:
    module, x, _ = problem()
    params = {name: param.detach() for name, param in module.named_parameters()}

    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x.unsqueeze(0),))[0]

    jacfunc.ntk(func, params, x, x + 1)
    with PeakBytes() as whole:
        K = jacfunc.ntk(func, params, x, x + 1)
    torch.testing.assert_close(K, kernel(module, x, x + 1))
    memory = whole.peak // 2
    with PeakBytes() as counter:
        K = jacfunc.ntk(func, params, x, x + 1, memory=memory)
    assert memory / 4 < counter.peak <= memory
    torch.testing.assert_close(K, kernel(module, x, x + 1))


@pytest.mark.parametrize("name", DOORS)
def test_a_budget_that_is_too_small_is_refused(name: str) -> None:
    module, x, y = problem(5)
    with pytest.raises(ValueError, match=r"memory must hold the result, .* got 100 B\. Give more"):
        DOORS[name][0](module, x, y, independent=True, memory=100)
    with pytest.raises(ValueError, match="memory must be a positive number of bytes, got 'lots'"):
        DOORS[name][0](module, x, y, memory="lots")
    with pytest.raises(TypeError, match="memory must be a number of bytes, a string or None, got"):
        DOORS[name][0](module, x, y, memory=1.5)


@pytest.mark.parametrize("name", DOORS)
def test_how_samples_draw_is_checked_by_every_door(name: str) -> None:
    module, x, y = problem(5)
    words = r"randomness must be 'error', 'same' or 'different', got 'some'\. Let all"
    with pytest.raises(ValueError, match=words):
        DOORS[name][0](module, x, y, randomness="some")
    words = r"with randomness='different' all samples must be .* got memory=1024\. Leave it out"
    with pytest.raises(ValueError, match=words):
        DOORS[name][0](module, x, y, randomness="different", memory="1 KiB")


@pytest.mark.parametrize("door", [jacfunc.module_jacobian, jacfunc.stream_jacobian])
def test_jacobians_check_how_samples_draw(door: Any) -> None:
    with pytest.raises(ValueError, match="randomness must be 'error', 'same' or 'different', got"):
        door(nn.Linear(2, 1), per_sample=True, randomness=None)
    with pytest.raises(ValueError, match=r"randomness must be .* got 'all'"):
        jacfunc.ntk(lambda p, x: p @ x, torch.ones(3), torch.ones(2, 3), randomness="all")


def test_dropout_has_one_mask_under_a_budget() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, y = torch.randn(9, 5).double(), torch.randint(2, (9,))
    ways: dict[str, Any] = {"randomness": "same", "independent": True}
    torch.manual_seed(1)
    want = jacfunc.gradient_norms(module, F.cross_entropy, chunk_size=1, **ways)(x, y)
    torch.manual_seed(1)
    got = jacfunc.gradient_norms(module, F.cross_entropy, memory="30 KiB", **ways)(x, y)
    torch.testing.assert_close(got, want)


class Named(nn.Module):
    """Two outputs by name, whose order is another one in ``out``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "two": self.two(torch.tanh(x))}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("second", [False, True])
def test_kernels_are_written_into_out(chunk_size: int | None, second: bool) -> None:
    torch.manual_seed(0)
    module, x = Named().double(), torch.randn(7, 3).double()
    others = torch.randn(4, 3).double() if second else None
    width = 4 if second else 7
    shapes = {"two": (7, width, 4, 4), "one": (7, width, 2, 2)}
    out = {name: torch.full(shape, 7.0).double() for name, shape in shapes.items()}
    tensors = dict(out)
    got = jacfunc.ntk(module, None, x, others, chunk_size=chunk_size, out=out)
    assert got is out
    assert all(out[name] is tensors[name] for name in tensors)
    right = x if others is None else others
    products = {"one": x @ right.T + 1, "two": torch.tanh(x) @ torch.tanh(right).T + 1}
    for name, product in products.items():
        units = torch.eye(shapes[name][-1], dtype=torch.float64)
        torch.testing.assert_close(out[name], product[..., None, None] * units)


@pytest.mark.parametrize("ways", [{}, {"chunk_size": 2}, {"memory": "1 MiB"}])
def test_projections_are_written_into_out(ways: dict[str, Any]) -> None:
    module, x, y = problem(7)
    expected = with_one_matrix(module, x, y)
    out = torch.full(expected.shape, 7.0).double()
    assert jacfunc.random_projection(module, 64, out=out, **ways)(x) is out
    torch.testing.assert_close(out, expected)
    out = torch.full((7, 64), 7.0)  # in single precision
    project = jacfunc.random_projection(module, 64, F.cross_entropy, out=out, **ways)
    assert project(x, y) is out
    torch.testing.assert_close(out.double(), gradients(module, x, y) @ signs(module))


@pytest.mark.parametrize("api", ["ntk", "random_projection"])
def test_out_that_does_not_fit_is_refused(api: str) -> None:
    module, x, _ = problem(5)

    def call(out: Any, chunk_size: int | None = None) -> None:
        if api == "ntk":
            jacfunc.ntk(module, None, x, out=out, chunk_size=chunk_size)
        else:
            jacfunc.random_projection(module, 64, out=out, chunk_size=chunk_size)(x)

    shape = (5, 5, 3, 3) if api == "ntk" else (5, 3, 64)
    for chunk_size in (None, 2):
        words = rf"{api}: out must have the shapes of the result, got \(1,.*\) for \(5, .*Pass what"
        with pytest.raises(ValueError, match=words):
            call(torch.zeros(1, *shape[1:]), chunk_size)
        with pytest.raises(ValueError, match=f"{api}: out must have the structure of the result"):
            call({"a": torch.zeros(shape)}, chunk_size)
    with pytest.raises(TypeError, match=f"{api}: out must be a tree of tensors, got list"):
        call([1.0])
    with pytest.raises(ValueError, match=f"{api}: out must be plain tensors outside all"):
        call(torch.zeros(shape, requires_grad=True))


def test_parameters_of_a_kernel_are_selected() -> None:
    module, x, _ = problem(5)
    rows = looped(module, x, ["head.weight", "head.bias", "scale"])
    expected = torch.einsum("amp,bnp->abmn", rows, rows)
    chosen = ["head.*", "scale"]
    torch.testing.assert_close(jacfunc.ntk(module, None, x, select=chosen), expected)
    torch.testing.assert_close(jacfunc.ntk(module, chosen, x), expected)
    some = {n: p for n, p in module.named_parameters() if n == "scale" or "head" in n}
    torch.testing.assert_close(jacfunc.ntk(module, None, x, select=some), expected)
    words = r"ntk: parameters of a module must be selected once, got 'head\.\*' .*Pass None in"
    with pytest.raises(ValueError, match=words):
        jacfunc.ntk(module, "head.*", x, select="scale")
    with pytest.raises(ValueError, match=r"ntk: select must match trainable .* got 'nose\.\*'"):
        jacfunc.ntk(module, None, x, select="nose.*")
    with pytest.raises(ValueError, match="ntk: select must be left out for a function, got 'a'"):
        jacfunc.ntk(lambda p, x: p @ x, torch.ones(3), torch.ones(2, 3), select="a")


def test_blocks_of_one_row_are_of_one_row_under_a_budget() -> None:
    module, x, _ = problem(3)
    stream = jacfunc.stream_jacobian(module, "rows", chunk_size=1, memory="1 MiB")
    assert [rows.stop - rows.start for rows, _ in stream(x)] == [1] * 9
