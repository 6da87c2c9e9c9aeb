"""Refusals, and what an error of torch means, which has no types for most of them."""

from __future__ import annotations

import torch


class Refused(NotImplementedError):  # noqa: N818 (a refusal is no error while another strategy is left)
    """Torch could not, or must not, carry out a sweep: another strategy may."""


class Stale(ValueError):  # noqa: N818 (what it is about, no kind of error)
    """The function does not compute what is asked of it: no other way is tried."""


RANDOM = (
    "it is random, under randomness='error'. Pass randomness='same', to draw the same numbers for "
    "all, or 'different', to draw others for each"
)


def is_out_of_memory(error: Exception) -> bool:
    """Did an allocation fail, on an accelerator or on the CPU, which has no type for that?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def check_fallback(error: Exception) -> None:
    """May what failed at once go on one by one? Not when memory ran out, nor as a way to refuse.

    Raises:
        Exception: the error itself, in clearer words where it is about random functions.
    """
    if isinstance(error, Refused | Stale) or is_out_of_memory(error):
        try:
            raise error
        finally:
            del error  # a traceback that holds its own error is a cycle
    if "randomness" in str(error):
        raise Refused(RANDOM) from error


def lacks_forward_rule(error: Exception) -> bool:
    """Is it torch's own error for an operation without a forward rule?"""
    return any(words in str(error) for words in _NO_FORWARD_RULE)


_NO_FORWARD_RULE = (
    "Trying to use forward AD with",
    "You must implement the jvp function",
    "jvp is not implemented for the c++ API",
)


def is_of_old_style(error: Exception) -> bool:
    """Is it torch's own error for an ``autograd.Function`` that is made for plain graphs alone?"""
    return "must override the setup_context" in str(error)


def runs_again_below(error: Exception) -> bool:
    """Is it torch's own error for checkpoints in a transform?

    They are either not let in, or run again in a pullback, with tensors of a vmap that is over.
    """
    words = "saved tensor hooks", "escaped from inside a function being vmapped"
    return any(each in str(error) for each in words)


def writes_outside(error: Exception) -> bool:
    """Is it torch's own error for a write into a tensor that a derivative has not wrapped?"""
    return "would mutate a captured Tensor" in str(error)
