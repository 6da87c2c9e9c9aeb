"""Trees that belong together are matched by key, or refused with the place where they differ."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.problems import ModelOutput, Pair, State
from tests.truth.oracles import assert_same

ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)
TEN = torch.tensor(10.0)


def weighted(tree: Any) -> Tensor:
    """Of which d/da is 2 and d/db is 10."""
    return 2 * tree["a"] + 10 * tree["b"]


@pytest.mark.parametrize(
    "tangent",
    [
        {"a": ONE, "b": TWO},
        {"b": TWO, "a": ONE},
        OrderedDict(b=TWO, a=ONE),
        OrderedDict(a=ONE, b=TWO),
    ],
)
def test_tangents_are_matched_by_key(tangent: Any) -> None:
    for primal in ({"a": ONE, "b": ONE}, OrderedDict(a=ONE, b=ONE), {"b": ONE, "a": ONE}):
        _, pushed = jacfunc.jvp(weighted, (primal,), (tangent,))
        assert_same(pushed, torch.tensor(22.0))


def test_nested_tangents_are_matched_by_key() -> None:
    def func(tree: Any) -> Tensor:
        return weighted(tree["inner"][0]) * tree["scale"]

    primal = {"inner": [{"a": ONE, "b": ONE}], "scale": ONE}
    tangent = {"scale": torch.tensor(0.0), "inner": [{"b": TWO, "a": ONE}]}
    assert_same(jacfunc.jvp(func, (primal,), (tangent,))[1], torch.tensor(22.0))


def outputs(x: Tensor) -> dict[str, Tensor]:
    return {"a": 2 * x, "b": 10 * x}


@pytest.mark.parametrize("cotangent", [{"b": TWO, "a": ONE}, OrderedDict(b=TWO, a=ONE)])
def test_cotangents_are_matched_by_key(cotangent: Any) -> None:
    _, pull = jacfunc.vjp(outputs, ONE)
    assert_same(pull(cotangent), (torch.tensor(22.0),))


TREES = {
    "foreign key": ({"a": ONE, "b": ONE}, {"a": ONE, "c": ONE}, "a dict of 'a', 'c'"),
    "missing key": ({"a": ONE, "b": ONE}, {"a": ONE}, "a dict of 'a'"),
    "nesting": ({"a": ONE, "b": [ONE, ONE]}, {"a": [ONE, ONE], "b": ONE}, "Tensor"),
    "list": ((ONE, ONE), [ONE, ONE], "a list of 2, not a tuple of 2"),
    "length": ((ONE, ONE), (ONE,), "a tuple of 1, not a tuple of 2"),
    "none": ((ONE, None), (ONE, ONE), "Tensor, not NoneType"),
    "no none": ((ONE, ONE), (ONE, None), "None"),
    "namedtuple": (Pair(ONE, ONE), (ONE, ONE), "a tuple of 2, not a Pair of 2"),
    "dataclass": (State(ONE, ONE), {"position": ONE, "momentum": ONE}, "a dict .*, not State"),
    "registered": (ModelOutput(a=ONE, b=ONE), {"a": ONE, "b": ONE}, "a dict .*, not a ModelOutput"),
}
EVERY_MISMATCH = pytest.mark.parametrize(
    ("tree", "other", "words"), TREES.values(), ids=TREES.keys()
)


def sum_of(tree: Any) -> Tensor:
    return torch.stack(jacfunc._trees.flatten(tree)[0]).sum()


@EVERY_MISMATCH
def test_other_structures_are_refused(tree: Any, other: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^jvp: tangents .*{words}"):
        jacfunc.jvp(sum_of, (tree,), (other,))
    _, pull = jacfunc.vjp(lambda x: jacfunc._trees.map_tensors(lambda leaf: leaf * x, tree), ONE)
    with pytest.raises((ValueError, TypeError), match=rf"^vjp: cotangents .*{words}"):
        pull(other)


def test_the_place_is_named() -> None:
    primals = (ONE, {"x": [{"a": ONE}]})
    with pytest.raises(ValueError, match=r"where tangents\[1\]\['x'\]\[0\] is a dict of 'b'"):
        jacfunc.jvp(lambda x, tree: x, primals, (ONE, {"x": [{"b": ONE}]}))
    with pytest.raises(TypeError, match=r"jvp: tangents must be a tuple of 1, .* got Tensor"):
        jacfunc.jvp(torch.sin, (ONE,), ONE)
    with pytest.raises(TypeError, match=r"jvp: tangents must be a tuple of 1, .* got tuple"):
        jacfunc.jvp(weighted, ({"a": ONE, "b": ONE},), (ONE, ONE))


def test_a_container_is_no_tensor() -> None:
    _, pull = jacfunc.vjp(torch.sin, ONE)
    with pytest.raises(ValueError, match=r"^vjp: cotangents must match in shape, .* got list"):
        pull([ONE])
    with pytest.raises(ValueError, match=r"^jvp: tangents must match in shape, .* got list"):
        jacfunc.jvp(torch.sin, (ONE,), ([ONE],))


def test_constants_have_none_in_their_place() -> None:
    def func(tree: Any) -> dict[str, Tensor]:
        return {"count": torch.tensor(3), "y": tree["x"] * tree["n"]}

    primal = {"n": 3, "x": ONE}
    value, pushed = jacfunc.jvp(func, (primal,), ({"x": TWO, "n": None},))
    assert_same(pushed, {"count": None, "y": torch.tensor(6.0)})
    _, pull = jacfunc.vjp(func, primal)
    assert_same(pull({"y": TWO, "count": None}), ({"n": None, "x": torch.tensor(6.0)},))
    with pytest.raises(ValueError, match=r"where tangents\[0\]\['n'\] is a tensor, not None"):
        jacfunc.jvp(func, (primal,), ({"x": TWO, "n": ONE},))
    assert value["count"] == 3
    assert_same(pull(value), ({"n": None, "x": torch.tensor(9.0)},))  # with its integers


# --- vmap ---

ROWS = torch.arange(6.0).reshape(2, 3)


def test_mapped_dimensions_are_matched_by_key() -> None:
    tree = {"a": ROWS, "b": torch.ones(3, 2), "c": TEN}
    found = jacfunc.vmap(
        lambda t: t["a"] + t["b"] * t["c"], in_dims=({"c": None, "b": 1, "a": 0},)
    )(tree)
    assert_same(found, ROWS + 10)
    with pytest.raises(ValueError, match=r"vmap: in_dims .* args\[0\] is a dict of 'a', 'b', 'c'"):
        jacfunc.vmap(lambda t: t["a"], in_dims=({"a": 0, "b": 1},))(tree)
    with pytest.raises(ValueError, match=r"vmap: in_dims .* args\[0\] is a tuple of 1"):
        jacfunc.vmap(lambda t: t[0], in_dims=([0],))((ROWS,))


def test_dimensions_of_outputs_are_matched_by_key() -> None:
    func = jacfunc.vmap(lambda x: {"a": x, "b": 2 * x}, out_dims={"b": 1, "a": 0})
    assert_same(func(ROWS), {"a": ROWS, "b": 2 * ROWS.T})
    with pytest.raises(ValueError, match=r"vmap: out_dims .* out_dims is a dict of 'a', 'b'"):
        jacfunc.vmap(lambda x: {"a": x, "b": 2 * x}, out_dims={"a": 0})(ROWS)


def test_samples_that_go_one_by_one_are_matched_by_key() -> None:
    def func(x: Tensor) -> dict[str, Tensor]:
        if x.sum().item() > 5:  # which vmap refuses
            return {"b": -x, "a": x}
        return {"a": x, "b": -x}

    for chunk_size in (None, 1):
        found = jacfunc.vmap(func, chunk_size=chunk_size)(ROWS)
        assert_same(found, {"a": ROWS, "b": -ROWS})


def test_samples_of_different_structure_are_refused() -> None:
    def func(x: Tensor) -> Any:
        return {"a": x} if x.sum().item() > 5 else [x]

    for chunk_size in (None, 1):
        with pytest.raises(ValueError, match=r"vmap: func's output .* output is a dict of 'a'"):
            jacfunc.vmap(func, chunk_size=chunk_size)(ROWS)


# --- modules and results ---


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] * self.weight + batch["shift"]).sum(-1, keepdim=True)


def test_sample_dimensions_of_modules_are_matched_by_key() -> None:
    batch = {"x": ROWS, "shift": torch.ones(3)}
    jacobian = jacfunc.module_jacobian(
        Affine(), per_sample=True, in_dims=({"shift": None, "x": 0},)
    )
    assert_same(jacobian(batch)["weight"], ROWS.unsqueeze(1))
    wrong = jacfunc.module_jacobian(Affine(), per_sample=True, in_dims=({"y": 0},))
    with pytest.raises(ValueError, match=r"module_jacobian: in_dims .* input 0 is a dict"):
        wrong(batch)


def test_results_are_written_where_their_keys_are() -> None:
    def func(tree: Any) -> dict[str, Tensor]:
        return {"p": tree["a"] * 2, "q": tree["b"] * 3}

    at = {"a": torch.ones(2), "b": torch.ones(2)}
    want = jacfunc.jacrev(func)(at)
    out = {
        "q": {"b": torch.zeros(2, 2), "a": torch.zeros(2, 2)},
        "p": {"b": torch.zeros(2, 2), "a": torch.zeros(2, 2)},
    }
    found = jacfunc.jacrev(func, out=out)(at)
    for output in ("p", "q"):
        for name in ("a", "b"):
            assert_same(out[output][name], want[output][name])
            assert found[output][name] is out[output][name]


@pytest.mark.parametrize(
    "out",
    [
        {"p": {"a": torch.zeros(2, 2), "c": torch.zeros(2, 2)}},
        [torch.zeros(2, 2), torch.zeros(2, 2)],
    ],
)
def test_results_of_another_structure_are_refused(out: Any) -> None:
    at = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"jacrev: out must have the structure of the result"):
        jacfunc.jacrev(lambda tree: {"p": tree["a"] * tree["b"]}, out=out)(at)
