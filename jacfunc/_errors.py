"""Refusals, and the meaning of torch's errors: most have no type, so their text tells."""

from __future__ import annotations

import torch


class Refused(NotImplementedError):  # noqa: N818 (a refusal is no error while another strategy is left)
    """Torch can't carry out a sweep, or does it wrong; another strategy may."""


class Changes(Refused):
    """Two evaluations of a function differ; a strategy that takes one alone may be right."""


class Stale(ValueError):  # noqa: N818 (the outputs are stale)
    """The function does not compute its outputs from its arguments; no other strategy is tried."""


class Nameless(ValueError):  # noqa: N818 (what it lacks is told, not what went wrong)
    """A ValueError whose message lacks the name of the public function, which a door puts there."""


class LeftTorch(Nameless, Stale):
    """The function computes outputs of its arguments outside of torch; no other way is tried."""


class ManyOutputs(Nameless, Stale):
    """The function returns many numbers where it must return one; no other way is tried."""


class UnseenWrite(RuntimeError):  # noqa: N818 (it has happened)
    """The function has changed a parameter that it got without a copy; no other way is tried."""


RANDOM = (
    "it is random, under randomness='error'. Pass randomness='same', to draw the same numbers for "
    "all, or 'different', to draw others for each"
)

FAST_OUTSIDE = "Call it outside; jacfunc.compile makes it fast there."


def check_uncompiled(api: str, way_out: str = FAST_OUTSIDE) -> None:
    """Refuse what torch.compile can't trace: it lends a module, reads numbers, or holds a lock.

    Raises:
        NotImplementedError: inside torch.compile.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{api}: it must be called outside of torch.compile, got a call inside. {way_out}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Did an allocation fail? On a CPU only the text of the error says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def out_of_memory(api: str, error: Exception, way_out: str) -> RuntimeError:
    """The error of an allocator in the words of a public function; torch's own words stay in it."""
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
    told = str(error).strip().split("\n")[0].rstrip(".") or "not enough memory"
    return kind(
        f"{api}: the result and all else that it needs must fit into memory, got {told}.{way_out}"
    )


def check_fallback(error: Exception) -> None:
    """Return if seeds or samples that failed together may be tried one by one.

    Raises:
        Exception: the error itself, if it is a refusal or memory ran out.
        Refused: if it is about random functions, in clearer words.
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


def writes_outside(error: Exception) -> bool:
    """Is it torch's own error for a write into a tensor that a derivative has not wrapped?"""
    return "would mutate a captured Tensor" in str(error)
