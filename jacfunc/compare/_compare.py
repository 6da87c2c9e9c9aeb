"""The function ``compare``: every strategy judged, weighed and timed on a problem of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from jacfunc._arguments import check_memory
from jacfunc._measuring import Effort, measure
from jacfunc._planning import resolve
from jacfunc._types import Memory
from jacfunc.compare._contestants import STRATEGIES, Sizes, contestants, name_of
from jacfunc.compare._judge import Judge, precision_of
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._reference import baseline_of, plain_of
from jacfunc.compare._table import Comparison, check_extra, progress_bar
from jacfunc.strategies import Strategy

if TYPE_CHECKING:
    from rich.progress import Progress


def compare(
    problem: object,
    *,
    strategies: Sequence[str | Strategy] = STRATEGIES,
    device: torch.device | str | None = None,
    seconds: float = 1.5,
    memory: Memory = None,
    progress: bool = False,
) -> Comparison:
    """Measures every strategy on a problem of yours: answers, then peaks, then times in rounds.

    Each answer is compared with rows of the Jacobian that a plain loop of ``torch.autograd.grad``
    gives, in float64 on the CPU where the problem runs there. What is refused, wrong or out of
    memory stays as a row with its reason. Times are ratios to torch's own way, round by round.

    Args:
        problem: ``(module, *inputs)``, ``(func, *args)``, or a :class:`jacfunc.compare.Problem`.
            Of a module, Jacobians of each sample in its parameters are taken, of a function
            :func:`jacfunc.jacobian` in the first argument, unless a Problem says otherwise.
        strategies: names and objects, as for :func:`jacfunc.jacobian`.
        device: to measure there, on a copy; by default where the problem is.
        seconds: of timing for each strategy; checks come on top.
        memory: bytes that auto and autotune are to keep to, as a number or in words (``"2 GiB"``).
        progress: show a bar with the time left.

    Returns:
        A :class:`jacfunc.compare.Comparison`, which has ``results``, ``best``, ``table()`` and
        ``picture(path)``, and prints as the sentence that says what to take.

    Raises:
        TypeError, ValueError: a problem or options that do not fit; a problem that does not run,
            or whose Jacobian would not fit in memory. ModuleNotFoundError: without the extra.

    Cost:
        About ``seconds`` a strategy, three calls of each before, and up to ten seconds of checks.

    Example:
        >>> import torch
        >>> from jacfunc.compare import compare
        >>> model = torch.nn.Linear(3, 2)
        >>> found = compare((model, torch.ones(4, 3)), strategies=["auto", "looped"], seconds=0.01)
        >>> [(result.contestant, result.status) for result in found.results]
        [('vmap(torch.func.jacrev)', 'ok'), ('auto', 'ok'), ('looped', 'ok')]
    """
    check_extra()
    check_memory(API, memory)
    for strategy in strategies:
        resolve(API, strategy, None)
    if not seconds > 0:
        raise ValueError(
            f"{API}: seconds must be positive, got {seconds}. It is the time for each strategy."
        )
    posed = Problem.of(problem)
    if device is not None:
        posed = posed.to(device)
    devices = [posed.device] if posed.device.type == "cuda" else []
    with (
        progress_bar(progress) as bar,
        torch.random.fork_rng(devices=devices),
        warnings.catch_warnings(),
    ):
        # missing batching rules are warned about; what they cost is in the table
        warnings.simplefilter("ignore")
        return _compared(posed, strategies, Effort(seconds=seconds), memory, bar)


def _compared(
    problem: Problem,
    strategies: Sequence[str | Strategy],
    effort: Effort,
    memory: Memory,
    bar: Progress,
) -> Comparison:
    task = bar.add_task("reference", total=None)
    plain, baseline = plain_of(problem), baseline_of(problem)
    sizes = Sizes.of(problem, plain)
    sizes.check(problem.device)
    problem.check_independent()
    judge = Judge.of(plain, precision_of(problem))
    entrants, absent = contestants(problem, sizes, strategies, memory, plain.is_random)
    before = 2 * len(entrants)
    bar.reset(task, total=before + effort.rounds * len(entrants))
    measured = measure(
        problem,
        entrants,
        judge,
        effort,
        baseline=baseline,
        cuda=problem.device.type == "cuda",
        on_step=lambda name: bar.update(task, description=name, advance=1),
        on_rounds=lambda calls: bar.update(task, total=before + calls),
    )
    by_name = {result.contestant: result for result in (*measured, *absent)}
    names = [baseline, *map(name_of, strategies)]
    results = tuple(by_name[name] for name in names if name in by_name)
    title = f"{problem.describe()}; {sizes}; {_where(problem)}"
    return Comparison(title, results, baseline, judge.says, memory)


def _where(problem: Problem) -> str:
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in problem.dtypes))
    if problem.device.type == "cuda":
        there = torch.cuda.get_device_name(problem.device)
    else:
        threads = torch.get_num_threads()
        there = f"the CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    return f"{dtypes} on {there}, torch {torch.__version__}"
