"""Checks that a module and its data, or what a function closes over, have not changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from jacfunc._lending.attributes import tensors_in
from jacfunc._lending.constants import versions_of
from jacfunc._lending.snapshot import Snapshot
from jacfunc._torch import RandomState, makes_plain_tensors
from jacfunc._types import Leaves


class Originals:
    """A module and tensors as they were at a call, to refuse later answers if they have changed.

    Args:
        snapshot: the parts of the module, of which nothing may be replaced.
        tensors: those of the module and of the arguments, into which nobody may write.
    """

    def __init__(self, snapshot: Snapshot, tensors: Sequence[Tensor]) -> None:
        self._snapshot, self._given = snapshot, tensors
        self._tensors = self._tensors_now()
        self._marks = self._marks_of(self._tensors)

    def check(self, api: str) -> None:
        """Refuse what has changed, so far as torch, or the module, tells of it.

        Raises:
            ValueError: if something has changed.
        """
        tensors = self._tensors_now()
        is_same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        is_unwritten = is_same and self._marks_of(tensors) == self._marks
        if not is_unwritten or self._snapshot.changed_parts():
            raise ValueError(
                f"{api}: with copy=False parameters, buffers, data, modes and hooks must stay as "
                "they were at the call, got some that were changed since. Call it again, or leave "
                "copy out, which answers from copies."
            )

    def _tensors_now(self) -> list[Tensor]:
        """The tensors, and those that containers among the attributes hold now."""
        plain = [part.plain for part in self._snapshot.parts if part.plain]
        return [*self._given, *(x for attributes in plain for x in tensors_in(attributes))]

    def _marks_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Versions and addresses, which writes and new data change, and modes of TorchScript."""
        marks: list[Any] = versions_of(tensors)
        kinds = (Tensor, nn.Parameter)
        marks += [x.data_ptr() for x in tensors if type(x) in kinds and x.layout == torch.strided]
        marks += [part.module.training for part in self._snapshot.parts if part.is_scripted]
        return marks


@dataclass(frozen=True)
class Captured:
    """The tensors that a function closes over, each with a copy from the time of a call."""

    pairs: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, func: object) -> Captured:
        """Copy the tensors that a function closes over."""
        return cls([(x, x.detach().clone()) for x in tensors_in(func)])

    def check(self, api: str, what: str) -> None:
        """Check that they are as they were.

        Raises:
            ValueError: if one of the tensors has changed.
        """
        for now, before in self.pairs:
            if not _are_equal(now, before):
                raise ValueError(
                    f"{api}: what {what} closes over must stay as it was at the call, got a "
                    f"tensor of shape {tuple(now.shape)} that was changed since. Call it again, "
                    "at the new point."
                )

    def versions(self) -> Sequence[int]:
        """How often torch has written into each."""
        return versions_of([now for now, _ in self.pairs])

    def undone(self, versions: Sequence[int]) -> bool:
        """Undo what torch has written into them since, and say whether there was anything.

        An evaluation of the function may write, as batch normalization does.
        """
        if self.versions() == versions:
            return False
        with torch.no_grad():
            for now, before in self.pairs:
                if not _are_equal(now, before):
                    now.copy_(before)
        return True


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys(
        (torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")
    ),
    **dict.fromkeys(
        (torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")
    ),
}
"""Methods that return the tensors in which a sparse one is kept."""


def _are_equal(now: Tensor, before: Tensor) -> bool:
    """Are these the same numbers, or nan in the same places?"""
    if parts := _PARTS.get(now.layout):
        pairs = [(getattr(now.detach(), part)(), getattr(before, part)()) for part in parts]
        return now.shape == before.shape and all(_are_equal(*pair) for pair in pairs)
    return torch.equal(now, before) or torch.equal(now.nan_to_num(), before.nan_to_num())


class Casting(NamedTuple):
    """Where autocast was on at a call, and to which dtype it cast."""

    states: Sequence[tuple[str, bool, torch.dtype]]

    @classmethod
    def now(cls, leaves: Leaves) -> Casting:
        """Autocast as it is now, on the devices of the leaves and on the CPU."""
        devices = {"cpu", *{x.device.type for x in leaves}} - {"meta"}
        return cls([_casting_on(device) for device in devices])

    def is_now(self) -> bool:
        """Is it as it was?"""
        return [_casting_on(device) for device, *_ in self.states] == self.states

    def again(self) -> AbstractContextManager[Any]:
        """A context in which it is as it was."""
        others = [state for state in self.states if state != _casting_on(state[0])]
        if not others:
            return nullcontext()
        contexts = ExitStack()
        for device, is_on, dtype in others:
            contexts.enter_context(torch.autocast(device, dtype, enabled=is_on))
        return contexts


def _casting_on(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class Revisits:
    """A context for evaluations after the first: they see what it saw, and leave it as it was.

    It is made after the first evaluation, which may have written into what the function closes
    over, as batch normalization does.

    Args:
        api: the name of the public function, with which error messages begin.
        func: the function that is evaluated.
        primals: the leaves at which it is evaluated.
        forget: drops graphs that are kept, as what they read was written into.
        forget_outputs: drops the outputs of the evaluation that was made in the context.
    """

    def __init__(
        self,
        api: str,
        func: object,
        primals: Leaves,
        forget: Callable[[], None],
        forget_outputs: Callable[[], None],
    ) -> None:
        self._api, self._primals = api, primals
        self._forget, self._forget_outputs = forget, forget_outputs
        self._captured = Captured.of(func) if makes_plain_tensors() else Captured([])
        self._casting = Casting.now(primals)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Random numbers that are drawn outside do not depend on evaluations inside.

        Raises:
            ValueError: if something that the function closes over has changed.
        """
        self._captured.check(self._api, "the function")
        written = self._captured.versions()
        drawing = nullcontext() if is_compiling() else RandomState(self._primals).kept()
        try:
            with drawing, self._casting.again():
                yield
        finally:
            if self._captured.undone(written):
                self._forget()
        self._forget_outputs()
