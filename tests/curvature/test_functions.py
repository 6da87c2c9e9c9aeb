"""Curvature of functions of a tree of parameters and a batch, against loops of autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from tests.truth.oracles import assert_same, float_leaves, place
from tests.truth.params import CASES, NETWORK, B, affine, like, nested, numbers, of_layers, rows_of

EVERY_CASE = pytest.mark.parametrize("name", CASES)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


class Posed(NamedTuple):
    func: Callable[[Any, Tensor], Tensor]
    params: Any
    x: Tensor
    y: Tensor
    rows: Tensor  # [B, 2, P]

    @property
    def matrix(self) -> Tensor:
        """Of half the squared error, whose second derivative is the identity."""
        flat = self.rows.flatten(0, 1)
        return flat.T @ flat

    @property
    def gradients(self) -> Tensor:
        """``[B, P]``, of half the squared error."""
        errors = (self.func(self.params, self.x) - self.y).detach()
        return torch.einsum("bm,bmp->bp", errors, self.rows)

    def tree(self, flat: Tensor) -> Any:
        """The tree of numbers in a row."""
        return place(self.params, like(self.params, flat))


def posed(name: str) -> Posed:
    torch.manual_seed(0)
    case = CASES[name]
    params, x, y = case.params(), numbers(B, 3), numbers(B, 2)
    return Posed(case.func, params, x, y, rows_of(case, params, x))


def of_module(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(module, params, (x,))
        return out

    return func


# --- answers ---


@EVERY_CASE
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"memory": "1 MiB"}, {"copy": False}])
def test_gauss_newton_has_the_tree_of_the_parameters(name: str, options: dict[str, Any]) -> None:
    at = posed(name)
    found = jacfunc.ggn(at.func, half_square, **options)(at.params, at.x, at.y)
    assert_same(found.diagonal(), at.tree(at.matrix.diagonal()))
    torch.testing.assert_close(found.matrix(), at.matrix)
    sizes = [leaf.numel() for leaf in float_leaves(at.params)]
    blocks = [part.split(sizes, 1)[n] for n, part in enumerate(at.matrix.split(sizes))]
    assert_same(found.blocks(), place(at.params, blocks))
    for _ in range(2):
        vector = torch.randn(sum(sizes), dtype=torch.float64)
        assert_same(found @ at.tree(vector), at.tree(at.matrix @ vector))


@EVERY_CASE
def test_fisher_of_a_function_is_that_of_its_draws(name: str) -> None:
    at = posed(name)
    noise = torch.randn(3, B, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = torch.einsum("kbm,bmp->kbp", noise, at.rows).flatten(0, 1)
    generator = torch.Generator().manual_seed(3)
    found = jacfunc.fisher(at.func, "gaussian", draws=3, reduction="sum", generator=generator)(
        at.params, at.x
    )
    torch.testing.assert_close(found.matrix(), drawn.T @ drawn / 3)
    assert_same(found.diagonal(), at.tree(drawn.square().sum(0) / 3))


@pytest.mark.parametrize("name", [name for name in CASES if name != "keys with dots"])
def test_gradient_norms_and_projections(name: str) -> None:
    at = posed(name)
    norms = jacfunc.gradient_norms(at.func, half_square)(at.params, at.x, at.y)
    torch.testing.assert_close(norms, at.gradients.norm(dim=1))
    # parameters of these names are projected by the same signs, whatever the function
    sizes = [leaf.numel() for leaf in float_leaves(at.params)]
    signs = jacfunc.random_projection(lambda p, x: flat_of(p).expand(len(x), -1), 7)(
        dict(zip(CASES[name].names, torch.zeros(sum(sizes)).split(sizes), strict=True)),
        torch.ones(1, 1),
    )[0]
    assert (signs.abs() - 7**-0.5).abs().max() < 1e-6
    features = jacfunc.random_projection(at.func, 7)(at.params, at.x)
    torch.testing.assert_close(features, at.rows @ signs.double(), rtol=1e-6, atol=1e-6)
    of_gradients = jacfunc.random_projection(at.func, 7, half_square)(at.params, at.x, at.y)
    torch.testing.assert_close(of_gradients, at.gradients @ signs.double(), rtol=1e-6, atol=1e-6)


def flat_of(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([param.flatten() for param in params.values()])


def test_a_function_of_a_module_gives_what_the_module_gives() -> None:
    """Names of parameters are those of the module, so that projections are equal, too."""
    params, x = dict(NETWORK.named_parameters()), numbers(B, 3)
    func = of_module(NETWORK)
    expected = jacfunc.random_projection(NETWORK, 9)(x)
    assert torch.equal(jacfunc.random_projection(func, 9)(params, x), expected)


def test_some_parameters_are_named_by_their_paths() -> None:
    at = posed("nested")
    start, stop = 16, 24  # of the second layer's weight
    G = jacfunc.ggn(at.func, half_square, select="layers.1.*")(at.params, at.x, at.y)
    part = at.matrix[start:stop, start:stop]
    torch.testing.assert_close(G.matrix(), part)
    leaves: list[Any] = [None, None, part.diagonal().view(2, 4), None]
    assert_same(G.diagonal(), place(at.params, leaves))
    leaves[2] = (part @ part.diagonal()).view(2, 4)
    assert_same(G @ G.diagonal(), place(at.params, leaves))
    norms = jacfunc.gradient_norms(at.func, half_square, select=["layers.1.weight"])
    torch.testing.assert_close(
        norms(at.params, at.x, at.y), at.gradients[:, start:stop].norm(dim=1)
    )


class Called:
    """A function with a network beside it, as an object and as a method."""

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.method(params, x)

    def method(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(NETWORK, params, (x,))
        return out


class Holding(nn.Module):
    """A module with a method that takes the parameters of another one inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NETWORK

    def method(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.inner, params, (x,))
        return out


