"""Random functions, trees, shapes, argnums, strategies and chunks against the looped oracle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jacfunc
from tests.kinds.problems import Pair, State
from tests.truth.laws import adjoint_identity
from tests.truth.oracles import (
    assert_same,
    float_leaves,
    looped_hessian,
    looped_jacobian,
    tree_map,
)

DTYPE = torch.float64
MODEST = settings(deadline=None, max_examples=200, derandomize=True, database=None)
FEW = settings(MODEST, max_examples=80)

# --- values of every shape and stride ---

SHAPES = st.sampled_from([(), (1,), (3,), (0,), (2, 2), (1, 3), (2, 0), (2, 1, 2)])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


def tensor_of(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed" and shape:
        backwards = torch.randn(shape[::-1], generator=generator, dtype=DTYPE)
        return backwards.permute(*reversed(range(len(shape))))
    if layout == "strided" and shape:
        wide = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator, dtype=DTYPE)
        return wide[..., ::2]
    if layout == "expanded" and shape:
        return torch.randn((1, *shape[1:]), generator=generator, dtype=DTYPE).expand(shape)
    return torch.randn(shape, generator=generator, dtype=DTYPE)


TENSORS = st.builds(tensor_of, SHAPES, LAYOUTS, st.integers(0, 99))
CONSTANTS = st.sampled_from([None, 3, "word", torch.tensor([1, 2]), torch.tensor(True)])


def containers(children: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.tuples(children),
        st.tuples(children, children),
        st.lists(children, min_size=1, max_size=2),
        st.builds(Pair, children, children),
        st.builds(State, children, children),
        st.builds(lambda b, a: {"b": b, "a": a}, children, children),
        st.builds(lambda z, a: OrderedDict(z=z, a=a), children, children),
    )


TREES = st.recursive(TENSORS | CONSTANTS, containers, max_leaves=3).filter(float_leaves)

# --- functions: chains of links, of one tensor to one tensor ---

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "square": torch.square,
    "cumsum": lambda x: x.reshape(-1).cumsum(0),
    "softmax": lambda x: torch.softmax(x.reshape(-1), 0),
    "sum": torch.sum,
    "first_half": lambda x: x.reshape(-1)[: x.numel() // 2],
    "doubled": lambda x: torch.cat([x.reshape(-1), x.reshape(-1) * 2]),
    "outer": lambda x: torch.outer(x.reshape(-1), x.reshape(-1)[:2]),
    "flip": lambda x: x.reshape(-1).flip(0),
    "gathered": lambda x: x.reshape(-1)[[-1, 0]] if x.numel() else x,
    "in_place": lambda x: x.clone().mul_(x).add_(1),
    "view": lambda x: x.unsqueeze(0),
    "half_detached": lambda x: x * x.detach(),
    "where": lambda x: torch.where(x > 0, x**3, -x),
    "normalized": lambda x: x / (1 + x.square().sum()),
}
CHAINS = st.lists(st.sampled_from(sorted(LINKS)), min_size=0, max_size=3)
OUTPUTS = st.sampled_from(["tensor", "tuple", "dict", "with_constant", "with_integer"])


def run(chain: list[str], x: Tensor) -> Tensor:
    for name in chain:
        x = LINKS[name](x)
    return x


def function_of(chain: list[str], output: str) -> Callable[..., Any]:
    """A function of any trees: each leaf through the chain, coupled by a sum over all leaves."""

    def func(*args: Any) -> Any:
        leaves = float_leaves(args)
        coupling = sum(leaf.sum() for leaf in leaves)
        results = [run(chain, leaf) * (1 + coupling) for leaf in leaves]
        if output == "tensor":
            return results[0]
        if output == "tuple":
            return tuple(results)
        if output == "dict":
            return {"z": results[-1], "a": [results[0].sum(), None]}
        beside = torch.ones(2, dtype=DTYPE) if output == "with_constant" else torch.tensor(7)
        return results[0], beside

    return func


FUNCTIONS = st.builds(function_of, CHAINS, OUTPUTS)

# --- ways to ask ---

SIZES = st.one_of(st.none(), st.integers(1, 7))
STRATEGIES = st.one_of(
    st.builds(jacfunc.Reverse, SIZES),
    st.builds(jacfunc.Forward, SIZES),
    st.builds(jacfunc.Looped, st.sampled_from(["rows", "columns"])),
    st.just("auto"),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Any, ...], Any]:
    """Arguments and argnums that fit them."""
    args = tuple(draw(st.lists(TREES, min_size=1, max_size=3)))
    positions = st.integers(0, len(args) - 1)
    chosen = draw(st.one_of(positions, st.lists(positions, min_size=1, max_size=3, unique=True)))
    if isinstance(chosen, int):
        return args, draw(st.sampled_from([chosen, chosen - len(args)]))
    return args, tuple(draw(st.sampled_from([n, n - len(args)])) for n in chosen)


@MODEST
@given(func=FUNCTIONS, call=calls(), strategy=STRATEGIES)
def test_jacobian_is_the_looped_one(func: Any, call: Any, strategy: Any) -> None:
    args, argnums = call
    result = jacfunc.jacobian(func, argnums, strategy=strategy)(*args)
    assert_same(result, looped_jacobian(func, args, argnums))


@MODEST
@given(func=FUNCTIONS, call=calls(), size=SIZES)
def test_jacrev_and_jacfwd_agree(func: Any, call: Any, size: int | None) -> None:
    args, argnums = call
    rows = jacfunc.jacrev(func, argnums, chunk_size=size)(*args)
    columns = jacfunc.jacfwd(func, argnums, chunk_size=size)(*args)
    assert_same(rows, columns)


@FEW
@given(func=FUNCTIONS, call=calls(), strategy=STRATEGIES)
def test_value_and_jacobian_are_those_of_func(func: Any, call: Any, strategy: Any) -> None:
    args, argnums = call
    derive = jacfunc.value_and_jacobian(func, argnums, strategy=strategy)
    value, jacobian = derive(*args)
    assert_same(value, func(*args))
    assert_same(jacobian, looped_jacobian(func, args, argnums))


@FEW
@given(func=FUNCTIONS, tree=TREES)
def test_products_are_adjoint(func: Any, tree: Any) -> None:
    pushed, pulled = adjoint_identity(func, tree)
    torch.testing.assert_close(pushed, pulled, rtol=1e-9, atol=1e-9)


@FEW
@given(chain=CHAINS, x=TENSORS, strategy=STRATEGIES)
def test_hessian_is_the_looped_one(chain: list[str], x: Tensor, strategy: Any) -> None:
    def func(x: Tensor) -> Tensor:
        return run(chain, x) * (1 + x.sum())

    result = jacfunc.hessian(func, strategy=strategy)(x)
    assert_same(result, looped_hessian(func, (x,)), rtol=1e-8, atol=1e-8)


@FEW
@given(chain=CHAINS, shape=SHAPES, batch=st.integers(1, 3), strategy=STRATEGIES)
def test_vmapped_jacobian_is_the_stack(
    chain: list[str], shape: tuple[int, ...], batch: int, strategy: Any
) -> None:
    xs = tensor_of((batch, *shape), "contiguous", 1)

    def func(x: Tensor) -> Tensor:
        return run(chain, x) * (1 + x.sum())

    result = jacfunc.vmap(jacfunc.jacobian(func, strategy=strategy))(xs)
    assert_same(result, torch.stack([looped_jacobian(func, (x,)) for x in xs]))


@FEW
@given(func=FUNCTIONS, call=calls(), strategy=STRATEGIES)
def test_arguments_and_random_state_stay(func: Any, call: Any, strategy: Any) -> None:
    args, argnums = call
    before = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    state = torch.get_rng_state()
    jacfunc.jacobian(func, argnums, strategy=strategy)(*args)
    for now, then in zip(float_leaves(args), float_leaves(before), strict=True):
        assert torch.equal(now, then)
        assert not now.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@FEW
@given(call=calls(), data=st.data())
def test_repeated_argnums_are_refused(call: Any, data: st.DataObject) -> None:
    args, argnums = call
    chosen = (argnums,) if isinstance(argnums, int) else argnums
    again = data.draw(st.sampled_from(chosen))
    other_name = again + len(args) if again < 0 else again - len(args)
    repeated = (*chosen, data.draw(st.sampled_from([again, other_name])))
    with pytest.raises(ValueError, match="argnums must be unique"):
        jacfunc.jacobian(lambda *args: float_leaves(args)[0], repeated)(*args)
