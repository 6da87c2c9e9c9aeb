"""The problem: a function or a module, its arguments, and what is differentiated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._arguments import wrap_argnums
from jacfunc._functions import jacobian
from jacfunc._lending import ModuleState
from jacfunc._linear_map import batch_size
from jacfunc._measuring import Run, is_here
from jacfunc._modules import Batching, ModuleCall, Wrt, argnums_of, module_jacobian
from jacfunc._trees import Split, check_batch, flatten, map_tensors, sample_dims
from jacfunc._trials import OutputDims
from jacfunc._types import Argnums, Memory, Randomness, Tree, is_differentiable, is_tensor
from jacfunc.strategies import Strategy

API = "compare"


@dataclass(frozen=True)
class Problem:
    """A Jacobian that is to be taken by every strategy.

    Args:
        target: an ``nn.Module``, or a function of trees that returns a tree of tensors.
        args: its positional arguments.
        kwargs: its arguments by keyword.
        wrt: what a module is differentiated by: ``"params"`` (the trainable ones) or ``"inputs"``.
        per_sample: differentiate each sample of a module's batch alone.
        argnums: the positional arguments that a function is differentiated by.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: for random layers: ``"error"``, or ``"same"`` numbers for all samples.

    Raises:
        TypeError, ValueError: options that do not fit.

    Example:
        >>> import torch
        >>> from jacfunc.compare import Problem
        >>> Problem(torch.nn.Linear(3, 2), (torch.ones(5, 3),), wrt="inputs").describe()
        'Per-sample Jacobian of Linear in its inputs, 5 samples'
    """

    target: Callable[..., Any] | nn.Module
    args: tuple[Tree, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrt: Wrt = "params"
    per_sample: bool = True
    argnums: Argnums = 0
    in_dims: Tree = 0
    randomness: Randomness = "error"

    def __post_init__(self) -> None:
        if not callable(self.target):
            raise TypeError(
                f"{API}: target must be an nn.Module or a function, got "
                f"{type(self.target).__name__}. Give what is to be differentiated first."
            )
        if not isinstance(self.args, tuple) or not (self.args or self.kwargs):
            raise TypeError(
                f"{API}: args must be a tuple of what {_name_of(self.target)} is called with, got "
                f"{self.args!r:.40}. Return (module, *inputs) or (func, *args)."
            )
        if self.randomness not in ("error", "same"):
            raise ValueError(
                f"{API}: randomness must be 'error' or 'same', got {self.randomness!r}. With other "
                "numbers each time no answer could be checked; 'same' takes as long."
            )
        if self.module is None:
            wrap_argnums(API, self.argnums, len(self.args))
            return
        argnums_of(API, self.wrt)
        if self.per_sample:
            tensors, dims = self.samples()
            check_batch(API, tensors.leaves, dims)

    @classmethod
    def of(cls, value: object) -> Problem:
        """The problem that a user's function returns, as a tuple or as it is."""
        if isinstance(value, Problem):
            return value
        if isinstance(value, tuple) and value and callable(value[0]):
            return cls(value[0], value[1:])
        kinds = f"({', '.join(type(x).__name__ for x in value)})" if type(value) is tuple else None
        raise TypeError(
            f"{API}: a problem must be (module, *inputs), (func, *args) or a "
            f"jacfunc.compare.Problem, got {kinds or type(value).__name__}. "
            "Return what is to be differentiated, then what it is called with."
        )

    @property
    def module(self) -> nn.Module | None:
        """The target, if it is a module."""
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def is_sampled(self) -> bool:
        """Is each sample differentiated alone?"""
        return self.per_sample and self.module is not None

    @property
    def by_params(self) -> bool:
        """Is the target a module that is differentiated by its parameters?"""
        return self.module is not None and self.wrt == "params"

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters of a module, and all tensors among the arguments."""
        leaves = flatten((self.args, dict(self.kwargs)))[0]
        return [*(self.module.parameters() if self.module else ()), *filter(is_tensor, leaves)]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next((x.device for x in self.tensors), torch.device("cpu"))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all floating tensors."""
        dtypes = {x.dtype for x in self.tensors if x.is_floating_point()}
        return dtypes or {torch.get_default_dtype()}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Problem:
        """A copy on a device, in a dtype; what a function closes over is not copied."""
        device = torch.device(device)
        if not is_here(device):
            raise ValueError(
                f"{API}: device must be one that this machine has, got {str(device)!r}. "
                f"It has {'cpu, cuda' if torch.cuda.is_available() else 'cpu'}."
            )

        def copied(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype if x.is_floating_point() else None)

        target = self.target
        if isinstance(target, nn.Module):
            target = copy.deepcopy(target).to(device, dtype)
        args, kwargs = map_tensors(copied, (self.args, dict(self.kwargs)))
        return replace(self, target=target, args=args, kwargs=kwargs)

    def jacobian(self, strategy: str | Strategy, memory: Memory = None) -> Run:
        """A call that takes the Jacobian by jacfunc."""
        if self.module is None:
            take = jacobian(self.target, self.argnums, strategy=strategy, memory=memory)
        else:
            take = module_jacobian(
                self.module,
                self.wrt,
                per_sample=self.per_sample,
                in_dims=self.in_dims,
                strategy=strategy,
                memory=memory,
                randomness=self.randomness,
            )
        return partial(take, *self.args, **self.kwargs)

    def call(self) -> ModuleCall:
        """The call of the module, as jacfunc makes it."""
        assert self.module is not None
        state, arguments = ModuleState.of(API, self.module, None), (self.args, dict(self.kwargs))
        call = ModuleCall(API, state, arguments, argnums_of(API, self.wrt))
        return call.with_samples(self.batching) if self.is_sampled else call

    @cached_property
    def output_dims(self) -> OutputDims:
        """Where the outputs of a module hold its samples."""
        return self.call().output_dims

    @property
    def batching(self) -> Batching:
        """Where the inputs of a module hold its samples."""
        return Batching(self.in_dims, self.randomness)

    def check_samples(self) -> None:
        """Refuse samples that are known to depend on each other, by batch normalization, say."""
        if self.is_sampled:
            with _told_of_the_whole():
                self.call().batch(self.batching)

    def check_independent(self) -> None:
        """Refuse samples that depend on each other: no sample has a Jacobian of its own."""
        if self.is_sampled:
            call = self.call()
            with _told_of_the_whole(), call.undisturbed():
                call.check_independent(call.batch(self.batching))

    def samples(self) -> tuple[Split, list[int | None]]:
        """All tensors among the arguments, and the dimension in which each holds the samples."""
        arguments = self.args, dict(self.kwargs)
        tensors = Split.of(arguments, is_tensor)
        if not self.is_sampled:
            return tensors, [None] * len(tensors.leaves)
        every = sample_dims(API, self.in_dims, arguments, tensors)
        return tensors, [d for d, yes in zip(every, tensors.is_chosen, strict=True) if yes]

    def varied(self) -> list[int]:
        """The numbers of those tensors among the arguments that are differentiated, in order."""
        leaves = self.samples()[0].leaves
        if self.module is not None:
            return [n for n, x in enumerate(leaves) if is_differentiable(x) and not self.by_params]
        owners = [n for n, arg in enumerate(self.args) for x in flatten(arg)[0] if is_tensor(x)]
        return [
            n
            for position in wrap_argnums(API, self.argnums, len(self.args))
            for n, owner in enumerate(owners)
            if owner == position and is_differentiable(leaves[n])
        ]

    def size(self) -> int:
        """The number of samples; 1 where the batch is not taken apart."""
        tensors, dims = self.samples()
        return batch_size(tensors.leaves, dims)

    def describe(self) -> str:
        """The problem in words."""
        name = _name_of(self.target)
        if self.module is None:
            return f"Jacobian of {name} in argnums={self.argnums}"
        what = "parameters" if self.by_params else "inputs"
        if not self.per_sample:
            return f"Jacobian of {name} in its {what}, the batch as a whole"
        return f"Per-sample Jacobian of {name} in its {what}, {self.size()} samples"


def _name_of(target: object) -> str:
    name = getattr(target, "__name__", type(target).__name__)
    return "a function" if name == "<lambda>" else str(name)


@contextmanager
def _told_of_the_whole() -> Iterator[None]:
    """Refusals of samples say how the batch is compared as a whole."""
    try:
        yield
    except ValueError as error:
        whole = "For the batch as a whole: --whole, or Problem(..., per_sample=False)."
        raise type(error)(f"{error} {whole}") from error