def scaled(params: dict[str, Tensor], x: Tensor, scale: float) -> Tensor:
    return of_module(NETWORK)(params, x) * scale


KINDS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any]]] = {
    "an object": (Called(), lambda x: (x,)),
    "a method": (Called().method, lambda x: (x,)),
    "a method of a module": (Holding().method, lambda x: (x,)),
    "a partial": (partial(scaled, scale=1.0), lambda x: (x,)),
    "functional_call itself": (partial(functional_call, NETWORK), lambda x: ((x,),)),
    "samples under vmap": (
        lambda p, x: torch.vmap(lambda one: functional_call(NETWORK, p, (one.unsqueeze(0),))[0])(x),
        lambda x: (x,),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_can_be_called(name: str) -> None:
    func, arguments = KINDS[name]
    params, x, y = dict(NETWORK.named_parameters()), numbers(B, 3), numbers(B, 2)
    expected = jacfunc.gradient_norms(NETWORK, half_square)(x, y)
    norms = jacfunc.gradient_norms(func, half_square)
    torch.testing.assert_close(norms(params, *arguments(x), y), expected)


def test_inputs_by_keyword_and_samples_behind() -> None:
    params, x, y = dict(NETWORK.named_parameters()), numbers(B, 3), numbers(B, 2)
    expected = jacfunc.gradient_norms(NETWORK, half_square)(x, y)
    norms = jacfunc.gradient_norms(lambda p, x: of_module(NETWORK)(p, x.T), half_square, in_dims=1)
    torch.testing.assert_close(norms(params, x.T, y), expected)
    by_name = jacfunc.gradient_norms(of_module(NETWORK), half_square)
    torch.testing.assert_close(by_name(params, y, x=x), expected)


# --- calls after each other ---


class Convolutions(TorchDispatchMode):
    """Counts evaluations of the network, each of which has one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.startswith("convolution.")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_opened_once", [True, False])
@pytest.mark.parametrize("select", [None, "4.*"])
def test_other_tensors_at_every_call(is_opened_once: bool, select: str | None) -> None:
    """As in a training loop: answers are of the present ones; what was learned is not forgotten."""
    case = CASES["functional_call"]
    chosen = slice(None) if select is None else slice(6, None)

    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return case.func(params, x)

    def opened() -> Callable[..., Tensor]:
        return jacfunc.gradient_norms(func, half_square, select=select)

    norms, x, y, counts = opened(), numbers(B, 3), numbers(B, 2), []
    for _ in range(7):
        params = {name: torch.randn_like(p).detach() for name, p in case.params().items()}
        rows = rows_of(case, params, x)
        errors = (func(params, x) - y).detach()
        with Convolutions() as counter:
            found = (norms if is_opened_once else opened())(params, x, y)
        counts.append(counter.count)
        expected = torch.einsum("bm,bmp->bp", errors, rows)[:, chosen].norm(dim=1)
        torch.testing.assert_close(found, expected)
    assert [counts[2], *counts[4:]] == [1, 1, 1, 1]  # batches are compared at 1, 2, 4, 8, …


def test_what_is_written_into_parameters_is_seen_by_the_next_call() -> None:
    params, x, y = {"w": numbers(3, 2), "b": numbers(2)}, numbers(B, 3), numbers(B, 2)
    door = jacfunc.ggn(affine, half_square)
    before = door(params, x, y)
    expected = before.diagonal()["w"].clone()
    params["w"].mul_(2)
    after = door(params, x, y)
    fresh = jacfunc.ggn(lambda p, x: affine(p, x), half_square)(params, x, y)
    torch.testing.assert_close(after.matrix(), fresh.matrix())
    assert not torch.allclose(after.diagonal()["w"], expected)
    torch.testing.assert_close(before.matrix().diagonal()[:6], expected.flatten())
    torch.testing.assert_close(
        (before @ before.diagonal())["w"].flatten(),
        (before.matrix() @ flat_of(before.diagonal()))[:6],
    )


def test_without_copies_written_parameters_are_refused() -> None:
    params, x, y = {"w": numbers(3, 2), "b": numbers(2)}, numbers(B, 3), numbers(B, 2)
    G = jacfunc.ggn(affine, half_square, copy=False)(params, x, y)
    G.diagonal()
    params["b"] = numbers(2)  # another tensor in the dict is not the one that was given
    G.diagonal()
    params["w"].mul_(2)
    with pytest.raises(ValueError, match="ggn: with copy=False parameters, buffers, data"):
        G.diagonal()


def test_constants_of_the_tree_are_those_of_the_call() -> None:
    params, x, y = nested(), numbers(B, 3), numbers(B, 2)
    door = jacfunc.ggn(of_layers, half_square)
    first = door(params, x, y)
    params["times"] = 6.0
    params["index"].add_(1)
    torch.testing.assert_close(door(params, x, y).matrix()[:-1, :-1], 9 * first.matrix()[:-1, :-1])
    torch.testing.assert_close(
        first.matrix().diagonal()[:12].view(4, 3), first.diagonal()["layers"][0].weight
    )


def test_nothing_is_kept_of_a_call() -> None:
    """Neither parameters, nor the function once nobody else has it, nor what it refers to."""
    network = nn.Linear(3, 2).double()
    func = of_module(network)
    door, x, y = jacfunc.ggn(func, half_square), numbers(B, 3), numbers(B, 2)
    for _ in range(3):
        params = {name: torch.randn_like(p).detach() for name, p in network.named_parameters()}
        G = door(params, x, y)
        G.diagonal()
        G @ params
    marks = [ref(params["weight"]), ref(x)]
    del params, x, G
    gc.collect()
    assert [mark() for mark in marks] == [None, None]
    marks = [ref(func), ref(network)]
    del door, func, network
    gc.collect()
    assert [mark() for mark in marks] == [None, None]


# --- what a function refers to ---


class Counting(nn.Module):
    """Counts its calls in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.register_buffer("count", torch.zeros(()))
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls[0] += 1
        return torch.tanh(self.layer(x))


def test_a_module_that_the_function_calls_is_left_as_it_was() -> None:
    module, x, y = Counting(), numbers(B, 3), numbers(B, 2)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    func = of_module(module)
    G = jacfunc.ggn(func, half_square)(params, x, y)
    G.diagonal()
    G @ params
    assert (float(module.count), module.calls) == (0.0, [0])
    assert all(p.grad is None and isinstance(p, nn.Parameter) for p in module.parameters())
    torch.testing.assert_close(G.matrix(), jacfunc.ggn(module, half_square)(x, y).matrix())


def test_modes_of_a_module_that_the_function_calls() -> None:
    """When one changes, batches are compared again."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    params, x, y = dict(model.named_parameters()), numbers(B, 3), numbers(B, 2)
    norms = jacfunc.gradient_norms(of_module(model), half_square)
    for _ in range(3):
        torch.testing.assert_close(
            norms(params, x, y), jacfunc.gradient_norms(model, half_square)(x, y)
        )
    model.train()
    with pytest.raises(ValueError, match="gradient_norms: per_sample needs samples that do not"):
        norms(params, x, y)
    assert int(model[1].num_batches_tracked) == 0


def test_a_function_must_not_write_into_its_parameters() -> None:
    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        params["b"].mul_(2)
        return affine(params, x)

    params, x, y = {"w": numbers(3, 2), "b": numbers(2)}, numbers(B, 3), numbers(B, 2)
    before = params["b"].clone()
    with pytest.raises(RuntimeError, match="ggn: a parameter must be read alone"):
        jacfunc.ggn(func, half_square, select="w", copy=False)(params, x, y).diagonal()
    assert torch.equal(params["b"], before)
    doubled = jacfunc.ggn(func, half_square)(params, x, y).diagonal()["w"]
    twice = {"w": params["w"], "b": 2 * before}
    torch.testing.assert_close(
        doubled, jacfunc.ggn(affine, half_square)(twice, x, y).diagonal()["w"]
    )
    assert torch.equal(params["b"], before)


def test_masks_are_the_same_in_all_answers() -> None:
    def func(params: Tensor, x: Tensor) -> Tensor:
        return F.dropout(torch.sin(x @ params), 0.5)

    params, x, y = numbers(3, 2), numbers(B, 3), numbers(B, 2)
    G = jacfunc.ggn(func, half_square, randomness="different")(params, x, y)
    torch.testing.assert_close(G.matrix().diagonal(), G.diagonal().flatten())
    vector = numbers(3, 2)
    torch.testing.assert_close((G @ vector).flatten(), G.matrix() @ vector.flatten())
    with pytest.raises(NotImplementedError, match=r"ggn: .*randomness"):
        jacfunc.ggn(func, half_square)(params, x, y).diagonal()


def test_under_inference_and_without_gradients() -> None:
    at = posed("a dict")
    with torch.inference_mode():
        params = {name: param.clone() for name, param in at.params.items()}
        inside = jacfunc.ggn(at.func, half_square)(params, at.x, at.y).matrix()
    outside = jacfunc.ggn(at.func, half_square)(params, at.x, at.y).matrix()
    with torch.no_grad():
        without = jacfunc.ggn(at.func, half_square)(at.params, at.x, at.y).matrix()
    for found in (inside, outside, without):
        torch.testing.assert_close(found, at.matrix)


# --- refusals ---


X, Y, W = torch.linspace(-1, 1, 6).view(2, 3), torch.ones(2, 2), torch.ones(3, 2)
REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a class": (
        lambda: jacfunc.ggn(nn.Linear, half_square),
        TypeError,
        "ggn: module must be an nn.Module or a function, got Linear",
    ),
    "no function": (
        lambda: jacfunc.gradient_norms(3, half_square),  # type: ignore[arg-type]
        TypeError,
        "gradient_norms: module must be an nn.Module or a function, got int",
    ),
    "no parameters": (
        lambda: jacfunc.ggn(affine, half_square)(X, Y),
        TypeError,
        "ggn: a function must be called with its parameters and inputs, got 1 beside targets",
    ),
    "nothing": (
        lambda: jacfunc.fisher(affine, "gaussian")(),
        TypeError,
        "fisher: a function must be called with its parameters and inputs, got 0",
    ),
    "integers": (
        lambda: jacfunc.random_projection(affine, 3)({"w": torch.arange(3)}, X),
        TypeError,
        "random_projection: params must hold at least one floating point tensor",
    ),
    "complex": (
        lambda: jacfunc.ggn(affine, half_square)(
            {"w": W.to(torch.complex64), "b": Y[0]}, X, Y
        ).diagonal(),
        NotImplementedError,
        r"ggn: inputs must be real, got torch\.complex64",
    ),
    "a name that matches nothing": (
        lambda: jacfunc.ggn(affine, half_square, select="v")({"w": W, "b": Y[0]}, X, Y),
        ValueError,
        "ggn: select must match trainable parameters, got 'v'",
    ),
    "a vector of another structure": (
        lambda: jacfunc.ggn(affine, half_square)({"w": W, "b": Y[0]}, X, Y) @ {"w": W},
        ValueError,
        "ggn: vector must have the structure of the parameters, got one where vector is a dict of",
    ),
    "a tensor for a tree": (
        lambda: jacfunc.ggn(affine, half_square)({"w": W, "b": Y[0]}, X, Y) @ W,
        ValueError,
        "ggn: vector must have the structure of the parameters, got one where vector is Tensor",
    ),
    "a vector with more than is chosen": (
        lambda: (
            jacfunc.ggn(affine, half_square, select="w")({"w": W, "b": Y[0]}, X, Y)
            @ {"w": W, "b": Y[0]}
        ),
        ValueError,
        "ggn: vector must have the structure .* where vector has something for b",
    ),
    "another shape": (
        lambda: jacfunc.ggn(affine, half_square)({"w": W, "b": Y[0]}, X, Y) @ {"w": W, "b": W},
        ValueError,
        "ggn: vector must match in shape",
    ),
    "a tensor for names": (
        lambda: jacfunc.ggn(nn.Linear(3, 2), half_square)(X, Y) @ W,  # type: ignore[operator]
        TypeError,
        "ggn: vector must be a dict of tensors by the names of parameters, got Tensor",
    ),
    "samples that depend on each other": (
        lambda: jacfunc.gradient_norms(lambda p, x: x @ p - (x @ p).mean(0), half_square)(W, X, Y),
        ValueError,
        "gradient_norms: per_sample needs samples that do not depend on each other",
    ),
    "a transform": (
        lambda: torch.func.grad(
            lambda w: jacfunc.gradient_norms(lambda p, x: x @ p, half_square)(w, X, Y).sum()
        )(W),
        NotImplementedError,
        "gradient_norms: the graph of an evaluation must be kept",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    torch.manual_seed(0)
    call, error, words = REFUSALS[name]
    with pytest.raises(error, match=f"^{words}"):
        call()
