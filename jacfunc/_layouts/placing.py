"""Where the tensors of an evaluation hold the samples: as vmap knows, or by learned layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import Size, Tensor

from jacfunc._layouts.evidence import Seen
from jacfunc._layouts.layouts import (
    OUT,
    Key,
    Layout,
    NoLayout,
    Site,
    Sites,
    Unlike,
    layouts_between,
)
from jacfunc._layouts.traces import Listener, Trace
from jacfunc._torch import batched, call_of_all_samples, of_all_samples
from jacfunc.layers import Rule

Place: TypeAlias = Callable[[Tensor], Tensor]
"""Makes ``[K, B, *z]`` of products with respect to a tensor, which have K in front."""


@dataclass
class VmappedSamples:
    """Samples under a vmap, or one sample alone, where ``level`` is None.

    Args:
        listener: is told of all operations, if there is one.
        operations: functions that were called, and plain values that they were called with.
    """

    size: int
    level: Any
    listener: Listener | None = None
    operations: Sequence[Any] = ()
    can_share = False
    """Does it know the results that all samples share?"""

    def is_shared(self, key: Key, func: Any) -> bool | None:
        """Do all samples share a result? None if that is not known yet."""
        return False

    def becomes_shared(self, key: Key, func: Any, out: Any) -> bool:
        """Learn from a result whether all samples share it."""
        return False

    def of_all(self, key: Key, tensor: Tensor, func: Any, rule: Rule) -> Tensor:
        """A tensor that goes into an operation, as ``[B, *shape]`` of all samples."""
        return of_all_samples(tensor, self.size, self.level)

    def of_parameters(self, named: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters among the arguments, by name, each as ``[B, *shape]``."""
        return {name: of_all_samples(named[name], self.size, self.level) for name in names}

    def call(
        self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """The result of an operation that has a rule."""
        out: Tensor = (
            call_of_all_samples(func, args, kwargs, self.level)
            if rule.keeps_lead and args
            else func(*args, **kwargs)
        )
        return out

    def result(self, number: int, func: Any, out: Tensor) -> tuple[Tensor, Tensor, Place | None]:
        """The result to go on with, that of all samples, and where this one holds the samples.

        There is no place if all samples share the result.
        """
        out, values, dim = batched(out, self.size, self.level)
        if dim is None:
            return out, values, lambda products: products.unsqueeze(1)
        return out, values, lambda products: products.movedim(dim + 1, 1)


@dataclass
class PlainSamples:
    """The samples of a batch that is evaluated as a whole.

    Args:
        size: how many there are.
        sites: what was learned of calls of this kind.
        trace: another batch, if layouts are to be learned now.
        listener: is told of all operations, if there is one.
        seen: what is to be learned from.
        operations: functions that were called, and plain values that they were called with.
    """

    size: int
    sites: Sites
    trace: Trace | None = None
    listener: Listener | None = None
    seen: dict[Key, Seen] = field(default_factory=dict)
    operations: Sequence[Any] = ()
    can_share = True

    def is_shared(self, key: Key, func: Any) -> bool | None:
        if self.trace is not None:
            return None
        site = self.sites.get(key)
        return site is not None and site.layout is None and site.func == func

    def becomes_shared(self, key: Key, func: Any, out: Any) -> bool:
        # complex values need conjugates, which no rule takes
        if not (isinstance(out, Tensor) and out.requires_grad) or out.is_complex():
            return False
        try:
            return self.layout(key, out, func) is None
        except NoLayout:
            return False

    def of_all(self, key: Key, tensor: Tensor, func: Any, rule: Rule) -> Tensor:
        return self.placed(tensor, self.layout(key, tensor, func, rule))

    def of_parameters(self, named: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
        return {name: named[name].expand(self.size, *named[name].shape) for name in names}

    def call(
        self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        return out

    def result(self, number: int, func: Any, out: Tensor) -> tuple[Tensor, Tensor, Place | None]:
        layout, size = self.layout((number, OUT), out, func), self.size
        if layout is None:
            return out, out, None
        return out, out, partial(layout.of_all, size=size, lead=1)

    def placed(self, tensor: Tensor, layout: Layout | None) -> Tensor:
        """The tensor as ``[B, *one]``."""
        if layout is None:
            return tensor.expand(self.size, *tensor.shape)
        return layout.of_all(tensor, self.size)

    def layout(
        self, key: Key, tensor: Tensor, func: Any, rule: Rule | None = None
    ) -> Layout | None:
        """Where a tensor holds the samples; None if they share it.

        Raises:
            Unlike: if the tensor is not one of those that were learned.
            NoLayout: if it does not hold the samples in one dimension.
        """
        if self.trace is None:
            if key not in self.sites:
                raise Unlike
            site = self.sites[key]
            if site is None:
                raise NoLayout
            if func != site.func or not _is_of(site, tensor.shape, self.size):
                raise Unlike
            return site.layout
        other, size = self.trace.tensor(key, func, rule), len(self.trace.samples)
        if other is None:
            raise NoLayout
        layouts = layouts_between(tensor.shape, self.size, other.shape, size)
        if not layouts:
            raise NoLayout
        self.seen[key] = Seen(func, other, tensor, layouts)
        return layouts[0]


Placing: TypeAlias = VmappedSamples | PlainSamples
"""Says where the tensors of one evaluation hold the samples."""


def _is_of(site: Site, shape: Size, size: int) -> bool:
    """Does the shape of a tensor, in a batch of this size, agree with what was learned?"""
    if site.layout is None:
        return shape == site.one
    one, dim = site.one, site.layout.dim
    if dim == 0:  # the usual case
        return bool(shape) and shape[0] == size * one[0] and shape[1:] == one[1:]
    return (*one[:dim], size * one[dim], *one[dim + 1 :]) == tuple(shape)
