"""``plan`` and ``explain``: what would run, and what did run beside its forecast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jacfunc._calls import Derivation, FlatCall
from jacfunc._errors import check_uncompiled
from jacfunc._forecasting import CallForecast, Compilation, price_in_words
from jacfunc._functions.derive import jacobian_by
from jacfunc._linear_map import JacobianOperator
from jacfunc._lock import alone
from jacfunc._log import trail
from jacfunc._memory import PeakBytes
from jacfunc._planning import Auto, Autotune, Plan, resolve
from jacfunc._showing import html_table
from jacfunc._types import Argnums, Memory, Tree
from jacfunc._units import in_bytes, in_seconds
from jacfunc.strategies import Strategy, Sweeping, in_words_of


def plan(
    func: Callable[..., Any],
    *args: Tree,
    argnums: Argnums = 0,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    **kwargs: Any,
) -> Plan:
    """The plan that :func:`jacfunc.jacobian` would make for these arguments, to look at or to pin.

    ``jacobian(func, strategy=plan)`` then neither plans nor measures.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        *args: where the Jacobian would be taken.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: as in :func:`jacfunc.jacobian`.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: bytes that the call may take, as a number or in words (``"2 GiB"``).
        **kwargs: passed on to ``func``.

    Returns:
        A :class:`Plan`: the strategy with its chunk, the reason in words, the forecast.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Cost:
        One evaluation of ``func``, and its forecast on fake tensors; ``"autotune"`` measures.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.plan(torch.sin, torch.zeros(3)).strategy
        Reverse(chunk_size=None)
    """
    check_uncompiled("plan", "Call it before.")
    derivation = Derivation("plan", func, argnums, has_aux)
    return _plan_of(derivation, _resolved("plan", strategy, chunk_size, memory), args, kwargs)


def explain(
    func: Callable[..., Any],
    *args: Tree,
    argnums: Argnums = 0,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    **kwargs: Any,
) -> Explanation:
    """Takes the Jacobian and reports: which strategy ran and why, and its cost beside the forecast.

    The same lines go to the logger ``jacfunc`` at INFO whenever ``"auto"`` or ``"autotune"`` runs.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        *args: where the Jacobian is taken.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: as in :func:`jacfunc.jacobian`.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: bytes that the call may take, as a number or in words (``"2 GiB"``).
        **kwargs: passed on to ``func``.

    Returns:
        An :class:`Explanation`, which prints as a few lines; the Jacobian itself is not kept.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses.

    Cost:
        That of :func:`plan`, and the Jacobian three times: to warm up, timed, and counted.

    Example:
        >>> import torch, jacfunc
        >>> report = jacfunc.explain(torch.sin, torch.zeros(3))
        >>> report.plan.strategy, report.peak_bytes == report.plan.forecast.peak_bytes
        (Reverse(chunk_size=None), True)
    """
    check_uncompiled("explain", "Call it before.")
    derivation = Derivation("explain", func, argnums, has_aux)
    named = _resolved("explain", strategy, chunk_size, memory)
    with trail() as steps:
        chosen = _plan_of(derivation, named, args, kwargs)
        derive = jacobian_by(derivation, replace(chosen, compiler=None))
        compiled = None if chosen.compiler is None else chosen.compiler(derive)
        take = partial(compiled or derive, *args, **kwargs)
        take()
    start = time.perf_counter()
    take()
    seconds = time.perf_counter() - start
    if compiled is not None:  # compiled code hides its tensors from the counter of bytes
        compilation = compiled.compilations[0]
        return Explanation(chosen, tuple(steps), seconds, compilation.peak_bytes or 0, compilation)
    with PeakBytes() as memory_counter:
        take()
    return Explanation(chosen, tuple(steps), seconds, memory_counter.peak)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` returns.

    Args:
        plan: the chosen strategy, the reason, and its forecast.
        steps: what was tried, refused and done instead, in order.
        seconds: the time of the call.
        peak_bytes: the most bytes of all tensors at once, with the result, without the arguments.
        compilation: what compiling cost, and what it saves, where the plan is a compiled one.

    Example:
        >>> import torch, jacfunc
        >>> report = jacfunc.explain(lambda x: torch.cholesky_inverse(x), torch.eye(2),
        ...     strategy="reverse")
        >>> report.steps
        ()
    """

    plan: Plan
    steps: tuple[str, ...]
    seconds: float
    peak_bytes: int
    compilation: Compilation | None = None

    def __repr__(self) -> str:
        rows = list(self._rows())
        widths = [max(9, *map(len, column)) for column in zip(*rows, strict=True)]
        width = max(len(name) for name, *_ in rows)
        return "\n".join(
            [
                f"{self.plan.strategy}: {self.plan.reason}",
                *(f"  {word}: {told}" for word, told in self._told()),
                *(
                    f"  {name.ljust(width)}  {forecast.rjust(widths[1])} forecast  "
                    f"{actual.rjust(widths[2])} seen"
                    for name, forecast, actual in rows
                ),
            ]
        )

    def _repr_html_(self) -> str:
        """The lines as a table in HTML, for notebooks."""
        told = [(*pair, "") for pair in self._told()]
        title = f"{self.plan.strategy}: {self.plan.reason}"
        return html_table(title, ("", "forecast", "seen"), [*self._rows(), *told])

    def _told(self) -> Iterator[tuple[str, str]]:
        """What has no figures beside it: the steps, and what compiling would take."""
        yield from (("then", step) for step in self.steps)
        if self._price is not None and self.compilation is None:
            call, build, calls = price_in_words(self._price)
            yield "if compiled", f"{call} a call, {build} before the first, repaid after {calls}"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        forecast = self.plan.forecast
        if self.compilation is None:
            seconds = self.plan.seconds or (forecast.seconds if forecast else None)
            yield "time", in_seconds(seconds), in_seconds(self.seconds)
        peak = forecast.peak_bytes if forecast else None
        yield "peak", in_bytes(peak), in_bytes(self.peak_bytes)
        if self.compilation is not None:
            names = "a call", "before the first", "repaid after"
            both = price_in_words(self._price), price_in_words(self.compilation)
            yield from zip(names, *both, strict=True)

    @property
    def _price(self) -> Compilation | None:
        return self.plan.forecast.compilation if self.plan.forecast else None


def _resolved(
    api: str, strategy: str | Strategy, chunk_size: int | None, memory: Memory
) -> Strategy:
    """The strategy; a compiled plan as it is."""
    if not isinstance(strategy, Plan):
        return resolve(api, strategy, chunk_size, memory)
    resolve(api, replace(strategy, compiler=None), chunk_size, memory)
    return strategy


def _plan_of(
    derivation: Derivation, strategy: Strategy, args: tuple[Tree, ...], kwargs: dict[str, Any]
) -> Plan:
    """The plan for a call, with its forecast."""
    call = FlatCall(derivation, args, kwargs)
    with alone():
        plan = in_words_of(
            derivation.api, lambda: _planned(strategy, JacobianOperator(call, call.primals))
        )
        if not isinstance(plan.strategy, Sweeping) or plan.strategy.sweeps.by_layers:
            return plan
        backend = "inductor" if plan.compiler is None else plan.compiler.backend
        forecast = CallForecast(derivation, args, kwargs).forecast(plan.strategy, backend)
    return replace(plan, forecast=forecast)


def _planned(strategy: Strategy, operator: JacobianOperator) -> Plan:
    """The plan of a strategy; of one that makes none, the strategy itself as a plan."""
    if isinstance(strategy, Auto | Autotune):
        return strategy.plan(operator)
    return strategy if isinstance(strategy, Plan) else Plan(strategy, "it was asked for")
