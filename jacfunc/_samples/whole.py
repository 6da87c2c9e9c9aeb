"""Batches evaluated as a whole, as their owner does: samples are separated in the sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jacfunc._calls import FlatCall
from jacfunc._errors import RANDOM, Refused
from jacfunc._factored import (
    Evidence,
    FactoredJacobian,
    LearnedUses,
    NoLayout,
    PlainSamples,
    Trace,
    Unlike,
    WholeBatch,
    factored,
)
from jacfunc._linear_map import Dims
from jacfunc._torch import RandomState, noise_like

MOST_LESSONS = 8
"""How often a batch is evaluated until it is known where its tensors hold the samples."""


@dataclass(frozen=True)
class WholeBatches:
    """A call that takes all samples at once.

    Args:
        call_of: makes the call of the samples from start to stop, and says in which dimension each
            of its primals holds the samples, or None.
        learned: what earlier evaluations have shown.
        random_state: as every evaluation finds it.
        may_draw: may the batch draw random numbers?
    """

    call_of: Callable[[int, int], tuple[FlatCall, Dims]]
    learned: LearnedUses
    random_state: RandomState
    may_draw: bool

    def factored(self, start: int, stop: int) -> tuple[FactoredJacobian, FlatCall]:
        """The samples from start to stop, evaluated, and the call that was made.

        Raises:
            Refused: if the tensors of the batch do not hold the samples in one dimension.
        """
        learned, size = self.learned, stop - start
        is_known = size == 1 or (learned.sites is not None and not learned.moves_samples)
        is_new = False
        for _ in range(MOST_LESSONS):
            trace = None if is_known else self._trace(start + learned.lessons % size)
            placing = PlainSamples(size, (is_known and learned.sites) or {}, trace)
            call, dims = self.call_of(start, stop)
            batch = WholeBatch(call, call.primals, dims, size, placing)
            try:
                jacobian = factored(batch, learned, self.random_state.repeat)
            except Unlike:
                is_known = False
                continue
            except NoLayout as error:
                if error.numbers <= learned.others:
                    raise Refused("a tensor of the batch has no dimension of samples") from error
                learned.others |= error.numbers
                continue
            if not self.may_draw and self.random_state.has_changed():
                raise Refused(RANDOM)
            learned.moves_samples = jacobian.moves_samples
            if trace is not None:
                if self._learn(jacobian, placing, start):
                    return jacobian, call
                is_known = is_new = True
            elif size == 1 or (is_new or not jacobian.moves_samples) and self._is_known(jacobian):
                return jacobian, call
            else:
                is_known = False
        raise Refused("it calls other operations at every evaluation")

    def _is_known(self, jacobian: FactoredJacobian) -> bool:
        """Were layouts learned from an evaluation that called the same operations?"""
        return jacobian.signature in self.learned.signatures

    def _trace(self, number: int) -> Trace:
        """The operations of one sample alone."""
        trace, learned = Trace(number), self.learned
        call, dims = self.call_of(number, number + 1)
        one = WholeBatch(call, call.primals, dims, 1, PlainSamples(1, {}), trace)
        as_of_batch = LearnedUses(set(learned.others), set(learned.written))
        factored(one, as_of_batch, self.random_state.repeat)
        return trace

    def _learn(self, jacobian: FactoredJacobian, placing: PlainSamples, start: int) -> bool:
        """Learn the layouts from an evaluation; False if they are others than it was made with."""
        learned, size, trace = self.learned, jacobian.size, placing.trace
        assert trace is not None
        is_random = self.random_state.has_changed()
        learned.lessons += 1
        generator = torch.Generator().manual_seed(learned.lessons)
        inside = torch.randperm(size, generator=generator, device="cpu")[: size // 2]
        cotangents = []
        for noise in noise_like(jacobian.outputs, seed=learned.lessons):
            seeds = torch.zeros_like(noise)
            seeds[inside] = noise[inside]
            cotangents.append(seeds.unsqueeze(0))
        products = jacobian.linearization.pull_batch(tuple(cotangents))
        pulled = {use.key: x for use, x in zip(jacobian.uses, products, strict=False)}
        evidence = Evidence(trace.number - start, size, is_random, inside, pulled)
        sites, unknown = evidence.sites(placing.seen)
        if any(number < 0 for number in unknown):
            raise Refused("what it returns for a sample changes with the batch")
        learned.learn_sites(sites, jacobian.signature)
        others = jacobian.params_of(unknown)
        learned.others |= others
        first = {key: seen.layouts[0] for key, seen in placing.seen.items()}
        return not others and all(
            site is None or site.layout == first[key] for key, site in sites.items()
        )
