"""A function of parameters and a batch, as a module whose parameters are the leaves of a tree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor, nn

from jacfunc._arguments import check_like
from jacfunc._calls import modules_of
from jacfunc._lending import Constants, ModuleState, Select, Snapshot, Version
from jacfunc._torch import recording
from jacfunc._trees import Arguments, Split, StructureError, kinds_of
from jacfunc._types import Leaves, Tree, is_differentiable, is_tensor

_PLAIN = bool | int | float | str


@dataclass(slots=True)
class ParamTree:
    """A tree of parameters without its tensors, which have names.

    Args:
        kinds: equal for trees of equal structure, shapes, dtypes and plain values.
        is_known: are all values beside the tensors plain, so that ``kinds`` tells them apart?
    """

    names: tuple[str, ...]
    split: Split
    kinds: Hashable
    is_known: bool

    @classmethod
    def of(cls, params: Tree) -> tuple[ParamTree, dict[str, Tensor]]:
        """The tree, and its tensors by their paths (``"encoder.weight"``)."""
        split = Split.of(params, is_tensor)
        names = [name or "params" for name in split.names()]
        is_known = all(isinstance(x, _PLAIN) for x in split.constants)
        tree = cls(tuple(names), replace(split, leaves=()), kinds_of(params), is_known)
        return tree, dict(zip(names, split.leaves, strict=True))

    def with_tensors(self, tensors: Mapping[str, Any]) -> Tree:
        """The tree with these tensors."""
        return self.split.merge([tensors[name] for name in self.names])

    def place(self, named: Mapping[str, Any]) -> Tree:
        """The tree with a value for each of these names, and None in all other places."""
        return self.split.place([named.get(name) for name in self.names])

    def named(self, api: str, tree: Tree, names: Collection[str]) -> dict[str, Any]:
        """The values that a tree like the parameters has for these names.

        Raises:
            ValueError: if it has another structure, or anything but None for other names.
        """
        try:
            named = dict(zip(self.names, self.split.align(tree, "vector"), strict=True))
            if others := [n for n, x in named.items() if x is not None and n not in names]:
                raise StructureError(f"vector has something for {', '.join(others)}")
        except StructureError as error:
            raise ValueError(
                f"{api}: vector must have the structure of the parameters, got one where {error}. "
                "Give a tensor like each chosen parameter, and None for all else."
            ) from error
        return {name: named[name] for name in names}


class FunctionAsModule(nn.Module):
    """``func(params, *batch)`` at a tree of parameters, made anew for each call.

    Its parameters are the floating leaves of the tree, and its buffers all other tensors in it.
    They are tensors of its own, which share the memory of the leaves: the function may close over
    the same tensors, which are constants there.

    Args:
        func: what is called with a tree like ``params`` and the arguments of the module.
        params: the point.
    """

    def __init__(self, api: str, func: Callable[..., Any], params: Tree) -> None:
        super().__init__()
        self.func = func
        self.tree, tensors = ParamTree.of(params)
        own: dict[str, Any] = self._parameters
        for name, leaf in tensors.items():
            if is_differentiable(leaf):
                own[name] = _as_parameter(leaf)
            else:
                self._buffers[name] = leaf
        if not own:
            raise TypeError(
                f"{api}: params must hold at least one floating point tensor to differentiate by, "
                f"got {type(params).__name__}. A function is called as func(params, *inputs)."
            )

    @classmethod
    def called(
        cls, api: str, func: Callable[..., Any], arguments: Arguments
    ) -> tuple[Self, Arguments]:
        """The module of one call of a function, and the arguments beside the parameters."""
        args, kwargs = arguments
        if len(args) + len(kwargs) < 2 or not args:
            raise TypeError(
                f"{api}: a function must be called with its parameters and inputs, got "
                f"{len(args) + len(kwargs)} beside targets. Call it as (params, *inputs)."
            )
        return cls(api, func, args[0]), (args[1:], kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        params = self.tree.with_tensors(self._parameters | self._buffers)
        return self.func(params, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class FunctionState(ModuleState):
    """The state of a function at parameters.

    What is known of it is remembered of the function, which lives longer than the module that was
    made for a call.
    """

    @classmethod
    def of(cls, api: str, module: nn.Module, select: Select) -> Self:
        """The state at a call that begins.

        The modules that the function refers to are lent, too, and afterwards they are as they were.
        """
        assert isinstance(module, FunctionAsModule)
        state = super().of(api, module, select)
        below = [ModuleState.of(api, each, None) for each in modules_of(module.func)]
        every: list[ModuleState] = [state, *below]
        parts = {id(part.module): part for each in every for part in each.every_part}
        names = [(f"(module {n}) ", each) for n, each in enumerate(below)]
        params = [(at + n, x) for at, each in names for n, x in each.params.items()]
        hidden = [(at + n, x) for at, each in names for n, x in each.hidden.items()]
        buffers = [(at + n, x) for at, each in names for n, x in each.buffers.items()]
        return replace(
            state,
            beside=[part for part in parts.values() if part.module is not module],
            hidden={**state.hidden, **dict(params + hidden)},
            buffers={**state.buffers, **dict(buffers)},
            snapshot=Snapshot(list(parts.values())),
            # a function is not meant to write into what it is given: that is undone and refused
            constants=Constants(most_copied=0),
        )

    @cached_property
    def version(self) -> Version:
        if self.origin is not None:
            return self.origin.version
        return self._version_of(self.beside)

    @cached_property
    def version_of_parts(self) -> Version:
        if self.origin is not None:
            return self.origin.version_of_parts
        return self._version_of(part for part in self.beside if part.is_module)

    @property
    def functions(self) -> list[Any]:
        return [*super().functions, self.module.func]

    def _version_of(self, parts: Iterable[Any]) -> Version:
        """The version of the function with these parts, which it refers to."""
        every, module = list(parts), self.module
        assert isinstance(module, FunctionAsModule)
        marks = [mark for part in every for mark in part.marks()]
        if not module.tree.is_known or any(part.is_scripted or part.hides for part in every):
            return Version(marks)
        what = len(every) < len(self.beside), module.tree.kinds, *self.point
        return Version.of(module.func, what, marks)


def check_called(api: str, called: object) -> None:
    """Refuse what is neither a module nor a function."""
    if not callable(called) or isinstance(called, type):
        what = getattr(called, "__name__", type(called).__name__)
        raise TypeError(
            f"{api}: module must be an nn.Module or a function, got {what}. Pass a module, or "
            "func(params, *inputs) of a batch."
        )


def as_tree(state: ModuleState, named: Mapping[str, Tensor]) -> Tree:
    """A tensor for each chosen parameter in the form in which parameters come.

    It is a dict by name for a module; for a function a tree like its parameters.
    """
    module, in_order = state.module, {name: named[name] for name in state.point}
    return module.tree.place(in_order) if isinstance(module, FunctionAsModule) else in_order


def tangents_of(api: str, state: ModuleState, vector: Tree) -> Leaves:
    """What a vector in this form has for each chosen parameter.

    Raises:
        TypeError, ValueError: names or a structure, shapes or dtypes, other than the parameters'.
    """
    params, module = state.point, state.module
    if isinstance(module, FunctionAsModule):
        vector = module.tree.named(api, vector, params)
    elif not isinstance(vector, Mapping):
        raise TypeError(
            f"{api}: vector must be a dict of tensors by the names of parameters, got "
            f"{type(vector).__name__}. Give a tensor like each parameter, by name."
        )
    elif vector.keys() != params.keys():
        names = ", ".join(sorted(map(str, vector.keys() ^ params.keys())))
        raise ValueError(
            f"{api}: vector must name the chosen parameters, got {names} in only one of them. "
            "Give a tensor like each parameter, by name."
        )
    tangents = tuple([vector[name] for name in params])
    check_like(api, "vector", tangents, tuple(params.values()))
    return tangents


def _as_parameter(leaf: Tensor) -> Tensor:
    """A tensor that shares memory with the leaf and requires a gradient."""
    with recording():
        own = leaf.clone() if leaf.is_inference() else leaf.detach()
        return own.requires_grad_()
