"""A user's call as a function of leaves, and the way of its results back into trees."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_aux_pair, check_inputs, check_outputs, wrap_argnums
from jacfunc._calls.derivation import Derivation, ModuleOrigin
from jacfunc._calls.reach import reaches_module
from jacfunc._errors import writes_outside
from jacfunc._faults import handled
from jacfunc._lock import kept_property
from jacfunc._remembered import CallKind
from jacfunc._torch import run_as_written, untracked
from jacfunc._trees import (
    Split,
    StructureError,
    flatten,
    holds_floats_alone,
    kind_of,
    kinds_of,
    map_tensors,
    paths,
    without_settings,
)
from jacfunc._types import Blocks, Leaves, Tree, is_tensor


class FlatCall:
    """``func(*args, **kwargs)`` as a leaf function of the arguments that ``argnums`` names.

    It returns ``(outputs, extras)``: the differentiable leaves of the output, and other tensors
    that ``func`` returned. It keeps the trees of the last call, to put results into them.
    """

    def __init__(
        self,
        derivation: Derivation,
        args: tuple[Tree, ...],
        kwargs: dict[str, Any],
        origin: ModuleOrigin | None = None,
    ) -> None:
        api, argnums = derivation.api, derivation.argnums
        self.func = derivation.func
        self.state: Any = None if origin is None else origin.state
        """The state of the module that is called; None of a function."""
        self._api, self._has_aux = api, derivation.has_aux
        self._args, self._kwargs, self._origin = args, kwargs, origin
        # check_inputs refuses one that is not differentiable
        self._has_one_tensor = len(args) == 1 and type(args[0]) is Tensor and not kwargs
        self._positions = wrap_argnums(api, argnums, len(args))
        self._is_single = isinstance(argnums, int)
        with untracked():
            self._splits = [Split.of(args[n]) for n in self._positions]
            for n, split in zip(self._positions, self._splits, strict=True):
                if split.constants or not all(map(_is_plain, split.leaves)):
                    check_inputs(api, n, flatten(args[n])[0], partial(paths, args[n], f"args[{n}]"))
        splits = self._splits
        self.primals: Leaves = (
            splits[0].leaves if len(splits) == 1 else tuple([x for s in splits for x in s.leaves])
        )
        """The point: the differentiable leaves of the chosen arguments."""
        self._output: Split | None = None
        self._beside: Split | None = None
        self.maps_tensor_to_tensor = False
        """Did the last call take one tensor, and return one tensor and nothing beside it?"""

    @kept_property
    def call_kind(self) -> CallKind:
        """The identity of this call, by which plans and the like are remembered."""
        if self._origin is not None:
            state = self._origin.state
            return CallKind(state.module, self._origin.kind(), state.version)
        if self._has_one_tensor:
            with untracked():
                return CallKind(self.func, kind_of(self._args[0]), self.func)
        kind = self._positions, kinds_of((self._args, self._kwargs))
        return CallKind(self.func, kind, self.func)

    @property
    def exact_kind(self) -> CallKind | None:
        """:attr:`call_kind`, if calls of this kind differ in nothing but the numbers in tensors.

        Calls of a module do, and those of a function that is differentiated by all it gets.
        """
        has_more = self._kwargs or len(self._positions) != len(self._args)
        if self._origin is None and (has_more or not holds_floats_alone(self._args)):
            return None
        return self.call_kind

    @property
    def functions(self) -> list[Any]:
        """The functions that run when it is called, as far as they are known."""
        return [self.func] if self._origin is None else self._origin.state.functions

    @property
    def may_share_module(self) -> bool:
        """May it be a function that calls a module, which another thread may be lending?"""
        return self._origin is None and reaches_module(self.func)

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        args = list(primals) if self._has_one_tensor else self._args_with(primals)
        try:
            output, aux = run_as_written(self.func, *args, **self._kwargs), None
        except RuntimeError as error:
            if not writes_outside(error):
                raise
            handled(error)
            output, aux = run_as_written(self._on_copies, args, primals), None
        if self._has_aux:
            output, aux = check_aux_pair(self._api, output)
        with untracked():
            self._output = Split.of(output)
            is_bare = type(output) is Tensor and not self._output.constants
            self.maps_tensor_to_tensor = is_bare and self._is_single and self._has_one_tensor
            if self._has_aux or self._output.constants:
                self._beside = Split.of((self._output.constants, aux), is_tensor)
            is_complex = any(map(torch.is_complex, self._output.leaves))
            if is_complex or self._output.constants or output is None:
                told = without_settings(output, "output")
                check_outputs(self._api, list(told.values()), lambda: list(told))
        return self._output.leaves, self._beside.leaves if self._beside else ()

    def _args_with(self, primals: Leaves) -> list[Tree]:
        """The arguments, with these primals in the place of the point."""
        args, parts = list(self._args), self._cut(primals)
        for n, split, part in zip(self._positions, self._splits, parts, strict=True):
            args[n] = split.merge(part)
        return args

    def _on_copies(self, args: list[Tree], primals: Sequence[Tensor]) -> Tree:
        """The output for copies of all constants: torch refuses writes into the originals."""
        own = {id(primal) for primal in primals}
        args, kwargs = map_tensors(lambda x: x if id(x) in own else x.clone(), (args, self._kwargs))
        return self.func(*args, **kwargs)

    def without_graph(self) -> FlatCall:
        """The call with its trees, but without the leaves of the last output and their graph."""
        call = copy(self)
        call.forget_outputs()
        return call

    def forget_outputs(self) -> None:
        """Let go of the leaves of the last output, and of their graph; their trees are kept."""
        self._output = self._output and replace(self._output, leaves=())
        self._beside = self._beside and replace(self._beside, leaves=())

    def value(self, outputs: Leaves, extras: Leaves) -> tuple[Tree, Tree]:
        """The function's own ``(output, aux)``, from outputs and extras."""
        assert self._output is not None
        constants, aux = self._beside.merge(extras) if self._beside else ((), None)
        return self._output.merge(outputs, constants), aux

    def jacobian(self, blocks: Blocks) -> Tree:
        """The Jacobian: an output tree of input trees of blocks ``[*out_i, *in_j]``."""
        if self.maps_tensor_to_tensor:
            return blocks[0][0]
        return self.output_tree([self.input_tree(row) for row in blocks])

    @property
    def output_shapes(self) -> list[torch.Size]:
        """The shapes of the output leaves, as the function returned them."""
        assert self._output is not None
        return [leaf.shape for leaf in self._output.leaves]

    def output_tree(self, values: Sequence[Any]) -> Tree:
        """The tree of the output, with one value for each output leaf."""
        assert self._output is not None
        return self._output.place(values)

    def input_tree(self, values: Sequence[Any]) -> Tree:
        """The tree of the chosen arguments, with one value for each primal.

        It is a tuple of trees where ``argnums`` is a tuple.
        """
        parts = self._cut(values)
        trees = tuple(s.place(part) for s, part in zip(self._splits, parts, strict=True))
        return trees[0] if self._is_single else trees

    def aligned_tangents(self, trees: Sequence[Tree]) -> Leaves:
        """One tangent for each primal, from trees like the chosen arguments; dicts match by key."""
        if not isinstance(trees, tuple | list) or len(trees) != len(self._splits):
            leaves = flatten(trees)[0]
            if len(leaves) != len(self.primals):
                return tuple(leaves)  # check_like refuses their number
            raise TypeError(
                f"{self._api}: tangents must be a tuple of {len(self._splits)}, as the primals "
                f"are, got {type(trees).__name__}. Write (x,) for the only one."
            )
        return tuple(
            value
            for n, (split, tree) in enumerate(zip(self._splits, trees, strict=True))
            for value in self._align(split, tree, f"tangents[{n}]")
        )

    def aligned_outputs(self, name: str, tree: Tree) -> Leaves:
        """One value for each output leaf, from a tree like the output; dicts match by key."""
        assert self._output is not None
        if self._output.is_bare:
            if isinstance(tree, Tensor):
                return (tree,)
            leaves = flatten(tree)[0]
            return (tree,) if len(leaves) == 1 else tuple(leaves)  # check_like refuses it
        return tuple(self._align(self._output, tree, name))

    def _align(self, split: Split, tree: Tree, path: str) -> list[Any]:
        try:
            return split.align(tree, path)
        except StructureError as error:
            name = path.partition("[")[0]
            raise ValueError(
                f"{self._api}: {name} must have the structure of what they belong to, got one "
                f"where {error}. Give dicts the same keys, and None for what is not differentiated."
            ) from error

    def input_paths(self) -> list[str]:
        """A path for each primal: ``args[0]['weight']``."""
        return [
            path
            for n, split in zip(self._positions, self._splits, strict=True)
            for path in split.paths(f"args[{n}]")
        ]

    def output_paths(self) -> list[str]:
        """A path for each output leaf: ``output['logits']``."""
        assert self._output is not None
        return self._output.paths("output")

    def _cut(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """The values of each chosen argument, from those of all primals in a row."""
        if len(self._splits) == 1:
            return [values]
        parts, start = [], 0
        for split in self._splits:
            parts.append(values[start : start + len(split.leaves)])
            start += len(split.leaves)
        return parts


def _is_plain(leaf: Tensor) -> bool:
    """Is it real and dense, as what is differentiated must be?"""
    return not leaf.is_complex() and leaf.layout is torch.strided
