"""What autograd has saved for a backward pass, and what else that depends on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import c_char
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import repeat
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from jacfunc._torch import Graphs, untracked

_VERSION = attrgetter("_version")
_KIND_OF_RESULT = attrgetter("shape", "dtype", "device")

MOST_BYTES = 2**25
"""What makes a result of more takes so long that it does not matter what calls it."""


@dataclass(eq=False)
class Sources:
    """Tensors of an evaluation that a sweep may read.

    Args:
        saved: what autograd has saved, in order.
        versions: how often torch had written into each of these by then.
        kinds: shapes and dtypes of what operations got, of constants, too.
        arguments: what some of them got, by their numbers.
        moments: how many nodes were made until each was saved, if nobody numbers operations.
        owners: the nodes of users' own behind what was returned, in the order of a walk; None if
            there may be none.
    """

    saved: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    arguments: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    moments: list[int] | None = None
    owners: list[Any] | None = None

    @property
    def are_as_saved(self) -> bool:
        """Was nothing of it written into since? Torch compares that where it sweeps a graph."""
        return [*map(_VERSION, self.saved)] == self.versions

    def saving(self) -> AbstractContextManager[None]:
        """A context in which autograd tells what it saves, and gets it back from here."""
        # a graph that held its own tensors by such hooks would never be freed
        here = ref(self)

        def keep(tensor: Tensor) -> int:
            sources: Sources = here()  # type: ignore[assignment]
            sources.saved += (tensor,)
            sources.versions += (tensor._version,)
            if sources.moments is not None:
                sources.moments += (Graphs.num_nodes(),)
            return len(sources.saved) - 1

        def kept(number: int) -> Tensor:
            if (sources := here()) is None:
                raise RuntimeError("what a module returned inside a call is gone after the call")
            return sources.saved[number]

        def keep_unseen(tensor: Tensor) -> int:
            with untracked():  # modes see operations while functions of users' own save tensors
                return keep(tensor)

        return saved_tensors_hooks(keep if self.owners is None else keep_unseen, kept)


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """What is equal for tensors of two evaluations that are equal, in a few bytes.

    A kernel may keep bytes for its backward pass of which it has written some alone: these do not
    count.
    """
    kind = tensor.shape, tensor.dtype
    if tensor.dtype == torch.uint8:
        return kind
    numbers = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    held = (c_char * numbers.nbytes).from_address(numbers.data_ptr())
    return *kind, sha256(held).digest()


_OF_TORCH = re.compile(r"[A-Z]\w*Backward\d+")
"""Names of nodes whose backward pass depends on what they have saved alone."""

_MADE = methodcaller("_sequence_nr")

_FACTORS = "_saved_other", "_saved_self"
"""What torch saves a Python number as, if it saves one as a tensor."""


def outline(
    tensor: Tensor, starts: Mapping[Any, int], first: int, sources: Sources
) -> tuple[Any, ...] | None:
    """The nodes behind a tensor: kinds, which leads where, when made, and numbers they have saved.

    Equal for equal backward passes of tensors that are saved in the same order. The arguments of
    operations do not tell all this: ``leaky_relu(x, slope)`` reads a number from a tensor, and of
    two layers in a row nothing shows which one the output was made of. None if a node is not one of
    torch's own operations, as nothing tells what it depends on.

    Args:
        starts: nodes at which the walk ends, or identities of leaves, with their numbers.
        first: when the evaluation began: nodes are told apart by how many were made since.
        sources: of the evaluation; its tensors are all that nodes have saved but numbers. With
            moments, kinds of what operations returned count, too. Nodes of users' own are put
            there, if there may be any.
    """
    told, moments, owners = sources.saved, sources.moments, sources.owners
    numbers: dict[Any, int] = {None: -1, **starts}
    nodes: list[Any] = [tensor.grad_fn]
    kinds: list[Any] = [tensor.output_nr]
    readers, last = _readers(), -1
    if owners:
        owners.clear()
    for node in nodes:  # which grows
        kind = type(node)
        reader = readers[kind] if kind in readers else _learned(node)
        if reader is None and owners is not None and issubclass(kind, BackwardCFunction):
            owners += (node,)
            kinds += map(_KIND_OF_RESULT, node._input_metadata)
            reader = _NOTHING
        if reader is None:
            return None
        kinds += (kind,)
        if moments is not None:
            if reader.may_hide is not None and reader.may_hide(node):
                return None
            kinds += map(_KIND_OF_RESULT, node._input_metadata)
        if reader.is_sure:
            kinds += (reader.sure(node),)
        elif reader is not _NOTHING:
            kinds += reader.values(node, told)
        for below, output in node.next_functions:
            if below not in numbers:
                if type(below) is Graphs.LEAF:
                    leaf = id(below.variable)
                    if leaf not in starts:
                        return None
                    numbers[below] = starts[leaf]
                else:
                    last -= 1
                    numbers[below] = last
                    nodes += (below,)
            kinds += numbers[below], output
    made = [*map(_MADE, nodes), *(moments or ())]
    return *kinds, *map((-first).__add__, made)


class _Reader(NamedTuple):
    """What reads the plain values that nodes of a kind have saved.

    Args:
        sure: returns those that no node of the kind saves tensors for.
        unsure: names of others: where one node has saved nothing, another may have saved a tensor.
        factors: names of what may be a number that was saved as a tensor.
        is_sure: is there nothing else to read?
        may_hide: may the backward pass depend on what neither a node nor its neighbours tell?
    """

    sure: Callable[[Any], Any] = type
    unsure: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    is_sure: bool = False
    may_hide: Callable[[Any], bool] | None = None

    def values(self, node: Any, told: Sequence[Tensor]) -> list[Any]:
        """The values of a node; see :func:`outline`."""
        values = [self.sure(node)]
        for saved in map(getattr, repeat(node), self.unsure):
            is_nothing = saved is None or (type(saved) is tuple and not saved)
            values += (saved if is_nothing else _without_tensors(saved),)
        for name in self.factors:
            factor = getattr(node, name)
            if _is_number(factor) and not any(factor is tensor for tensor in told):
                values += name, factor.item()
        return values


_NOTHING = _Reader()

_HIDING: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("NativeDropoutBackward0", "ToDenseBackward0"), bool),
    **dict.fromkeys(("AsStridedBackward0", "AsStridedBackward1"), bool),
    **dict.fromkeys(("AsStridedBackward0_copy", "AsStridedScatterBackward0"), bool),
    **dict.fromkeys(
        ("CatBackward0", "BlockDiagBackward0"),
        lambda node: any(below is None for below, _ in node.next_functions),
    ),
}
"""Nodes that keep what no attribute tells: a flag, strides, or sizes of constants that are joined.

