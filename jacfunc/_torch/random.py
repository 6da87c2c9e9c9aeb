"""Saves the state of torch's generators, so that an evaluation can draw the same numbers again."""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import string_at
from threading import RLock, local
from typing import Any, TypeAlias, TypeVar

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from jacfunc._errors import RANDOM, Refused
from jacfunc._torch.levels import is_traced, outside_transforms
from jacfunc._types import Leaves

ResultT = TypeVar("ResultT")
GeneratorState: TypeAlias = tuple[torch.Tensor, ...]

# A thread that reads the state holds the generator while Python may run another thread, as in a
# garbage collection. If that thread asks for the generator, too, both wait for ever.
_STATES = RLock()

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


_DROPPING = "dropout_p", "dropout", "training", "train"
"""Arguments of operators that draw: where one of them is zero or false, nothing is drawn."""


def draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does this call of an operator draw? Not where an argument says that it drops nothing."""
    if not isinstance(func, OpOverload) or torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema} | dict(kwargs)
    values |= dict(zip([a.name for a in schema], args, strict=False))
    return all(values.get(name, True) for name in _DROPPING)


MOST_LOOKS = 32
"""After so many states in a watch it ends, if there was no sign that others draw."""


class DrawsByThread(local):
    """A time in which all evaluations are watched, and what each thread was seen to draw in it."""

    def __init__(self) -> None:
        self.drawn = [0]
        """How often, as the only entry of a list: a backward pass may run in other threads."""


class OtherThreads:
    """What is known of other threads, which may draw from the same generators meanwhile."""

    watch: DrawsByThread | None = None
    """Set while they may: then evaluations are watched, to see which draws are their own."""
    are_seen = False
    """Was something drawn that no evaluation has? Then the watch does not end."""
    left = 0
    """So many states may still be looked at in this watch, if no others are seen."""

    @classmethod
    def note(cls, drawn: int | None) -> None:
        """Note that something was drawn: so often by this thread, or None if that is not known."""
        cls.are_seen = cls.are_seen or drawn == 0
        if not cls.are_seen:
            cls.watch = DrawsByThread() if drawn is None and _thread._count() else None
            cls.left = MOST_LOOKS

    @classmethod
    def looked_at(cls) -> DrawsByThread | None:
        """The watch that a state is looked at in."""
        if cls.watch is not None and not cls.are_seen:
            cls.left -= 1
            if not cls.left:
                cls.watch = None
        return cls.watch


class OwnDraws(TorchDispatchMode):
    """Counts what is drawn in this thread: by operators of torch, and by others, if they may.

    A fused kernel on an accelerator is not seen.
    """

    def __init__(self, watch: DrawsByThread) -> None:
        super().__init__()
        self._drawn = watch.drawn

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler for it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace not in _OF_TORCH or draws(func, args, kwargs or {}):
            self._drawn[0] += 1
        return func(*args, **(kwargs or {}))


_OF_TORCH = frozenset({"aten", "prim", "prims", "profiler"})


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
        self._watch = OtherThreads.watch and OtherThreads.looked_at()
        self._drawn = self._watch.drawn[0] if self._watch else 0

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
        """Has this thread drawn anything since this object was made?

        Where other threads may draw meanwhile, evaluations are watched from then on, and draws of
        others are none; until then nothing tells them apart.
        """
        if _bytes_of(self._states) == _bytes_of(self._current()):
            return False
        watch = self._watch if self._watch is OtherThreads.watch else None
        drawn = watch.drawn[0] - self._drawn if watch else None
        OtherThreads.note(drawn)
        return drawn != 0

    @contextmanager
    def of_one(self, randomness: str) -> Iterator[None]:
        """A context for one of several samples, which draws as vmap does under this ``randomness``.

        Raises:
            Refused: if the sample draws under "error".
        """
        if randomness == "same":
            self.repeat()
        before = self._now()
        yield
        if randomness == "error" and before.has_changed():
            raise Refused(RANDOM)

    def _now(self) -> RandomState:
        """The state of the same generators now."""
        now = RandomState(())
        now._generators, now._states = self._generators, self._current()
        return now

    def _current(self) -> GeneratorState:
        with _STATES:
            return tuple(map(torch.Generator.get_state, self._generators))


def _bytes_of(states: GeneratorState) -> list[bytes]:
    """What states are compared by: torch compares byte by byte, which takes four times as long."""
    addresses, sizes = map(torch.Tensor.data_ptr, states), map(torch.Tensor.numel, states)
    return [*map(string_at, addresses, sizes)]
