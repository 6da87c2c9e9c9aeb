"""jacfunc.vmap: torch's, on every tree."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import jacfunc
from tests.kinds.problems import GlobalState, ModelOutput, Pair, State
from tests.truth.oracles import assert_same

X = torch.arange(6.0).reshape(2, 3)
Y = torch.arange(12.0).reshape(2, 3, 2)


def total(x: Tensor, y: Tensor) -> Tensor:
    return x.sum() + y.sum(0)


@pytest.mark.parametrize(
    "in_dims", [0, (0, 0), (1, 1), (-1, 1), (None, 0), (0, None), [0, 0]], ids=str
)
@pytest.mark.parametrize("out_dims", [0, -1])
def test_same_as_torch_on_tensors(in_dims: Any, out_dims: int) -> None:
    wanted = torch.vmap(total, tuple(in_dims) if isinstance(in_dims, list) else in_dims, out_dims)
    assert_same(jacfunc.vmap(total, in_dims, out_dims)(X, Y), wanted(X, Y))


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_give_the_same(chunk_size: int) -> None:
    xs = torch.randn(5, 3)
    assert_same(jacfunc.vmap(torch.sin, chunk_size=chunk_size)(xs), xs.sin(), rtol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        Pair,
        State,
        GlobalState,
        lambda a, b: ModelOutput(z=a, a=b),
        lambda a, b: OrderedDict(z=a, a=b),
        lambda a, b: {"z": a, "a": b},
        lambda a, b: [a, (b, None)],
    ],
    ids=["namedtuple", "dataclass", "global", "torch_registered", "ordered", "dict", "nested"],
)
def test_trees_come_back_as_they_went_in(kind: Any) -> None:
    tree = kind(X, Y)
    assert_same(jacfunc.vmap(lambda t: t)(tree), tree)


def test_in_dims_may_be_a_tree_that_is_a_prefix() -> None:
    tree = {"x": X, "rest": (Y, Y)}
    func = lambda t: t["x"].sum() + t["rest"][0].sum() * t["rest"][1].sum()  # noqa: E731
    result = jacfunc.vmap(func, in_dims=({"x": 0, "rest": 1},))({"x": X.T[:3], "rest": (Y, Y)})
    want = torch.stack([X.T[b].sum() + Y[:, b].sum() ** 2 for b in range(3)])
    assert_same(result, want)
    assert_same(jacfunc.vmap(func, in_dims=(0,))(tree), jacfunc.vmap(func)(tree))


def test_none_in_a_tree_of_in_dims_holds_its_leaf() -> None:
    result = jacfunc.vmap(lambda t: t["x"] + t["shift"], in_dims=({"x": 0, "shift": None},))(
        {"x": X, "shift": torch.ones(3)}
    )
    assert_same(result, X + 1)


def test_leaves_that_are_no_tensors_ride_along() -> None:
    func = lambda t: getattr(torch, t["name"])(t["x"]) * t["scale"]  # noqa: E731
    result = jacfunc.vmap(func)({"x": X, "name": "sin", "scale": 2, "nothing": None})
    assert_same(result, 2 * X.sin())


def test_integer_tensors_are_mapped() -> None:
    index = torch.tensor([2, 0])
    assert jacfunc.vmap(lambda x, i: x.gather(0, i[None])[0])(X, index).tolist() == [2.0, 3.0]


def test_keyword_arguments_are_mapped() -> None:
    result = jacfunc.vmap(lambda x, *, y: x.sum() + y)(X, y=torch.tensor([10.0, 20.0]))
    assert result.tolist() == [13.0, 32.0]


def test_out_dims_may_be_a_tree() -> None:
    result = jacfunc.vmap(lambda x: {"a": x, "b": x}, out_dims={"a": 0, "b": 1})(X)
    assert_same(result, {"a": X, "b": X.T})


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness_is_torchs(randomness: str) -> None:
    draws = jacfunc.vmap(lambda x: torch.rand(5), randomness=randomness)(X)
    assert torch.equal(draws[0], draws[1]) == (randomness == "same")


def test_random_functions_are_refused_by_default() -> None:
    with pytest.raises(RuntimeError, match="random"):
        jacfunc.vmap(lambda x: torch.rand(5))(X)


def test_nests() -> None:
    want = torch.vmap(torch.vmap(torch.sin))(Y)
    assert_same(jacfunc.vmap(jacfunc.vmap(torch.sin))(Y), want)


def test_name_and_docstring_of_the_function_stay() -> None:
    assert jacfunc.vmap(total).__name__ == "total"
    assert jacfunc.jacrev(total).__name__ == "total"


def test_in_dims_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"vmap: in_dims must be an int or .*got \{'x': 0\}"):
        jacfunc.vmap(total, in_dims={"x": 0})(X, Y)


def test_in_dims_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"vmap: in_dims must have one entry .* 2 .*got 1"):
        jacfunc.vmap(total, in_dims=(0,))(X, Y)


def test_outputs_that_are_no_tensors() -> None:
    with pytest.raises(TypeError, match=r"vmap: func must return tensors, got float"):
        jacfunc.vmap(lambda x: 1.0)(X)


@pytest.mark.parametrize("out_dims", [2, -3, None, "x"], ids=str)
def test_out_dims_that_do_not_fit(out_dims: Any) -> None:
    with pytest.raises(ValueError, match=r"vmap: out_dims must be dimensions of the outputs, got"):
        jacfunc.vmap(lambda x: x, out_dims=out_dims)(X)


def test_sizes_that_differ_are_torchs_error() -> None:
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        jacfunc.vmap(total)(X, torch.ones(5, 1))


# --- what torch can't vmap goes one by one ---


def branches(x):
    return x.sin() if x.sum().item() > 0 else x.cos()


POINTS = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.5, 0.1]], dtype=torch.float64)


def test_data_dependent_functions_are_looped_and_the_log_says_so(caplog):
    with caplog.at_level("INFO", "jacfunc"):
        mapped = jacfunc.vmap(branches)(POINTS)
    assert torch.equal(mapped, torch.stack([branches(x) for x in POINTS]))
    assert "func does not run under vmap, samples go one by one" in caplog.text


@pytest.mark.parametrize("derive", [jacfunc.jacrev, jacfunc.jacobian, jacfunc.hessian])
def test_derivatives_of_data_dependent_functions(derive):
    expected = torch.stack([derive(branches)(x) for x in POINTS])
    torch.testing.assert_close(jacfunc.vmap(derive(branches))(POINTS), expected)
    in_chunks = jacfunc.vmap(derive(branches), chunk_size=2)(POINTS)
    torch.testing.assert_close(in_chunks, expected)


def test_looped_samples_keep_to_in_dims_and_out_dims():
    def func(x, y):
        return x * y if y.sum().item() > 0 else x

    scale = torch.ones(2, dtype=torch.float64)
    mapped = jacfunc.vmap(func, in_dims=(1, None), out_dims=1)(POINTS.T, scale)
    assert torch.equal(mapped, POINTS.T)


def test_an_error_of_the_function_is_its_own():
    def wrong(x):
        return torch.ones(3) @ x

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        jacfunc.vmap(wrong)(torch.ones(4, 2))


def noisy(x):
    return x + torch.rand(()) if x.sum().item() != 0 else x


def test_random_functions_draw_as_the_word_says_when_looped():
    x = torch.ones(4, 2)
    with pytest.raises(NotImplementedError, match=r"vmap: .* randomness='error'. Pass randomness="):
        jacfunc.vmap(noisy)(x)
    same = jacfunc.vmap(noisy, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    different = jacfunc.vmap(noisy, randomness="different")(x)
    assert len(different.unique()) == 4


def test_random_functions_are_refused_with_advice_when_vmapped():
    with pytest.raises(NotImplementedError, match=r"vmap: .*Pass randomness='same'"):
        jacfunc.vmap(torch.nn.functional.dropout)(torch.ones(4, 2))


@pytest.mark.parametrize("in_dims", [0, 1])
def test_an_empty_batch(in_dims: int) -> None:
    """As of torch's own vmap: the shapes of outputs, without samples."""
    x = torch.ones(0, 3) if in_dims == 0 else torch.ones(3, 0)
    found = jacfunc.vmap(jacfunc.jacrev(torch.sin), in_dims=in_dims)(x)
    expected = torch.vmap(torch.func.jacrev(torch.sin), in_dims=in_dims)(x)
    assert found.shape == expected.shape == (0, 3, 3)
    trees = jacfunc.vmap(lambda x: {"a": x.sum(), "b": (x, x)}, in_dims)(x)
    assert trees["a"].shape == (0,)
    assert trees["b"][0].shape == (0, 3)


def test_an_empty_batch_of_what_can_not_be_vmapped() -> None:
    with pytest.raises(NotImplementedError, match=r"^vmap: .*no sample is there.*\. Use other"):
        jacfunc.vmap(lambda x: x * x.sum().item())(torch.ones(0, 3))
