"""The Jacobian as a linear map: f at a point, before anyone decides how to make it explicit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from jacfunc._assembly import Sink
from jacfunc._errors import Refused, Stale, check_fallback, is_out_of_memory
from jacfunc._faults import Watch, handled
from jacfunc._linear_map.agreement import check_agreement
from jacfunc._linear_map.linearization import EVERY, Linearization, Some, one_by_one
from jacfunc._linear_map.pull import linearize
from jacfunc._linear_map.push import pushforward, pushforward_batch
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._remembered import CallKind
from jacfunc._torch import RandomState, below_transforms, holds_nan, inside_transform, levels
from jacfunc._trees import kind_of
from jacfunc._types import Blocks, LeafFunction, Leaves

Result = TypeVar("Result")


class JacobianOperator:
    """f at a point as a linear map, evaluated lazily: who only pushes never pays for a graph.

    Every evaluation draws the same random numbers, so that dropout has one mask in all sweeps; and
    all must return the same outputs, whatever else the function draws or keeps.
    """

    def __init__(self, func: LeafFunction, primals: Leaves, sink: Sink | None = None) -> None:
        self.primals = primals
        self.func = func
        self.sink = sink or Sink()
        self._linearization: Linearization | None = None
        self._image: tuple[Leaves, Leaves] | None = None
        self._was_pushed = False
        self._draws: RandomState | None = None

    @property
    def call_kind(self) -> CallKind:
        """Identity of the user's call below, or of the function itself; equal for equal costs."""
        kind: CallKind | None = getattr(self.func, "call_kind", None)
        if kind is None:
            kind = CallKind(self.func, tuple([kind_of(p) for p in self.primals]), self.func)
        if not inside_transform():
            return kind
        return kind.among(levels(), tuple(below_transforms(p).shape for p in self.primals))

    def again(self) -> JacobianOperator:
        """The same function at the same point, not yet evaluated; it draws the same numbers."""
        fresh = JacobianOperator(self.func, self.primals)
        fresh._draws = self._draws
        return fresh

    def from_rows(self, chunks: Iterable[Leaves]) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` of chunks of rows ``[K, *in_j]``, where the sink puts them."""
        return self.sink.rows(chunks, self.outputs, self.primals)

    def from_columns(self, chunks: Iterable[Leaves]) -> Blocks:
        """The same of chunks of columns ``[K, *out_i]``."""
        # only pullbacks need a graph; and what was evaluated to plan is no part of the result
        self._linearization = self._image = None
        return self.sink.columns(map(numbers, chunks), lambda: self.outputs, self.primals)

    @property
    def outputs(self) -> Leaves:
        """f(primals), differentiable leaves only."""
        return self.image()[0]

    def pullback(self, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        """Jᵀ ȳ: ``[*out]`` → ``[*in]``; ``of`` some of the outputs alone."""
        linearized = self._linearized
        return self.refusing("pull cotangents back", lambda: linearized.pull(cotangents, EVERY, of))

    def pullback_batch(self, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        """K pullbacks at once: ``[K, *out]`` → ``[K, *in]``; ``of`` some of the outputs alone."""
        return self.pullback_onto(EVERY, cotangents, of)

    def pullback_onto(self, chosen: slice, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        """The same onto some of the primals alone."""
        if _is_empty(cotangents):
            return _no_products(self.primals[chosen])
        linearized = self._linearized
        return self.refusing(
            "pull cotangents back", lambda: linearized.pull_batch(cotangents, chosen, of)
        )

    def pullback_each(self, cotangents: Leaves, of: Some = EVERY) -> Leaves:
        """K pullbacks one after the other, never vmapped: ``[K, *out]`` → ``[K, *in]``."""
        if _is_empty(cotangents):
            return _no_products(self.primals)
        return one_by_one(lambda seeds: self.pullback(seeds, of), cotangents)

    def pushforward(self, tangents: Leaves) -> Leaves:
        """J ẋ: ``[*in]`` → ``[*out]``."""
        # a function that writes into its inputs writes into their tangents too
        copies = tuple(tangent.clone() for tangent in tangents)
        with alone():
            self.repeat_draws()
            outputs, products, extras = self.refusing(
                "push tangents forward",
                lambda: pushforward(self.func, self.primals, copies),
            )
        self._keep(outputs, extras, was_pushed=True)
        return products

    def pushforward_batch(self, tangents: Leaves, randomness: str = "same") -> Leaves:
        """K pushforwards at once: ``[K, *in]`` → ``[K, *out]``."""
        if _is_empty(tangents):
            return _no_products(self.outputs)
        try:
            with alone():
                self.repeat_draws()
                outputs, products, extras = pushforward_batch(
                    self.func, self.primals, tangents, randomness
                )
        except Exception as error:  # as above
            check_fallback(error)
            handled(error)
            note("tangents could not be pushed at once, columns go one by one: %s", error)
            return one_by_one(self.pushforward, tangents)
        self._keep(outputs, extras, was_pushed=True)
        return products

    def pushforward_each(self, tangents: Leaves) -> Leaves:
        """K pushforwards one after the other, never vmapped: ``[K, *in]`` → ``[K, *out]``."""
        if _is_empty(tangents):
            return _no_products(self.outputs)
        return one_by_one(self.pushforward, tangents)

    @property
    def _linearized(self) -> Linearization:
        if self._linearization is None:
            if self._draws is None:
                linearized = self.refusing("keep a graph", self._linearize)
            else:
                with alone():
                    self.repeat_draws()
                    linearized = self.refusing("keep a graph", self._linearize)
            self._keep(linearized.outputs, linearized.extras, was_pushed=False)
            self._linearization = linearized
        return self._linearization

    def _linearize(self) -> Linearization:
        return linearize(self.func, self.primals)

    def _keep(self, outputs: Leaves, extras: Leaves, was_pushed: bool) -> None:
        """What the first evaluation returned; whatever a later one returns must agree with it."""
        if self._image is None:
            self._image, self._was_pushed = (outputs, extras), was_pushed
            return
        first, self._image = self._image, None  # another strategy begins anew
        check_agreement(first[0], outputs, was_pushed == self._was_pushed)
        self._image = first

    def image(self) -> tuple[Leaves, Leaves]:
        """Outputs, and tensors that the function returned beside them."""
        if self._image is None:
            linearized = self._linearized
            return linearized.outputs, linearized.extras
        return self._image

    def evaluated(self, outputs: Leaves, extras: Leaves) -> None:
        """By somebody else."""
        self._image = (outputs, extras)

    def repeat_draws(self) -> None:
        """Called before an evaluation that is not the only one: each draws the same numbers."""
        if torch.compiler.is_compiling():
            return
        if self._draws is None:
            self._draws = RandomState(self.primals)
        else:
            self._draws.repeat()

    def refusing(self, what: str, run: Callable[[], Result]) -> Result:
        """Run; an error that the function alone does not raise is torch's refusal."""
        try:
            return run()
        except Exception as error:  # torch has no type for what it can't do
            if isinstance(error, Refused | Stale) or is_out_of_memory(error):
                raise
            if torch.compiler.is_compiling():
                raise
            # the function may take gradients itself
            with torch.enable_grad(), Watch():
                self.func(*(primal.clone() for primal in self.primals))
            reason = str(error).strip().split("\n")[0]
            raise Refused(f"torch can't {what} through it ({reason})") from error


def numbers(products: Leaves) -> Leaves:
    """Products of tangents, of which none is nan.

    Raises:
        Refused: if one is. A zero tangent that meets an infinite derivative gives nan, too, and
            nobody can tell such a nan from one that the derivative has.
    """
    if any(map(holds_nan, products)):
        raise Refused(
            "forward mode gives nan, which zero tangents and infinite derivatives may have made; "
            "use strategy=Reverse()"
        )
    return products


def _is_empty(seeds: Leaves) -> bool:
    """No seeds, or no leaves that could have one: torch's sweeps fail on both."""
    return len(seeds) == 0 or seeds[0].shape[0] == 0


def _no_products(leaves: Leaves) -> Leaves:
    return tuple(leaf.new_empty((0, *leaf.shape)) for leaf in leaves)
