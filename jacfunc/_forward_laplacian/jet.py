"""Jets, which carry derivatives, and the mode that sends what is done with them to the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Self, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import is_out_of_memory
from jacfunc._faults import TAKES_DERIVATIVES
from jacfunc._torch import inside_derivative, sweep_batch, tracked, untracked
from jacfunc._types import Leaves

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = Mapping[str, Any]
First: TypeAlias = Tensor | Callable[[], Tensor]
Rule: TypeAlias = Callable[["Propagation", Callable[..., Any], Args, Kwargs], Any]
"""From a propagation, a function of torch and its arguments, jets among them, to its result."""


class NoRule(NotImplementedError):  # noqa: N818 (no error: a sweep does it instead)
    """No rule carries derivatives through an operation that the function does."""


class Jet(Tensor):
    """A tensor with its first and second derivatives along N directions.

    It has a shape and no memory: whatever reaches it on a way that its propagation does not see, a
    transform, compiled code or a kernel, ends in :meth:`__torch_dispatch__`, and is refused there.

    Args:
        owner: the propagation whose directions these are.
        value: what the tensor is without derivatives, ``[*shape]``.
        first: first derivatives, ``[N, *shape]``, or what computes them when they are asked for:
            by then the tensors that it was made of may be gone.
        second: the sum of second derivatives ``[*shape]``, or each of them ``[N, *shape]``; None
            for zeros.
    """

    owner: Propagation
    value: Tensor
    second: Tensor | None

    @staticmethod
    def __new__(cls, owner: Propagation, value: Tensor, *_: Any) -> Jet:
        jet: Jet = Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )
        return jet

    def __init__(
        self, owner: Propagation, value: Tensor, first: First, second: Tensor | None
    ) -> None:
        self.owner, self.value, self._first, self.second = owner, value, first, second

    @property
    def first(self) -> Tensor:
        """First derivatives, ``[N, *shape]``."""
        if not isinstance(self._first, Tensor):
            self._first = self._first()
        return self._first

    @property
    def depth(self) -> int:
        """How many operations wait to compute first derivatives, this one's among them."""
        return getattr(self._first, "depth", 0)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> NoReturn:
        _give_up(args, f"{_name(func)} is called where no propagation sees it")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> NoReturn:
        _give_up(args, f"{func} is reached past the functions of torch")


class Propagation(TorchFunctionMode):
    """A context in which functions of torch carry the derivatives of jets, by rules.

    Args:
        rules: what is done instead of a function that gets a jet.
        is_summed: are second derivatives summed over the directions, as in a Laplacian?
        keeps_graph: may results be differentiated further by plain autograd?
    """

    reason: str | None = None
    """Why no derivatives come of it, if that is so."""

    def __init__(
        self, rules: Mapping[Callable[..., Any], Rule], is_summed: bool, keeps_graph: bool
    ) -> None:
        super().__init__()
        self._rules, self.is_summed, self._keeps_graph = rules, is_summed, keeps_graph
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
            self.give_up("it takes derivatives itself")
        if not self.jets(args, kwargs or {}):
            return func(*args, **kwargs) if kwargs else func(*args)
        rule = self._rules.get(func)
        if kwargs and kwargs.get("out") is not None:
            rule = None
        if rule is None:
            self.give_up(f"there is no rule for {_name(func)}")
        if not torch.is_grad_enabled():
            self.give_up("it takes gradients off, or has a backward pass of its own")
        try:
            with self._ruling(), nullcontext() if self._keeps_graph else torch.no_grad():
                return rule(self, func, args, kwargs or {})
        except Exception as error:  # the function's own errors are raised again by the sweep
            if is_out_of_memory(error):
                raise
            self.give_up(f"the rule for {_name(func)} does not cover it ({error})")

    def give_up(self, reason: str) -> NoReturn:
        """End the propagation: whatever the function does now, its result is not used.

        Raises:
            NoRule: always.
        """
        self.reason = self.reason or reason
        raise NoRule(self.reason)

    def owns(self, value: object) -> bool:
        """Is it a jet of this propagation? One of a propagation outside is a constant here."""
        return type(value) is Jet and value.owner is self

    def jets(self, args: Args, kwargs: Kwargs) -> list[Jet]:
        """The jets among arguments, and in the lists among them."""
        leaves = leaves_in((*args, *kwargs.values()))
        return [leaf for leaf in leaves if type(leaf) is Jet and leaf.owner is self]

    def value(self, of: Any) -> Any:
        """The value of a jet; whatever else as it is."""
        return of.value if self.owns(of) else of

    def jet(self, value: Any, first: First, second: Tensor | None) -> Any:
        """The value with derivatives, broadcast to its shape; as it is, if it is not floating."""
        if not value.is_floating_point():
            return value
        shape = value.shape
        if isinstance(first, Tensor) and first.shape[1:] != shape:
            first = first.expand(first.shape[:1] + shape)
        if second is not None:
            shape = shape if self.is_summed else second.shape[:1] + shape
            second = second if second.shape == shape else second.expand(shape)
        return Jet(self, value, first, second)

    def summed(self, products: Tensor) -> Tensor:
        """Products ``[N, *shape]`` of first derivatives as they are part of second ones."""
        return products.sum(0) if self.is_summed else products

    def squares(self, first: Tensor) -> Tensor:
        """The squares of first derivatives as they are part of second ones."""
        return self.summed(first.square())

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

    def pushed(self, linear: Callable[..., Leaves], *firsts: Tensor) -> Leaves:
        """A linear or bilinear map applied to each of N tensors ``[N, *shape]``."""
        return sweep_batch(lambda seeds: (linear(*seeds), ()), firsts)[0]

    def pushed_second(self, linear: Callable[..., Leaves], *seconds: Tensor) -> Leaves:
        """A linear map applied to second derivatives."""
        return linear(*seconds) if self.is_summed else self.pushed(linear, *seconds)


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of second derivatives, of which None are zeros."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return sum(there[1:], there[0])


def times(factor: Any, second: Tensor | None) -> Tensor | None:
    """A factor times second derivatives, of which None are zeros."""
    return None if second is None else factor * second


def leaves_in(values: Any) -> list[Any]:
    """All values in nested tuples and lists."""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, tuple | list):
            leaves += leaves_in(value)
        else:
            leaves.append(value)
    return leaves


def _give_up(args: Args, reason: str) -> NoReturn:
    """End the propagations whose jets are among the arguments, though the function may go on."""
    for leaf in leaves_in(args):
        if type(leaf) is Jet:
            leaf.owner.reason = leaf.owner.reason or reason
    raise NoRule(reason)


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"the attribute {owner}" if name in ("__get__", "__set__") else name or str(func)
