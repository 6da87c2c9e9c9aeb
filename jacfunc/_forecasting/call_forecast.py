"""Forecasts of a user's call: counted on fakes, or by sizes alone if it does not run on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from jacfunc._assembly import numel
from jacfunc._calls import Derivation, FlatCall
from jacfunc._forecasting.compilation import compilation_by
from jacfunc._forecasting.costs import Costs
from jacfunc._forecasting.on_fakes import Fakes, Forecast
from jacfunc._memory import largest
from jacfunc._types import Tree
from jacfunc.strategies import Sweeping


class CallForecast:
    """A user's call on fakes: how many rows and columns it has, and what a strategy would cost.

    The number of rows is None where the function does not run on fakes.
    """

    def __init__(
        self, derivation: Derivation, args: tuple[Tree, ...], kwargs: dict[str, Any]
    ) -> None:
        self.rows: int | None = None
        self._result_bytes: int | None = None
        self._costs: Costs | None = None
        self._fakes = Fakes((args, kwargs))
        with _countable():
            fake_args, fake_kwargs = self._fakes.tree((args, kwargs))
            self._call = FlatCall(derivation, fake_args, fake_kwargs)
            self.columns = numel(self._call.primals)
            try:
                self._evaluate()
            except RuntimeError:  # each forecast will say why
                return

    def _evaluate(self) -> None:
        outputs, self._costs = self._fakes.evaluate(self._call, self._call.primals)
        self.rows = numel(outputs)
        pairs = ((out, primal) for out in outputs for primal in self._call.primals)
        dtype = torch.promote_types
        self._result_bytes = sum(
            o.numel() * p.numel() * dtype(o.dtype, p.dtype).itemsize for o, p in pairs
        )

    def forecast(self, strategy: Sweeping, backend: str = "inductor") -> Forecast:
        """The strategy's cost; a number that can't be known is None, and the reason says why.

        ``backend`` is what would compile it.
        """
        try:
            with _countable():
                forecast = self._fakes.forecast(strategy, self._call, self._call.primals)
        except NotImplementedError as refusal:  # Refused is one
            reason = f"refused: {_in_words(refusal)}"
            return Forecast(strategy, None, None, None, None, None, reason)
        except Exception as error:  # whatever torch raises where it has no rule, KeyError too
            return self._by_sizes(strategy, error)
        if self._costs is None:
            return forecast
        compilation = compilation_by(backend, self._costs, strategy)
        return replace(forecast, seconds=self._costs.seconds(strategy), compilation=compilation)

    def _by_sizes(self, strategy: Sweeping, error: Exception) -> Forecast:
        pushes, chunk = strategy.sweeps.are_pushes, strategy.sweeps.chunk_size
        seeds = self.columns if pushes else self.rows
        count = None if seeds is None else -(-seeds // largest(chunk, seeds))
        evaluations = count if pushes else 1
        reason = f"by sizes alone, can't be run on fakes: {_in_words(error)}"
        return Forecast(strategy, evaluations, count, None, self._result_bytes, None, reason)


def _in_words(error: Exception) -> str:
    """The first line of an error's message, or the operation that needs numbers."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"its course depends on the data ({error.func})"
    first = str(error).strip().split("\n")[0]
    return first if isinstance(error, RuntimeError) else f"{type(error).__name__}: {first}"


@contextmanager
def _countable() -> Iterator[None]:
    """Out of inference mode, in which torch decomposes products after they were counted."""
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad_mode):
        yield
