"""Refusals of modules that do not run under vmap, in the words of the door that was called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from jacfunc._calls import FlatCall
from jacfunc._errors import Refused, is_out_of_memory
from jacfunc._faults import Watch


@contextmanager
def under_vmap(
    api: str, randomness: str, first: Callable[[], FlatCall], needs: str, way_out: str
) -> Iterator[None]:
    """A context that refuses what fails under vmap alone.

    Args:
        first: makes the call of the first sample: an error of that call is raised as it is.
        needs: the beginning of the message: what needs vmap.
        way_out: its end: what to do instead.

    Raises:
        Refused: if the call of the first sample runs without vmap.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or str(error).startswith(f"{api}: samples"):
            raise
        check_randomness(api, randomness, error)
        reason = str(error).rstrip(".")
        try:
            with Watch():
                call = first()
                call(*map(Tensor.clone, call.primals))
        except Refused as refusal:  # which says more than what torch says of vmap
            reason = str(refusal)
        raise Refused(
            f"{api}: {needs} a module that runs under vmap, got: {reason}. {way_out}."
        ) from error


def check_randomness(api: str, randomness: str, error: Exception) -> None:
    """Say in words of the door that a module draws, if that was torch's error.

    Raises:
        NotImplementedError: if it was.
    """
    if randomness == "error" and "randomness" in str(error):
        raise NotImplementedError(
            f"{api}: per_sample must know how samples draw random numbers, got a module "
            "that draws and randomness='error'. Pass randomness='same' or 'different'."
        ) from error