Shapes, dtypes and devices of all else that an operation got are those of the nodes it leads to."""


@cache
def _readers() -> dict[type, _Reader]:
    """The readers of this process, by the kinds of torch's own nodes."""
    return {}


def _learned(node: Any) -> _Reader | None:
    """The reader of a kind of which this is the first node; None if it is not one of torch's."""
    kind = type(node)
    if not _OF_TORCH.fullmatch(kind.__name__):
        return None
    values = {name: getattr(node, name) for name in dir(kind) if name.startswith("_saved_")}
    plain = [name for name, value in values.items() if _without_tensors(value) is value]
    unsure = tuple([name for name in plain if _lacks_something(values[name])])
    sure = [name for name in plain if name not in unsure]
    factors = tuple([name for name in _FACTORS if name in values]) if _FACTORS[0] in values else ()
    is_sure, may_hide = bool(sure) and not (unsure or factors), _HIDING.get(kind.__name__)
    reader = _Reader(attrgetter(*sure) if sure else type, unsure, factors, is_sure, may_hide)
    return _readers().setdefault(kind, reader if reader != _NOTHING else _NOTHING)


def _lacks_something(saved: Any) -> bool:
    """Has a node saved nothing here, or not all, where another one may have saved tensors?"""
    return saved is None or (isinstance(saved, tuple) and (not saved or None in saved))


def _without_tensors(saved: Any) -> Any:
    """What a node has saved, with the class of tensors in the place of these."""
    if isinstance(saved, Tensor):
        return Tensor
    has_tensors = isinstance(saved, tuple) and any(isinstance(x, tuple | Tensor) for x in saved)
    return tuple(map(_without_tensors, saved)) if has_tensors else saved


def _is_number(factor: Any) -> bool:
    """May it be a number that torch has saved as a tensor?"""
    return isinstance(factor, Tensor) and not factor.dim() and not factor.requires_grad
