"""Saves the state of torch's generators, so that an evaluation can draw the same numbers again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import PyDLL, c_size_t, c_void_p
from threading import RLock
from typing import Any, TypeAlias, TypeVar

import torch

from jacfunc._errors import RANDOM, Refused
from jacfunc._torch.levels import is_traced, outside_transforms
from jacfunc._types import Leaves

ResultT = TypeVar("ResultT")
GeneratorState: TypeAlias = tuple[torch.Tensor, ...]

# A thread that reads the state holds the generator while Python may run another thread, as in a
# garbage collection. If that thread asks for the generator, too, both wait for ever.
_STATES = RLock()

_TRIES = 8
"""At most this many evaluations are made to see whether one draws random numbers."""

_ALWAYS = (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("bernoulli", "multinomial", "normal", "poisson", "binomial", "gumbel_softmax"),
    *("bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_"),
    *("log_normal_", "cauchy_", "fractional_max_pool2d", "fractional_max_pool3d"),
)
_SETTINGS = {
    **dict.fromkeys(("dropout", "dropout_", "native_dropout", "alpha_dropout"), (1, 2)),
    **dict.fromkeys(("feature_dropout", "feature_alpha_dropout"), (1, 2)),
    **dict.fromkeys(("alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"), (1, 2)),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), (1, 2)),
    **dict.fromkeys(("rrelu", "rrelu_"), (2, 3)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (5, 6)),
    "scaled_dot_product_attention": (4, 4),
    "multi_head_attention_forward": (10, 13),
}
"""Positions of two arguments: the probability to drop a number, and whether it is training."""

_PLACES = (torch, torch.nn.functional, torch.Tensor)
DRAWING: dict[Callable[..., Any], tuple[int, int] | None] = {
    function: _SETTINGS.get(name)
    for name in (*_ALWAYS, *_SETTINGS)
    for place in _PLACES
    if callable(function := getattr(place, name, None))
}
"""Functions that draw from torch's default generators; some only with certain settings."""


def may_draw(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """May this call of a function in ``DRAWING`` draw? Yes, unless its settings say that not."""
    positions = DRAWING[func]
    if positions is None:
        return True
    by_name = [kwargs[name] for name in ("p", "dropout_p", "training", "train") if name in kwargs]
    return all((*by_name, *(args[position] for position in positions if position < len(args))))


def noise_like(leaves: Leaves, seed: int = 0) -> Leaves:
    """Normal numbers like the leaves: the same ones each time, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(x.shape, generator=generator, device="cpu") for x in leaves]
    return tuple(x.to(like.device, like.dtype) for x, like in zip(noise, leaves, strict=True))


def fixed(make: Callable[[], ResultT]) -> ResultT:
    """What ``make`` returns, a tensor or a tuple that is the same each time: constants of a trace.

    So is what is drawn from a generator that was seeded for it, or computed from shapes.
    """
    if not is_traced():
        return make()
    with outside_transforms():
        made = make()
    result: ResultT = _constants(made)
    return result


def _constants(made: Any) -> Any:
    if isinstance(made, tuple):
        return tuple(map(_constants, made))
    return torch.ops.aten.lift_fresh_copy(made) if isinstance(made, torch.Tensor) else made


class RandomState:
    """The state of the generators of the leaves' devices, when this object was made."""

    def __init__(self, leaves: Leaves) -> None:
        self._generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            indices = sorted({leaf.device.index for leaf in leaves if leaf.is_cuda})
            self._generators += [torch.cuda.default_generators[index] for index in indices]
        self._states = self._current()

    def repeat(self) -> None:
        """Set the generators back to that state."""
        with _STATES:
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context after which the generators are set back to that state."""
        try:
            yield
        finally:
            self.repeat()

    def has_changed(self) -> bool:
        """Has anything been drawn since this object was made?"""
        return not _are_same(self._states, self._current())

    def has_drawn(self, func: Callable[..., Any], primals: Leaves) -> bool:
        """Has an evaluation of ``func`` drawn since, and not another thread alone?

        Of all draws nothing tells whose they are. So it is evaluated again, until one evaluation is
        not disturbed.
        """
        for _ in range(_TRIES):
            if not self.has_changed():
                return False
            self.repeat()
            with torch.no_grad():
                func(*map(torch.Tensor.clone, primals))
        return self.has_changed()

    @contextmanager
    def of_one(self, randomness: str) -> Iterator[None]:
        """A context for one of several samples, which draws as vmap does under this ``randomness``.

        Raises:
            Refused: if the sample draws under "error".
        """
        if randomness == "same":
            self.repeat()
        before = self._current()
        yield
        if randomness == "error" and not _are_same(before, self._current()):
            raise Refused(RANDOM)

    def _current(self) -> GeneratorState:
        with _STATES:
            return (*map(torch.Generator.get_state, self._generators),)


# it keeps Python's own lock: no other thread runs for so short a time
_COMPARE = PyDLL("msvcrt" if os.name == "nt" else None).memcmp
_COMPARE.argtypes = c_void_p, c_void_p, c_size_t


def _are_same(one: GeneratorState, other: GeneratorState) -> bool:
    """Are two states of the same generators the same? Torch takes eight times as long to tell."""
    addresses = map(torch.Tensor.data_ptr, one), map(torch.Tensor.data_ptr, other)
    return not any(map(_COMPARE, *addresses, map(torch.Tensor.numel, one)))
