"""What does not run under vmap, in the words of a per-sample door."""

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
    """What fails under vmap alone is refused; what fails for the ``first`` alone is its own error.

    Raises:
        Refused: in words of the door, which begin with what ``needs`` it.
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
    """Was it that a random module was not to draw?

    Raises:
        NotImplementedError: if it was.
    """
    if randomness == "error" and "randomness" in str(error):
        raise NotImplementedError(
            f"{api}: per_sample must know how samples draw random numbers, got a module "
            "that draws and randomness='error'. Pass randomness='same' or 'different'."
        ) from error
