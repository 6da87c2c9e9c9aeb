"""What answers are compared with: rows by a plain loop of autograd, and torch's own recipe."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from jacfunc._arguments import check_outputs
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._measuring import Run
from jacfunc._torch import RandomState, run_as_written
from jacfunc._trees import flatten, map_tensors, paths
from jacfunc._trials import IN_FRONT
from jacfunc._types import Leaves, Tree, is_differentiable
from jacfunc.compare._problem import API, Problem

MOST_ROWS = 10_000
"""Rows of one sample at most: nobody waits for more."""


@dataclass(frozen=True)
class Sample:
    """One sample evaluated, or a whole batch that is not taken apart.

    Args:
        outputs: its differentiable leaves, without the batch.
        targets: the leaves that it is differentiated by.
        shapes: those that the targets have in the Jacobian: inputs are there without the batch.
    """

    outputs: Leaves
    targets: Leaves
    shapes: tuple[torch.Size, ...]

    def row(self, leaf: int, entry: int) -> Leaves:
        """Gradients of one entry of an output, a target each; zeros where it depends on none."""
        scalar = self.outputs[leaf].reshape(-1)[entry]
        if not scalar.requires_grad or not self.targets:
            return tuple(scalar.new_zeros(shape) for shape in self.shapes)
        grads = torch.autograd.grad(scalar, self.targets, retain_graph=True, allow_unused=True)
        return tuple(
            target.new_zeros(shape) if grad is None else grad.reshape(shape)
            for grad, target, shape in zip(grads, self.targets, self.shapes, strict=True)
        )


class Reference:
    """A problem evaluated sample by sample; no derivative is jacfunc's or torch.func's.

    Args:
        is_exact: evaluate a copy in float64 on the CPU, not the problem itself.
    """

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
            self._lend, self._params = partial(_lent, state, point), tuple(point.values())
        self._random_state = RandomState(self.problem.samples()[0].leaves)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The context in which samples are evaluated and rows are pulled back."""
        with torch.enable_grad(), self._lend():
            yield
        self._random_state.repeat()

    def sample(self, number: int) -> Sample:
        """One sample, evaluated from the random state that all samples begin with."""
        self._random_state.repeat()
        problem, (tensors, dims) = self.problem, self.problem.samples()
        leaves = [
            x.detach().clone() if d is None else x.detach().narrow(d, number, 1).clone()
            for x, d in zip(tensors.leaves, dims, strict=True)
        ]
        inputs = [(leaves[n].requires_grad_(), dims[n]) for n in problem.varied()]
        targets, shapes = self._params, [param.shape for param in self._params]
        if not problem.by_params:
            targets = tuple(x for x, _ in inputs)
            shapes = [x.shape if d is None else x.select(d, 0).shape for x, d in inputs]
        # clones, so that the function may write into its arguments
        args, kwargs = tensors.merge([x.clone() if x.requires_grad else x for x in leaves])
        output = run_as_written(problem.target, *args, **kwargs)
        if problem.is_sampled:
            output = problem.output_dims.in_front(output)
        outputs = flatten(output)[0]
        check_outputs(API, outputs, lambda: paths(output, "output"))
        outputs = [out for out in outputs if is_differentiable(out)]
        if problem.is_sampled:
            outputs = [out.squeeze(0) for out in outputs]
        self.is_random = self._random_state.has_changed()
        return Sample(tuple(outputs), targets, tuple(shapes))

    def try_out(self) -> Sample:
        """The first sample; one of its rows is taken to see that the problem runs."""
        with self.ready():
            sample = self.sample(0)
            next(self.rows(), None)
        return sample

    def rows(self) -> Iterator[tuple[int, int, Leaves]]:
        """Rows in random order: output leaf, number among the rows of all samples, gradients."""
        order = random.Random(0)
        for number in order.sample(range(self.size), self.size):
            sample = self.sample(number)
            sizes = [output.numel() for output in sample.outputs]
            ends = list(accumulate(sizes))
            for row in order.sample(range(sum(sizes)), min(sum(sizes), MOST_ROWS)):
                leaf = bisect_right(ends, row)
                entry = row - ends[leaf] + sizes[leaf]
                yield leaf, number * sizes[leaf] + entry, sample.row(leaf, entry)


@contextmanager
def _lent(state: ModuleState, params: dict[str, Tensor]) -> Iterator[None]:
    """A module lent for many evaluations, all with these parameters."""
    with state.lent_for_call(API, params), state.lent_for_evaluation(params):
        yield


def reference_of(problem: Problem) -> Reference:
    """The reference in float64, on a copy on the CPU, where that runs; else as the problem is.

    Raises:
        ValueError: the problem does not run, or has no backward pass.
    """
    try:
        reference = Reference(problem, is_exact=True)
        reference.try_out()
        if not reference.is_random:  # other numbers are drawn in another dtype
            return reference
    except Exception as error:  # whatever a module that knows its own dtype or device may raise
        note("the reference is not taken in float64: %s", error)
    try:
        reference = Reference(problem, is_exact=False)
        reference.try_out()
    except Exception as error:
        if str(error).startswith(f"{API}: "):
            raise
        line = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"{API}: the problem must run and have a backward pass, got {type(error).__name__}: "
            f"{line.rstrip('.')}. Call it once, and torch.autograd.grad on what it returns."
        ) from error
    if reference.is_random and problem.is_sampled and problem.randomness == "error":
        raise ValueError(
            f"{API}: a module that draws random numbers must have randomness='same', got 'error'. "
            "Return jacfunc.compare.Problem(module, inputs, randomness='same'), or call eval()."
        )
    return reference


def baseline_of(problem: Problem) -> str:
    """The name of torch's own recipe, which is the baseline of all times."""
    return "vmap(torch.func.jacrev)" if problem.is_sampled else "torch.func.jacrev"


def by_recipe(problem: Problem) -> Run:
    """``jacrev`` as in torch's tutorial: of ``functional_call``, and by samples under ``vmap``."""
    module = problem.module
    if module is None:
        func = partial(problem.target, **problem.kwargs)
        return partial(torch.func.jacrev(func, argnums=problem.argnums), *problem.args)
    tensors, dims = problem.samples()
    # detached, as in the tutorial: with parameters that require grad the result keeps its graph
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    output_dims = problem.output_dims if problem.is_sampled else IN_FRONT

    def call(params: dict[str, Tensor], *leaves: Tensor) -> Tree:
        batch = [x if d is None else x.unsqueeze(d) for x, d in zip(leaves, dims, strict=True)]
        args, kwargs = tensors.merge(batch)
        output = functional_call(module, params, args, kwargs)
        output = output_dims.in_front(output)
        return map_tensors(lambda x: x.squeeze(0), output) if problem.is_sampled else output

    argnums = 0 if problem.by_params else tuple(n + 1 for n in problem.varied())
    take: Callable[..., Any] = torch.func.jacrev(call, argnums=argnums)
    if problem.is_sampled:
        take = torch.func.vmap(take, in_dims=(None, *dims), randomness=problem.randomness)
    return partial(take, params, *tensors.leaves)
