"""The Jacobian as a linear map: f at a point, before anyone decides how to make it explicit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from jacfunc._errors import Changes, Refused, Stale, check_fallback, is_out_of_memory
from jacfunc._faults import Watch, handled
from jacfunc._linear_map.agreement import check_agreement, detached, differ_by_rounding
from jacfunc._linear_map.graph import linearize
from jacfunc._linear_map.linearization import EVERY, LeafNumbers, Linearization
from jacfunc._linear_map.push import pushforward, pushforward_batch
from jacfunc._linear_map.seeded import one_by_one
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._remembered import CallKind
from jacfunc._torch import RandomState, below_transforms, inside_transform, levels
from jacfunc._trees import kind_of
from jacfunc._types import LeafFunction, Leaves

ResultT = TypeVar("ResultT")


class JacobianOperator:
    """The Jacobian of a function at a point, as a linear map: push tangents, pull cotangents.

    The function is evaluated when it must be: pushing tangents alone keeps no graph. Every
    evaluation draws the same random numbers, so that dropout has one mask in all sweeps. All
    evaluations must return the same outputs, whatever else the function draws or keeps.
    """

    def __init__(
        self, func: LeafFunction, primals: Leaves, evaluated: Linearization | None = None
    ) -> None:
        self.primals = primals
        self.func = func
        self._linearization = evaluated
        self._image: tuple[Leaves, Leaves] | None = None
        self._was_pushed: bool | None = False  # None if it was evaluated in a way of its own
        self._stays_with_first = False
        self._random_state: RandomState | None = None

    @property
    def call_kind(self) -> CallKind:
        """What plans are remembered by: equal for operators of one function that cost the same."""
        kind: CallKind | None = getattr(self.func, "call_kind", None)
        if kind is None:
            kind = CallKind(self.func, tuple([kind_of(p) for p in self.primals]), self.func)
        if not inside_transform():
            return kind
        return kind.among(levels(), tuple(below_transforms(p).shape for p in self.primals))

    def unevaluated(self) -> JacobianOperator:
        """A fresh operator of this function at this point, which draws the same random numbers."""
        fresh = JacobianOperator(self.func, self.primals)
        fresh._random_state = self._random_state
        return fresh

    def forget(self) -> None:
        """Drop the evaluation: its outputs, and its graph, which only pullbacks need."""
        self._linearization = self._image = None

    def forget_graph(self) -> None:
        """Drop the graph, which only pullbacks need; later evaluations must agree with this one."""
        self._linearization = None
        if self._image is not None:
            outputs, extras = self._image
            self._image = detached(outputs), detached(extras)

    def keep_graph(self) -> Linearization:
        """Evaluate with a graph, unless one is kept."""
        return self._linearized

    def stay_with_first(self) -> None:
        """Compare all evaluations with the first, after one that differs, too."""
        self._stays_with_first = True

    @property
    def transposed(self) -> Linearization | None:
        """The map of tangents by the graph of a pullback; None inside of transforms.

        Raises:
            Refused: if the backward pass is no differentiable function of its cotangent.
        """
        linearized = self._linearized
        return linearized.transpose and linearized.transposed()

    @property
    def outputs(self) -> Leaves:
        """Differentiable leaves of what the function returns at the primals."""
        return self.image()[0]

    def pullback(self, cotangents: Leaves, of: LeafNumbers = EVERY, last: bool = False) -> Leaves:
        """Jᵀ ȳ, ``[*out]`` → ``[*in]``, ``of`` some outputs; the last one frees a plain graph."""
        pull = self._linearized.pull_last if last else self._linearized.pull
        return self.refusing("pull cotangents back", lambda: pull(cotangents, EVERY, of))

    def pullback_batch(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> Leaves:
        """K pullbacks at once, ``[K, *out]`` → ``[K, *in]``, of cotangents ``of`` some outputs."""
        return self.pullback_onto(EVERY, cotangents, of)

    def pullback_onto(self, onto: slice, cotangents: Leaves, of: LeafNumbers = EVERY) -> Leaves:
        """K pullbacks at once, ``[K, *out]`` → ``[K, *in]``, onto a slice of the primals."""
        if _is_empty(cotangents):
            return _no_products(self.primals[onto])
        pull = self._linearized.pull_batch
        return self.refusing("pull cotangents back", lambda: pull(cotangents, onto, of))

    def pullback_each(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> Leaves:
        """K pullbacks without vmap, one after the other: ``[K, *out]`` → ``[K, *in]``."""
        if _is_empty(cotangents):
            return _no_products(self.primals)
        return one_by_one(lambda seeds: self.pullback(seeds, of), cotangents)

    def pushforward(self, tangents: Leaves) -> Leaves:
        """J ẋ: ``[*in]`` → ``[*out]``."""
        # a function that writes into its inputs writes into their tangents too
        copies = tuple(tangent.clone() for tangent in tangents)
        with alone():
            self.rewind_generators()
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
                self.rewind_generators()
                outputs, products, extras = pushforward_batch(
                    self.func, self.primals, tangents, randomness
                )
        except Exception as error:  # torch has no type for what it can't do
            check_fallback(error)
            handled(error)
            note("tangents could not be pushed at once, columns go one by one: %s", error)
        else:
            self._keep(outputs, extras, was_pushed=True)
            return products
        # not where the error is known: its traceback holds what was pushed at once
        return one_by_one(self.pushforward, tangents)

    def pushforward_each(self, tangents: Leaves) -> Leaves:
        """K pushforwards without vmap, one after the other: ``[K, *in]`` → ``[K, *out]``."""
        if _is_empty(tangents):
            return _no_products(self.outputs)
        return one_by_one(self.pushforward, tangents)

    @property
    def _linearized(self) -> Linearization:
        if self._linearization is None:
            run = partial(linearize, self.func, self.primals)
            if self._random_state is None:
                linearized = self.refusing("keep a graph", run)
            else:
                with alone():
                    self.rewind_generators()
                    linearized = self.refusing("keep a graph", run)
            self._keep(linearized.outputs, linearized.extras, was_pushed=False)
            self._linearization = linearized
        return self._linearization

    def _keep(self, outputs: Leaves, extras: Leaves, was_pushed: bool) -> None:
        """Keep what the first evaluation returned; later ones must agree with it."""
        if self._image is None:
            self._image, self._was_pushed = (outputs, extras), was_pushed
            return
        first = self._image
        if not self._stays_with_first:  # if the check fails, another strategy begins anew
            self._image = None
        same_way = was_pushed == self._was_pushed
        try:
            check_agreement(first[0], outputs, same_way)
        except Changes:
            # two ways to evaluate may round differently; one way does not differ from itself
            if same_way or not differ_by_rounding(first[0], outputs):
                raise
            with alone():
                self.rewind_generators()
                again = linearize(self.func, self.primals).outputs
            plain = first[0] if was_pushed else outputs
            check_agreement(plain, again, same_way=self._was_pushed is not None)
        self._image = first

    def image(self) -> tuple[Leaves, Leaves]:
        """Outputs and extras: the differentiable leaves that the function returns, and others."""
        if self._image is None:
            linearized = self._linearized
            return linearized.outputs, linearized.extras
        return self._image

    @property
    def is_evaluated(self) -> bool:
        """Are there outputs of an evaluation already?"""
        return not (self._image is None and self._linearization is None)

    def keep_image(self, outputs: Leaves, extras: Leaves, in_same_way: bool = True) -> None:
        """Take outputs and extras of an evaluation that was made elsewhere."""
        self._image, self._was_pushed = (outputs, extras), False if in_same_way else None

    def rewind_generators(self, first: RandomState | None = None) -> None:
        """Set the generators back to where they were before the first evaluation.

        It is called before each of several evaluations, so that all draw the same numbers: those
        from now on, or from another state as the ``first``.
        """
        if torch.compiler.is_compiling():
            return
        if self._random_state is not None:
            self._random_state.repeat()
        self._random_state = self._random_state or first or RandomState(self.primals)

    def refusing(self, what: str, run: Callable[[], ResultT]) -> ResultT:
        """The result of ``run``. An error that the function alone does not raise is a refusal.

        Raises:
            Refused: if torch can't do ``what`` through the function, which runs without us.
        """
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


def _is_empty(seeds: Leaves) -> bool:
    """Are there no seeds, or no leaves that could have one? Torch's sweeps fail on both."""
    return len(seeds) == 0 or seeds[0].shape[0] == 0


def _no_products(leaves: Leaves) -> Leaves:
    """Products ``[0, *shape]`` of no seeds."""
    return tuple(leaf.new_empty((0, *leaf.shape)) for leaf in leaves)
