"""The mode that sends what is done with jets to the rules, and what it is that rules work with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import is_out_of_memory
from jacfunc._faults import TAKES_DERIVATIVES
from jacfunc._forward_laplacian.jet import (
    Args,
    Carried,
    First,
    Jet,
    Kwargs,
    Run,
    leaves_in,
    name_of,
)
from jacfunc._torch import inside_derivative, sweep_batch, tracked, untracked
from jacfunc._types import Leaves

Rule: TypeAlias = Callable[["Propagation", Callable[..., Any], Args, Kwargs], Any]
"""Gives what a function of torch returns in a propagation for arguments with jets among them."""


@dataclass(frozen=True)
class Batched:
    """A rule that does the same with samples in front of all jets, as its functions do.

    Args:
        most: dimensions that other tensors may have; None for as many as a jet has.
    """

    rule: Rule
    most: int | None = None

    def __call__(self, ctx: Propagation, func: Any, args: Args, kwargs: Kwargs) -> Any:
        return self.rule(ctx, func, args, kwargs)


by_weight = partial(Batched, most=2)
"""The rule of a product that sums over the last dimension of the first argument."""


class Propagation(TorchFunctionMode):
    """A context in which functions of torch carry the derivatives of jets, by rules.

    Args:
        keeps_graph: may results be differentiated further by plain autograd?
        is_of_all: do rules get what jets carry for all samples of the vmap around, and not jets?
    """

    def __init__(
        self,
        run: Run,
        rules: Mapping[Callable[..., Any], Rule],
        keeps_graph: bool,
        is_of_all: bool = False,
    ) -> None:
        super().__init__()
        self.run, self.is_summed, self.is_of_all = run, run.is_summed, is_of_all
        self._rules, self._keeps_graph = rules, keeps_graph
        self._kind: type[Any] = Carried if is_of_all else Jet
        if not is_of_all:
            self._of_all = Propagation(run, rules, keeps_graph, is_of_all=True)
            # watches outside look at what derivatives of a rule's operations would be
            self._ruling = nullcontext if inside_derivative() else untracked
            self._entries: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Self:
        self._entries.append(tracked())
        self._entries[-1].__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entries.pop().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        if func in TAKES_DERIVATIVES:
            self.run.give_up("it takes derivatives itself")
        named = kwargs or {}
        jets = self.jets(args, named)
        if not jets:
            return func(*args, **named)
        rule = self._rules.get(func)
        if rule is None or named.get("out") is not None:
            self.run.give_up(f"there is no rule for {name_of(func)}")
        if not _NO_CONTAINERS.issuperset(types):
            self.run.give_up("a class of tensors has its own __torch_function__")
        if not torch.is_grad_enabled():
            self.run.give_up("it takes gradients off, or has a backward pass of its own")
        try:
            with self._ruling():
                if self._keeps_graph:
                    return self._by_rule(rule, func, args, named, jets)
                with torch.no_grad():
                    return self._by_rule(rule, func, args, named, jets)
        except Exception as error:  # the function's own errors are raised again by the sweep
            if is_out_of_memory(error):
                raise
            self.run.give_up(f"the rule for {name_of(func)} does not cover it ({error})")

    def _by_rule(self, rule: Rule, func: Any, args: Args, kwargs: Kwargs, jets: list[Jet]) -> Any:
        """What the rule makes of the call: of all samples at once, if it is as right for these."""
        vmap, others = self.run.vmap, None
        if vmap is not None and isinstance(rule, Batched):
            most, kind, rule = rule.most, jets[0].kind, rule.rule
            if most is None or (len(jets) == 1 and jets[0] is args[0] and not kwargs):
                others = self._others(args, kwargs, kind, kind[0] if most is None else most)
        if vmap is None or others is None or not vmap.is_next(others):
            return rule(self, func, args, kwargs)
        every = tuple([x.of_all if type(x) is Jet else x for x in args])
        return vmap.below(rule, self._of_all, func, every, kwargs)

    def _others(
        self, args: Args, kwargs: Kwargs, kind: tuple[int, torch.dtype], most: int
    ) -> list[Tensor] | None:
        """The other tensors; None if samples in front of all jets change how arguments meet.

        Torch aligns shapes and chooses a dtype by the number of dimensions. So jets have one
        number of dimensions, others at ``most`` so many, and all are of one dtype.
        """
        if kwargs and not _NO_TENSORS.issuperset(map(type, kwargs.values())):
            return None
        others = []
        for x in args:
            if type(x) in _TENSORS and x.dtype is kind[1] and x.dim() <= most:
                others.append(x)
            elif type(x) is Jet and x.owner is self.run and x.kind == kind:
                continue
            elif type(x) not in _NO_TENSORS:
                return None
        return others

    def owns(self, value: Any) -> bool:
        """Is it a jet of this propagation? One of a propagation outside is a constant here."""
        return type(value) is self._kind and value.owner is self.run

    def jets(self, args: Args, kwargs: Kwargs) -> list[Any]:
        """The jets among arguments, and in the lists among them."""
        values: Collection[Any] = (*args, *kwargs.values()) if kwargs else args
        if not _NO_CONTAINERS.issuperset(map(type, values)):
            values = leaves_in(values)
        return [x for x in values if type(x) is self._kind and x.owner is self.run]

    def value(self, of: Any) -> Any:
        """The value of a jet; whatever else as it is."""
        return of.value if self.owns(of) else of

    def jet(self, value: Any, first: First, second: Tensor | None) -> Any:
        """The value with derivatives, broadcast to its shape; as it is, if it is not floating."""
        lead = int(self.is_of_all)  # dimensions of samples, in front of values and behind N
        if not value.is_floating_point():
            assert not lead, "what is made of floating entries by a formula is floating"
            return value
        shape = value.shape[lead:]
        if isinstance(first, Tensor) and first.shape[1 + lead :] != shape:
            first = first.expand(first.shape[: 1 + lead] + shape)
        if second is not None:
            before = lead if self.is_summed else 1 + lead
            if second.shape[before:] != shape:
                second = second.expand(second.shape[:before] + shape)
        return Jet(shape, Carried(self.run, value, first, second), self.is_of_all)

    def summed(self, products: Tensor) -> Tensor:
        """Products ``[N, *shape]`` of first derivatives as they are part of second ones."""
        return products.sum(0) if self.is_summed else products

    def squares(self, first: Tensor) -> Tensor:
        """The squares of first derivatives as they are part of second ones."""
        return first.square().sum(0) if self.is_summed else first.square()

    def aligned(self, derivatives: Tensor, dim: int) -> Tensor:
        """First derivatives ``[N, *shape]`` with ``dim`` dimensions behind N, to be broadcast."""
        missing = dim + 1 - derivatives.dim()
        if missing <= 0:
            return derivatives
        size, *shape = derivatives.shape
        return derivatives.reshape(size, *(1,) * missing, *shape)

    def aligned_second(self, second: Tensor, dim: int) -> Tensor:
        """Second derivatives, to be broadcast to ``dim`` dimensions."""
        return second if self.is_summed else self.aligned(second, dim)

    def weighted(self, dim: int, *terms: tuple[Any, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """First and second derivatives of a sum of products, each of a jet and a factor.

        They come term by term, to be broadcast to ``dim`` dimensions; constants have none.
        """
        jets = [(jet, factor) for jet, factor in terms if self.owns(jet)]
        firsts = [_scaled(factor, self.aligned(jet.first, dim)) for jet, factor in jets]
        bent = [(jet.second, factor) for jet, factor in jets if jet.second is not None]
        return firsts, [_scaled(factor, self.aligned_second(x, dim)) for x, factor in bent]

    def pushed(self, linear: Callable[..., Leaves], *firsts: Tensor) -> Leaves:
        """A linear or bilinear map applied to each of N tensors ``[N, *shape]``."""
        return sweep_batch(lambda seeds: (linear(*seeds), ()), firsts)[0]

    def pushed_second(self, linear: Callable[..., Leaves], *seconds: Tensor) -> Leaves:
        """A linear map applied to second derivatives."""
        return linear(*seconds) if self.is_summed else self.pushed(linear, *seconds)


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((bool, int, float, str, type(None)))
_NO_CONTAINERS = _TENSORS | _NO_TENSORS | {Jet, Carried}


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of second derivatives, of which None are zeros."""
    there = [part for part in parts if part is not None]
    return added_up(there) if there else None


def added_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return sum(parts[1:], parts[0])


def _scaled(factor: Any, tensor: Tensor) -> Tensor:
    """The product; the tensor itself where the factor is the number 1."""
    return tensor if not isinstance(factor, Tensor) and factor == 1 else factor * tensor


def times(factor: Any, second: Tensor | None) -> Tensor | None:
    """A factor times second derivatives, of which None are zeros."""
    return None if second is None else factor * second
