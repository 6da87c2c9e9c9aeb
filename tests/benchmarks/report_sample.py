"""A made-up run for the tests of the report: every status, a grid, an axis, forecasts."""

from __future__ import annotations

import random

from benchmarks.cases import ANSWER, Case, Question, Wanted, as_record
from benchmarks.running.records import Run
from jacfunc._measuring.results import Result, summarize
from jacfunc._measuring.rounds import Contestant

AUTO, REVERSE, FORWARD = "jacfunc auto", "jacfunc reverse", "jacfunc forward"
JACREV, LOOP, WRITE = "torch.func jacrev", "autograd looped by hand", "a bare write"
FAMILIES = {AUTO: "jacfunc", REVERSE: "jacfunc", FORWARD: "jacfunc", WRITE: "bound"}
FAMILIES |= {JACREV: "torch.func", LOOP: "autograd", "JAX jacrev": "JAX", "TorchJD": "rival"}
FAMILIES |= {f"autograd.functional jacobian, way {n}": "autograd" for n in range(4)}

FAILURES = {
    "Laplace": "wrong: relative error 3.0e+00 <above> 1e-4",
    "Opacus": "unsupported: NotImplementedError: no rule for 'softmax' & co.",
    "BackPACK": "not installed: No module named 'backpack'",
    "curvlinops": "out of memory",
    "neural-tangents": "crashed: SIGSEGV",
    "TorchJD, looped": "out of time",
}

SIDES = (4, 256)
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "cpu",
    "device_name": "Some <CPU>",
    "cpus": 2,
    "system": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "jacfunc": "0.1.0",
    "commit": "0123456789ab",
    "threads": 1,
    "load_before": [0.35, 1.35, 1.59],
}
RIVALS = {"opacus": "1.6.0", "backpack-for-pytorch": None}


def made_up(seed: int = 0) -> Run:
    """The same numbers for the same seed."""
    draw = random.Random(seed)
    run = Run("full", ENVIRONMENT, RIVALS, {})
    for question, cases in ((crossover(draw)), kernels(draw), params(draw)):
        for number, (case, results) in enumerate(cases):
            record = as_record(question, case, results)
            more = {"took": 2.5, "load": 0.5 + number / 8, "commit": "0123456789ab"}
            run.cases[f"{question.name}/{case.name}"] = record | more
    return run


def a_case(name: str, results: list[Result], **more) -> Case:
    """With contestants who are known by name alone: nothing is measured."""
    contestants = tuple(
        Contestant(r.contestant, r.family, lambda problem: problem) for r in results
    )
    return Case(name, lambda device: None, contestants, lambda problem: lambda answer: 0.0, **more)


def ran(draw: random.Random, name: str, seconds: float, peak: int | None = None, **more) -> Result:
    """Ten rounds around a time."""
    times = {n: seconds * draw.lognormvariate(0.0, 0.03) for n in range(1, 11)}
    error = None if FAMILIES[name] == "bound" else draw.uniform(1e-8, 1e-6)
    return Result(name, FAMILIES[name], error=error, seconds=times, peak_bytes=peak, **more)


def crossover(draw: random.Random):
    question = Question("crossover", "Reverse or forward, for N inputs & M outputs?", AUTO, ())
    return question, [at(draw, inputs, outputs) for inputs in SIDES for outputs in SIDES]


def at(draw: random.Random, inputs: int, outputs: int) -> tuple[Case, list[Result]]:
    """Reverse mode goes by outputs, forward mode by inputs."""
    peak = 4 * inputs * outputs + 5000
    rows, columns = 1e-4 + 2e-6 * outputs, 1e-4 + 3e-6 * inputs
    best = min(rows, columns)
    results = [
        ran(draw, AUTO, best, peak, forecast_seconds=1.3 * best, forecast_bytes=peak),
        ran(draw, REVERSE, rows, 2 * peak, forecast_seconds=2.5 * rows, forecast_bytes=2 * peak),
        ran(draw, FORWARD, columns, peak, forecast_bytes=peak),
        ran(draw, JACREV, 1.2 * rows, 2 * peak + 64),
        ran(draw, "JAX jacrev", 1.5 * rows),
        ran(draw, LOOP, 20 * rows, peak + 999),
        *(
            ran(draw, f"autograd.functional jacobian, way {n}", 2 * rows, 2 * peak)
            for n in range(4)
        ),
        ran(draw, WRITE, best / 10, peak),
    ]
    summarize({r.contestant: r for r in results}, JACREV)
    case = a_case(
        f"mlp 64, {inputs} → {outputs}",
        results,
        baseline=JACREV,
        sizes={"inputs": inputs, "outputs": outputs, "width": 64},
        wanted=(Wanted(AUTO, "time ÷", 1.1, (REVERSE, FORWARD)),),
    )
    return case, results


def kernels(draw: random.Random):
    question = Question("ntk", "How does the time of a kernel grow?", AUTO, ())
    return question, [grown(draw, batch) for batch in (8, 16, 64)]


def grown(draw: random.Random, batch: int) -> tuple[Case, list[Result]]:
    results = [
        ran(draw, AUTO, 1e-5 * batch**2, 1000 * batch, work=float(batch**2)),
        ran(draw, JACREV, 1e-4 * batch**2.5, 50_000 * batch, work=float(batch**2)),
        ran(draw, "TorchJD", 3e-3 * batch, 20_000 * batch),
    ]
    summarize({r.contestant: r for r in results}, JACREV)
    wanted = (Wanted(AUTO, "times faster than", 1e6, (JACREV, "TorchJD")),)
    sizes = {"batch": batch, "parameters": 1000}
    more = {"baseline": JACREV, "sizes": sizes, "axis": "batch", "wanted": wanted}
    return a_case(f"NTK, mlp, B={batch}", results, **more), results


def params(draw: random.Random):
    question = Question("params", "Per-sample Jacobians: by which library?", AUTO, ())
    return question, [with_failures(draw, network) for network in ("cnn", "mlp")]


def with_failures(draw: random.Random, network: str) -> tuple[Case, list[Result]]:
    results = [
        ran(draw, AUTO, 0.02, 60_000_000),
        ran(draw, JACREV, 0.0201, 90_000_000),
        ran(draw, LOOP, 1.5, 70_000_000),
    ]
    results += [Result(name, "rival", status) for name, status in FAILURES.items()]
    summarize({r.contestant: r for r in results}, JACREV)
    wanted = (Wanted(AUTO, "peak ÷", 1.0, (ANSWER,)),)
    sizes = {"batch": 64, ANSWER: 58_000_000}
    more = {"baseline": JACREV, "sizes": sizes, "wanted": wanted, "dtype": "float64"}
    return a_case(f"{network}, B=64", results, **more), results
