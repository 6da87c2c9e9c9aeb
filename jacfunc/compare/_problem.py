"""What is to be compared: a function or a module, the point, and what is differentiated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._arguments import wrap_argnums
from jacfunc._functions import jacobian
from jacfunc._lending import ModuleState
from jacfunc._measuring import Run, is_here
from jacfunc._modules import Batching, ModuleCall, Wrt, argnums_of, module_jacobian
from jacfunc._trees import Split, check_batch, flatten, map_tensors, sample_dims
from jacfunc._types import Argnums, Memory, Randomness, Tree, is_tensor
from jacfunc.strategies import Strategy

API = "compare"


@dataclass(frozen=True)
class Problem:
    """A Jacobian that is to be taken by every strategy: of what, where, and in what.

    Args:
        target: an ``nn.Module``, or a function of trees that returns a tree of tensors.
        args: its positional arguments.
        kwargs: its arguments by keyword.
        wrt: of a module: ``"params"`` (those that are trainable) or ``"inputs"``.
        per_sample: of a module: each sample of the batch on its own.
        argnums: of a function: which positional arguments are differentiated.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: of random layers: ``"error"``, or ``"same"`` numbers for all samples.

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
    def of(cls, given: object) -> Problem:
        """From what a user's function returns."""
        if isinstance(given, Problem):
            return given
        if isinstance(given, tuple) and given and callable(given[0]):
            return cls(given[0], given[1:])
        kinds = f"({', '.join(type(x).__name__ for x in given)})" if type(given) is tuple else None
        raise TypeError(
            f"{API}: a problem must be (module, *inputs), (func, *args) or a "
            f"jacfunc.compare.Problem, got {kinds or type(given).__name__}. "
            "Return what is to be differentiated, then what it is called with."
        )

    @property
    def module(self) -> nn.Module | None:
        """The target, if it is one."""
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def is_sampled(self) -> bool:
        """Is each sample differentiated on its own?"""
        return self.per_sample and self.module is not None

    @property
    def by_params(self) -> bool:
        """Is it a module, differentiated by its parameters?"""
        return self.module is not None and self.wrt == "params"

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, and all tensors among the arguments."""
        leaves = flatten((self.args, dict(self.kwargs)))[0]
        return [*(self.module.parameters() if self.module else ()), *filter(is_tensor, leaves)]

    @property
    def device(self) -> torch.device:
        """Of the first tensor."""
        return next((x.device for x in self.tensors), torch.device("cpu"))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the floating tensors."""
        found = {x.dtype for x in self.tensors if x.is_floating_point()}
        return found or {torch.get_default_dtype()}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Problem:
        """A copy there; a function takes along what it closes over as it is."""
        device = torch.device(device)
        if not is_here(device):
            raise ValueError(
                f"{API}: device must be one that this machine has, got {str(device)!r}. "
                f"It has {'cpu, cuda' if torch.cuda.is_available() else 'cpu'}."
            )

        def there(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype if x.is_floating_point() else None)

        target = self.target
        if isinstance(target, nn.Module):
            target = copy.deepcopy(target).to(device, dtype)
        args, kwargs = map_tensors(there, (self.args, dict(self.kwargs)))
        return replace(self, target=target, args=args, kwargs=kwargs)

    def jacobian(self, strategy: str | Strategy, memory: Memory = None) -> Run:
        """As jacfunc takes it."""
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
        """Of a module, as jacfunc makes it."""
        assert self.module is not None
        state, arguments = ModuleState.of(API, self.module, None), (self.args, dict(self.kwargs))
        return ModuleCall(API, state, arguments, argnums_of(API, self.wrt))

    @property
    def batching(self) -> Batching:
        """Where the inputs of a module hold its samples."""
        return Batching(self.in_dims, self.randomness)

    def check_independent(self) -> None:
        """Refuse samples that depend on each other: there is no Jacobian of each alone."""
        if self.is_sampled:
            call = self.call()
            with call.undisturbed():
                call.check_independent(call.batch(self.batching))

    def samples(self) -> tuple[Split, list[int | None]]:
        """All tensors among the arguments, and the dimension in which each holds the samples."""
        arguments = self.args, dict(self.kwargs)
        tensors = Split.of(arguments, is_tensor)
        if not self.is_sampled:
            return tensors, [None] * len(tensors.leaves)
        every = sample_dims(API, self.in_dims, arguments)
        return tensors, [d for d, yes in zip(every, tensors.is_chosen, strict=True) if yes]

    def size(self) -> int:
        """Samples; a whole is one."""
        tensors, dims = self.samples()
        pairs = zip(tensors.leaves, dims, strict=True)
        return next((x.shape[d] for x, d in pairs if d is not None), 1)

    def describe(self) -> str:
        """In words."""
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
