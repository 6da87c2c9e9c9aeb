"""What jacfunc is compared with: rows by a plain loop of autograd, and torch's own recipe."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jacfunc._arguments import check_outputs, wrap_argnums
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._measuring import Run
from jacfunc._torch import RandomState
from jacfunc._trees import Split, flatten, map_tensors, paths
from jacfunc._types import Argnums, Leaves, Tree, is_differentiable
from jacfunc.compare._problem import API, Problem

MOST_ROWS = 10_000
"""Of a sample: nobody waits for more."""


@dataclass(frozen=True)
class Sample:
    """One sample evaluated (of a whole, all of it): what is differentiated, and by what."""

    outputs: Leaves
    targets: Leaves
    shapes: tuple[torch.Size, ...]
    """Of the targets in the Jacobian: inputs are there without the batch."""


class Plain:
    """A problem evaluated sample by sample, on a graph of autograd's own."""

    def __init__(self, problem: Problem, is_exact: bool) -> None:
        self.problem = problem.to("cpu", torch.float64) if is_exact else problem
        self.is_exact, self.is_random, self.size = is_exact, False, problem.size()
        module = self.problem.module
        self._lend: Callable[[], AbstractContextManager[None]] = nullcontext
        self._params: Leaves = ()
        if module is not None and is_exact:
            self._params = tuple(param for param in module.parameters() if param.requires_grad)
        elif module is not None:
            # what could not be copied must be left as it was
            state = ModuleState.of(API, module, None)
            point = {name: p.detach().requires_grad_() for name, p in state.point.items()}
            self._lend, self._params = partial(state.lent, point), tuple(point.values())
        self._draws = RandomState(self.problem.samples()[0].leaves)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Around evaluations and the rows that are pulled back from them."""
        with self._lend():
            yield
        self._draws.repeat()

    def sample(self, number: int) -> Sample:
        """Evaluated, from the same random state for each."""
        self._draws.repeat()
        module = self.problem.module
        with torch.enable_grad():
            found = self._of_function() if module is None else self._of_module(module, number)
        self.is_random = self._draws.were_taken()
        return found

    def try_out(self) -> Sample:
        """The first sample, and one of its rows, to see that it runs."""
        with self.at_hand():
            sample = self.sample(0)
            next(self.rows(), None)
        return sample

    def rows(self) -> Iterator[tuple[int, int, Leaves]]:
        """Output leaf, row among those of all samples, gradients by target; in random order."""
        order = random.Random(0)
        for number in order.sample(range(self.size), self.size):
            sample = self.sample(number)
            ends = list(accumulate(output.numel() for output in sample.outputs))
            total = ends[-1] if ends else 0
            for entry in order.sample(range(total), min(total, MOST_ROWS)):
                leaf = bisect_right(ends, entry)
                output = sample.outputs[leaf]
                place = entry - ends[leaf] + output.numel()
                gradients = _gradients(output.reshape(-1)[place], sample.targets, sample.shapes)
                yield leaf, number * output.numel() + place, gradients

    def _of_function(self) -> Sample:
        problem = self.problem
        args = list(problem.args)
        targets: list[Tensor] = []
        for n in wrap_argnums(API, problem.argnums, len(args)):
            split = Split.of(args[n])
            fresh = [leaf.detach().clone().requires_grad_() for leaf in split.leaves]
            # clones, so that the function may write into its arguments
            args[n] = split.merge([leaf.clone() for leaf in fresh])
            targets += fresh
        output = problem.target(*args, **problem.kwargs)
        return Sample(_checked(output), tuple(targets), tuple(x.shape for x in targets))

    def _of_module(self, module: nn.Module, number: int) -> Sample:
        problem = self.problem
        tensors, dims = problem.samples()
        fresh = [
            x.detach().clone() if d is None else x.detach().narrow(d, number, 1).clone()
            for x, d in zip(tensors.leaves, dims, strict=True)
        ]
        targets, shapes = self._params, [param.shape for param in self._params]
        if not problem.by_params:
            chosen = [(x, d) for x, d in zip(fresh, dims, strict=True) if is_differentiable(x)]
            targets = tuple(x.requires_grad_() for x, _ in chosen)
            shapes = [x.shape if d is None else x.select(d, 0).shape for x, d in chosen]
        args, kwargs = tensors.merge([x.clone() if x.requires_grad else x for x in fresh])
        outputs = _checked(module(*args, **kwargs))
        if problem.is_sampled:
            outputs = tuple(out.squeeze(0) for out in outputs)
        return Sample(outputs, targets, tuple(shapes))


def plain_of(problem: Problem) -> Plain:
    """In float64, on a copy on the CPU, where that runs; else as the problem is given.

    Raises:
        ValueError: it does not run, or has no backward pass.
    """
    try:
        plain = Plain(problem, is_exact=True)
        plain.try_out()
        if not plain.is_random:  # other numbers are drawn in another dtype
            return plain
    except Exception as error:  # whatever a module that knows its own dtype or device may raise
        note("the reference is not taken in float64: %s", error)
    try:
        plain = Plain(problem, is_exact=False)
        plain.try_out()
    except Exception as error:
        if str(error).startswith(f"{API}: "):
            raise
        line = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"{API}: the problem must run and have a backward pass, got {type(error).__name__}: "
            f"{line.rstrip('.')}. Call it once, and torch.autograd.grad on what it returns."
        ) from error
    if plain.is_random and problem.is_sampled and problem.randomness == "error":
        raise ValueError(
            f"{API}: a module that draws random numbers must have randomness='same', got 'error'. "
            "Return jacfunc.compare.Problem(module, inputs, randomness='same'), or call eval()."
        )
    return plain


def _gradients(scalar: Tensor, targets: Leaves, shapes: Sequence[torch.Size]) -> Leaves:
    """One row: zeros where the scalar does not depend on a target."""
    if not scalar.requires_grad or not targets:
        return tuple(scalar.new_zeros(shape) for shape in shapes)
    found = torch.autograd.grad(scalar, targets, retain_graph=True, allow_unused=True)
    return tuple(
        target.new_zeros(shape) if grad is None else grad.reshape(shape)
        for grad, target, shape in zip(found, targets, shapes, strict=True)
    )


def _checked(output: Tree) -> Leaves:
    """The leaves that are differentiated."""
    leaves = flatten(output)[0]
    check_outputs(API, leaves, lambda: paths(output, "output"))
    return tuple(filter(is_differentiable, leaves))


def baseline_of(problem: Problem) -> str:
    """The name of torch's own way."""
    return "vmap(torch.func.jacrev)" if problem.is_sampled else "torch.func.jacrev"


