"""Jacobians under a tenth of the memory that they would take: bytes counted, time beside chunks."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import jacfunc
from benchmarks.problems import formulas
from benchmarks.report.tables import add, table
from benchmarks.verdicts.intervals import span
from jacfunc._measuring import Run, interleaved, peak_bytes
from jacfunc._units import in_bytes, in_seconds

CHUNKS = (8, 16, 32, 64, 128, 256)
SHARE = 10  # the budget is the unchunked peak divided by this
ROUNDS, TARGET = 7, 1.3

Derive = Callable[..., Run]
"""Makes a call that keeps to ``memory=`` bytes, or to ``chunk_size=``, or to neither."""


def cases(device: torch.device) -> dict[str, Derive]:
    """A transform each, on functions whose intermediate results dwarf the Jacobian."""
    draw = formulas.drawing(torch.float32, device)
    wide, tall, square = draw(1500, 30) / 6, draw(800, 1500) / 40, draw(1500, 200) / 14
    functions: dict[str, Derive] = {}
    for name, derive, func, x in (
        ("jacrev", jacfunc.jacrev, lambda x: tall @ torch.tanh(torch.sin(wide @ x)), draw(30)),
        ("jacfwd", jacfunc.jacfwd, lambda x: wide.T @ torch.tanh(tall.T @ x), draw(800)),
        ("hessian", jacfunc.hessian, lambda x: torch.tanh(square @ x).square().sum(), draw(200)),
    ):
        functions[name] = partial(_of_function, derive, func, x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 10)).to(device)
    return functions | {"per sample": partial(_of_samples, model, draw(128, 64))}


def _of_function(derive: Any, func: Any, x: Tensor, **options: int | None) -> Run:
    return partial(derive(func, **options), x)


def _of_samples(model: nn.Module, x: Tensor, memory: int | None = None, chunk_size: int = 0) -> Run:
    """Chunks are of samples."""
    derive = jacfunc.module_jacobian(
        model, "inputs", per_sample=True, strategy="reverse", memory=memory
    )
    if not chunk_size:
        return partial(derive, x)
    return lambda: torch.cat([derive(piece) for piece in x.split(chunk_size)])


def measure(device: torch.device) -> dict[str, Any]:
    """The body of the results file."""
    results = [measured(name, derive, device) for name, derive in cases(device).items()]
    return {"target": TARGET, "results": results}


def measured(name: str, derive: Derive, device: torch.device) -> dict[str, Any]:
    """Bytes counted first; then the budget and the chunks that keep to it, in rounds."""
    unchunked = _peak(derive(), device)
    budget = unchunked // SHARE
    within = derive(memory=budget)
    taken = _peak(within, device)
    chunked = {chunk: derive(chunk_size=chunk) for chunk in CHUNKS}
    runs = {chunk: run for chunk, run in chunked.items() if _peak(run, device) <= budget}
    times = interleaved(runs | {0: within}, ROUNDS, device)
    medians = {chunk: statistics.median(seconds) for chunk, seconds in times.items()}
    best = min((chunk for chunk in medians if chunk), key=medians.__getitem__)
    ratio = statistics.median(a / b for a, b in zip(times[0], times[best], strict=True))
    counts = {"case": name, "unchunked": unchunked, "budget": budget, "taken": taken}
    seconds = {"best_chunk": best, "seconds": medians[0], "best_seconds": medians[best]}
    return {**counts, **seconds, "ratio": ratio}


def _peak(run: Run, device: torch.device) -> int:
    run()  # what torch allocates once is not the Jacobian's
    return peak_bytes(run, device)


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A row a case; what breaks its budget, or takes more than the target, stands out."""
    title = f"Jacobians under a memory budget, a {SHARE}th of the unchunked peak"
    caption = f"Wanted: within the budget, and at most {body['target']}× of the best fixed chunk"
    counted = ("unchunked", "budget", "taken")
    shown = table(title, caption, "case", *counted, "best chunk", "time", "ratio")
    for case in body["results"]:
        is_broken = case["taken"] > case["budget"] or case["ratio"] > body["target"]
        counts = (in_bytes(case[name]) for name in counted)
        cells = str(case["best_chunk"]), in_seconds(case["seconds"]), f"{case['ratio']:.2f}"
        add(shown, case["case"], *counts, *cells, style="red" if is_broken else "")
    return [shown]


def says(body: Mapping[str, Any]) -> str:
    """What it costs to keep to a tenth of the memory."""
    cases = body["results"]
    kept = sum(case["taken"] <= case["budget"] for case in cases)
    share = round(statistics.median(case["unchunked"] / case["budget"] for case in cases))
    return (
        f"Held to 1/{share} of the memory that they take without chunks, {kept} of {len(cases)} "
        f"Jacobians keep to it, and take {span([case['ratio'] for case in cases])} of the time of "
        "the best chunk picked by hand ({source})."
    )
