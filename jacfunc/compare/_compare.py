"""The function ``compare``: every strategy judged, weighed and timed on a problem of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from jacfunc._arguments import check_memory
from jacfunc._measuring import Effort, Entry, measure
from jacfunc._planning import resolve
from jacfunc._types import Memory
from jacfunc.compare._contestants import STRATEGIES, Sizes, contestants, strategies_for
from jacfunc.compare._forecasts import foretell
from jacfunc.compare._judge import Judge, precision_of
from jacfunc.compare._problem import API, Problem
from jacfunc.compare._reference import baseline_of, reference_of
from jacfunc.compare._table import Comparison, check_extra
from jacfunc.strategies import Strategy


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
    gives, in float64 on the CPU where the problem runs there. A strategy that is refused, wrong or
    out of memory stays as a row with its reason. Times are ratios to torch's own recipe, round by
    round.

    Args:
        problem: ``(module, *inputs)``, ``(func, *args)``, or a :class:`jacfunc.compare.Problem`.
            A module is differentiated by its parameters, each sample alone, and a function by its
            first argument, unless a Problem says otherwise.
        strategies: names and objects, as for :func:`jacfunc.jacobian`.
        device: where a copy is measured; by default the problem itself, where it is.
        seconds: the time that each strategy is timed for; checks come on top.
        memory: bytes that auto and autotune are to keep to, as a number or in words (``"2 GiB"``).
        progress: show a bar with the time left.

    Returns:
        A :class:`jacfunc.compare.Comparison`, which has ``results``, ``best``, ``table()`` and
        ``picture(path)``, and prints as the sentence that says what to take.

    Raises:
        TypeError, ValueError: a problem or options that do not fit; a problem that does not run,
            or whose Jacobian would not fit in memory.
        ModuleNotFoundError: the extra ``bench`` is not installed.

    Cost:
        About ``seconds`` a strategy, three calls of each before, and up to ten seconds of checks.

    Example:
        >>> import torch
        >>> from jacfunc.compare import compare
        >>> model = torch.nn.Linear(3, 2)
        >>> comparison = compare((model, torch.ones(4, 3)), strategies=["auto"], seconds=0.01)
        >>> [(result.contestant, result.status) for result in comparison.results]
        [('vmap(torch.func.jacrev)', 'ok'), ('auto', 'ok')]
    """
    check_extra()
    check_memory(API, memory)
    for strategy in strategies:
        resolve(API, strategy, None)
    if not seconds > 0:
        raise ValueError(
            f"{API}: seconds must be positive, got {seconds}. It is the time for each strategy."
        )
    subject = Problem.of(problem)
    if device is not None:
        subject = subject.to(device)
    effort = Effort(seconds=seconds, settling=min(seconds, Effort.settling))
    devices = [subject.device] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # missing batching rules are warned about; what they cost is in the table
        warnings.simplefilter("ignore")
        return _compared(subject, strategies, effort, memory, progress)


def _compared(
    problem: Problem,
    strategies: Sequence[str | Strategy],
    effort: Effort,
    memory: Memory,
    progress: bool,
) -> Comparison:
    with _progress_bar(progress) as on_step:
        on_step("reference", None)
        problem.check_samples()
        reference, baseline = reference_of(problem), baseline_of(problem)
        sizes = Sizes.of(problem, reference)
        sizes.check(problem.device)
        problem.check_independent()
        judge = Judge(reference, precision_of(problem))
        chosen = strategies_for(problem, sizes, strategies)
        entries = [
            Entry(problem, contestant, judge, effort, problem.device)
            for contestant in contestants(problem, chosen, memory, reference.is_random)
        ]
        foretell(problem, chosen, [entry.result for entry in entries])
        results = measure(entries, effort, baseline, on_step)
    title = f"{problem.describe()}; {sizes}; {_where(problem)}"
    return Comparison(title, tuple(results), baseline, judge.says, memory)


@contextmanager
def _progress_bar(is_shown: bool) -> Iterator[Callable[[str, int | None], None]]:
    """A function to call before each step, with its name and the number of all steps."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not is_shown) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, total: bar.update(task, description=escape(name), total=total, advance=1)


def _where(problem: Problem) -> str:
    """The dtypes of a problem, its device, and the version of torch."""
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in problem.dtypes))
    if problem.device.type == "cuda":
        device = torch.cuda.get_device_name(problem.device)
    else:
        threads = torch.get_num_threads()
        device = f"the CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    return f"{dtypes} on {device}, torch {torch.__version__}"