def by_recipe(problem: Problem) -> Run:
    """``jacrev`` of the function, or of ``functional_call``; over samples with ``vmap``."""
    form = form_of(problem)
    take: Callable[..., Any] = torch.func.jacrev(form.func, argnums=form.argnums)
    if problem.is_sampled:
        take = torch.func.vmap(take, in_dims=form.dims, randomness=problem.randomness)
    return partial(take, *form.args)


@dataclass(frozen=True)
class PlainFunction:
    """A problem as a plain function, of one sample where these are differentiated alone.

    Args:
        args: of all samples.
        dims: where each of the args has the samples.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: Argnums
    dims: tuple[int | None, ...]


def form_of(problem: Problem) -> PlainFunction:
    """By torch's ``functional_call``, as its tutorial writes it."""
    module = problem.module
    if module is None:
        func = partial(problem.target, **problem.kwargs)
        return PlainFunction(func, problem.args, problem.argnums, (None,) * len(problem.args))
    tensors, dims = problem.samples()
    # detached, as in the tutorial: with parameters that require grad the result keeps its graph
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def call(params: dict[str, Tensor], *leaves: Tensor) -> Tree:
        args, kwargs = tensors.merge(as_batch(leaves, dims))
        output = functional_call(module, params, args, kwargs)
        return map_tensors(lambda x: x.squeeze(0), output) if problem.is_sampled else output

    if problem.by_params:
        return PlainFunction(call, (params, *tensors.leaves), 0, (None, *dims))
    floating = tuple(n for n, x in enumerate(tensors.leaves) if x.is_floating_point())
    return PlainFunction(partial(call, params), tensors.leaves, floating, tuple(dims))


def as_batch(leaves: Leaves, dims: list[int | None]) -> Leaves:
    """The leaves of one sample as a batch of one."""
    return tuple(x if d is None else x.unsqueeze(d) for x, d in zip(leaves, dims, strict=True))
