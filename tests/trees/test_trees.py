"""Trees: what is a node, what is a leaf, in which order, and where None goes."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, defaultdict
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

import jacfunc
from jacfunc._trees import (
    Split,
    broadcast_prefix,
    flatten,
    map_tensors,
    paths,
    stack_trees,
    unflatten,
)
from tests.kinds.problems import GlobalState, ModelOutput, Pair, State
from tests.truth.oracles import assert_same

X, Y = torch.arange(3.0), torch.ones(2)
TREES = {
    "tensor": X,
    "none": None,
    "tuple": (X, Y),
    "empty_tuple": (),
    "list": [X, [Y]],
    "dict": {"z": X, "a": Y},
    "ordered": OrderedDict(z=X, a=Y),
    "default": defaultdict(list, z=X, a=Y),
    "namedtuple": Pair(X, Y),
    "dataclass": State(X, Y),
    "global_dataclass": GlobalState(X, Y),
    "torch_registered": ModelOutput(z=X, a=Y),
    "nested": {"b": [ModelOutput(z=State(X, None)), Pair((), Y)], "a": None},
}
EVERY_TREE = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@EVERY_TREE
def test_unflatten_undoes_flatten(tree: Any) -> None:
    leaves, spec = flatten(tree)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    if not isinstance(tree, defaultdict):
        assert_same(unflatten(spec, leaves), tree)
    assert type(unflatten(spec, leaves)) is type(tree)


def test_dictionaries_keep_their_insertion_order() -> None:
    leaves, _ = flatten({"z": 1, "a": 2, "m": {"y": 3, "b": 4}})
    assert leaves == [1, 2, 3, 4]


def test_the_order_of_everyone_elses_dictionaries_is_left_alone() -> None:
    assert optree.tree_leaves({"z": 1, "a": 2}) == [2, 1]
    assert optree.tree_leaves({"z": 1, "a": 2}, namespace="another") == [2, 1]


def test_none_is_structure() -> None:
    leaves, spec = flatten((None, 1, {"x": None}))
    assert leaves == [1]
    assert unflatten(spec, [2]) == (None, 2, {"x": None})


def test_a_leaf_may_be_replaced_by_a_tree() -> None:
    _, spec = flatten({"a": 1})
    assert unflatten(spec, [{"b": (1, 2)}]) == {"a": {"b": (1, 2)}}


def test_columns_follow_named_parameters() -> None:
    module = nn.Linear(2, 3)
    params = dict(module.named_parameters())

    def call(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, params, (torch.ones(2),), strict=True)

    assert list(jacfunc.jacrev(call)(params)) == ["weight", "bias"]
    # the keys of the result would come back in order even from sorted leaves: look at the leaves
    shapes = [leaf.shape for leaf in Split.of(params).leaves]
    assert shapes == [param.shape for param in module.parameters()]


def test_paths_read_like_code() -> None:
    tree = {"encoder.weight": X, "pair": Pair(X, [Y]), "state": State(X, Y), "none": None}
    assert paths(tree, "params") == [
        "params['encoder.weight']",
        "params['pair'].first",
        "params['pair'].second[0]",
        "params['state'].position",
        "params['state'].momentum",
    ]
    assert paths(X, "args[0]") == ["args[0]"]
    assert len(paths(ModelOutput(z=X, a=Y), "output")) == 2


def test_a_class_registered_with_torch_after_jacfunc_was_imported() -> None:
    class Late:
        def __init__(self, x: Any) -> None:
            self.x = x

    torch_pytree.register_pytree_node(Late, lambda late: ([late.x], None), lambda xs, _: Late(*xs))
    result = jacfunc.jacrev(lambda late: Late(late.x**2))(Late(X))
    assert isinstance(result, Late)
    assert isinstance(result.x, Late)
    assert_same(result.x.x, torch.diag(2 * X))


def test_classes_registered_with_torch_nest_in_each_other() -> None:
    tree = ModelOutput(inner=ModelOutput(x=X), y=Y)
    result = jacfunc.jacrev(lambda t: t["inner"]["x"].sum() * t["y"])(tree)
    assert isinstance(result, ModelOutput)
    assert isinstance(result["inner"], ModelOutput)
    assert result["inner"]["x"].shape == (2, 3)


def test_adoption_stays_in_our_namespace() -> None:
    flatten(ModelOutput(z=X))
    tree = ModelOutput(z=X)
    assert optree.tree_leaves(tree)[0] is tree


def test_unregistered_objects_are_leaves() -> None:
    class Opaque:
        pass

    thing = Opaque()
    assert flatten([thing])[0] == [thing]


@EVERY_TREE
def test_split_puts_back_what_it_took_apart(tree: Any) -> None:
    split = Split.of(tree)
    if not isinstance(tree, defaultdict):
        assert_same(split.merge(split.leaves), tree)


def test_split_sets_constants_aside() -> None:
    tree = {"x": X, "n": torch.tensor(3), "word": "tanh", "none": None, "z": torch.tensor(1j)}
    split = Split.of(tree)
    assert len(split.leaves) == 2
    assert split.constants == (tree["n"], "tanh")
    merged = split.merge([X + 1, tree["z"]])
    assert merged["word"] == "tanh"
    assert torch.equal(merged["x"], X + 1)
    assert split.place([1, 2]) == {"x": 1, "n": None, "word": None, "none": None, "z": 2}
    replaced = split.merge(split.leaves, ["other", "constants"])
    assert (replaced["n"], replaced["word"]) == ("other", "constants")


@pytest.mark.parametrize(
    ("prefix", "tree", "want"),
    [
        (0, {"a": 1, "b": (2, 3)}, [0, 0, 0]),
        (None, {"a": 1, "b": (2, 3)}, [None, None, None]),
        ({"a": 0, "b": 1}, {"a": 1, "b": (2, 3)}, [0, 1, 1]),
        ({"a": None, "b": (0, None)}, {"a": 1, "b": (2, 3)}, [None, 0, None]),
        (0, (1, None, 2), [0, 0]),
        ((0, None, 1), (1, None, 2), [0, 1]),
        ({"z": 0, "a": 1}, {"z": (5, 6), "a": 7}, [0, 0, 1]),
        (0, (), []),
    ],
)
def test_prefixes_spread_over_leaves(prefix: Any, tree: Any, want: list[Any]) -> None:
    assert broadcast_prefix(prefix, tree) == want


def test_prefix_of_a_class_registered_with_torch() -> None:
    assert broadcast_prefix(0, ModelOutput(z=X, a=Y)) == [0, 0]


def test_prefix_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="dict"):
        broadcast_prefix({"a": 0}, (1, 2))


def test_stack_trees_and_map_tensors() -> None:
    stacked = stack_trees([{"z": X, "a": (Y,)}, {"z": X + 1, "a": (Y,)}])
    assert_same(stacked, {"z": torch.stack([X, X + 1]), "a": (torch.ones(2, 2),)})
    assert_same(map_tensors(lambda x: x * 2, {"x": X, "word": "x"}), {"x": 2 * X, "word": "x"})


def test_constants_of_the_input_reach_the_function() -> None:
    seen = {}

    def func(tree: dict[str, Any]) -> Tensor:
        seen.update(tree)
        return tree["x"] * tree["n"]

    marker = object()
    tree = {"x": X, "n": torch.tensor(3), "marker": marker, "none": None}
    result = jacfunc.jacrev(func)(tree)
    assert seen["marker"] is marker
    assert seen["n"] is tree["n"]
    assert result["marker"] is None
    assert result["n"] is None
    assert_same(result["x"], 3 * torch.eye(3))


def test_output_without_a_tensor_gives_an_empty_tree() -> None:
    assert jacfunc.jacrev(lambda x: ())(X) == ()
    assert jacfunc.jacrev(lambda x: {"none": None})(X) == {"none": None}


def test_argument_without_leaves_gives_an_empty_tree() -> None:
    assert jacfunc.jacrev(lambda empty: X)({}) == {}
    result = jacfunc.jacrev(lambda empty, x: x * 2, (0, 1))({}, X)
    assert result[0] == {}
    assert_same(result[1], 2 * torch.eye(3))


def test_importing_jacfunc_changes_no_default_of_optree() -> None:
    code = (
        "import optree; before = optree.tree_leaves({'b': 1, 'a': 2}); import jacfunc;"
        "assert optree.tree_leaves({'b': 1, 'a': 2}) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
