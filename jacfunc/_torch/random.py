"""Random numbers that are drawn over and over: the same ones, others, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeAlias

import torch

from jacfunc._errors import RANDOM, Refused
from jacfunc._types import Leaves

GeneratorState: TypeAlias = tuple[torch.Tensor, ...]

# a thread that reads a generator's state in torch holds the generator while Python may run another
# thread, as in a garbage collection; if that one asks for the generator, both wait for ever
_STATES = RLock()

_ALWAYS = (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("bernoulli", "multinomial", "normal", "poisson", "binomial", "gumbel_softmax"),
    *("bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_"),
    *("log_normal_", "cauchy_", "fractional_max_pool2d", "fractional_max_pool3d"),
)
_TOLD = {
    **dict.fromkeys(("dropout", "dropout_", "native_dropout", "alpha_dropout"), (1, 2)),
    **dict.fromkeys(("feature_dropout", "feature_alpha_dropout"), (1, 2)),
    **dict.fromkeys(("alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"), (1, 2)),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), (1, 2)),
    **dict.fromkeys(("rrelu", "rrelu_"), (2, 3)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (5, 6)),
    "scaled_dot_product_attention": (4, 4),
    "multi_head_attention_forward": (10, 13),
}
"""Where they are told how likely a number is dropped, and whether it is training at all."""

_PLACES = (torch, torch.nn.functional, torch.Tensor)
DRAWING: dict[Callable[..., Any], tuple[int, int] | None] = {
    function: _TOLD.get(name)
    for name in (*_ALWAYS, *_TOLD)
    for place in _PLACES
    if callable(function := getattr(place, name, None))
}
"""Functions that draw from torch's default generators, if they are told to."""


def may_draw(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is it called so that it draws? Of packed sequences nobody asks, and it may."""
    told = DRAWING[func]
    if told is None:
        return True
    by_name = [kwargs[name] for name in ("p", "dropout_p", "training", "train") if name in kwargs]
    return all((*by_name, *(args[position] for position in told if position < len(args))))


class RandomState:
    """The generators of the devices that leaves are on, as they stood when this was made."""

    def __init__(self, leaves: Leaves) -> None:
        indices = sorted({leaf.device.index for leaf in leaves if leaf.is_cuda})
        cuda = [torch.cuda.default_generators[index] for index in indices]
        self._generators = [torch.default_generator, *cuda]
        self._states = self._now()

    def repeat(self) -> None:
        """Back to where they stood."""
        with _STATES:
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is drawn inside, the generators stand where they stood afterwards."""
        try:
            yield
        finally:
            self.repeat()

    def were_taken(self) -> bool:
        """Has a generator moved on since this was made?"""
        return not all(map(torch.equal, self._states, self._now()))

    @contextmanager
    def of_one(self, randomness: str) -> Iterator[None]:
        """Around each of several evaluations, to draw as vmap does under the same word."""
        if randomness == "same":
            self.repeat()
        before = self._now()
        yield
        if randomness == "error" and not all(map(torch.equal, before, self._now())):
            raise Refused(RANDOM)

    def _now(self) -> GeneratorState:
        with _STATES:
            return tuple([generator.get_state() for generator in self._generators])
