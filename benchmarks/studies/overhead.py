"""What jacfunc's own Python costs: small MLPs against torch.func, where sweeps are cheap."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import jacfunc
from benchmarks.problems import formulas
from benchmarks.report.tables import add, console, spread, table
from benchmarks.verdicts.intervals import span
from jacfunc._measuring import Spread, interleaved

SIZES = (4, 16, 64, 256)
WIDTH, BATCH, ROUNDS, WARM_UPS = 64, 8, 100, 5
TARGETS = {"top level": 0.75, "vmap": 1.10}  # largest wanted ratios to torch.func's time
# level, outputs, point, and the Jacobian of one function by jacfunc and by torch.func
Pair = tuple[str, int, Tensor, Callable[..., Any], Callable[..., Any]]


def pairs(device: torch.device) -> Iterator[Pair]:
    """Reverse mode of MLPs n - 64 - 64 - m, at the top level and vmapped over a batch."""
    draw = formulas.drawing(torch.float32, device)
    for inputs, outputs in product(SIZES, SIZES):
        func, x = formulas.mlp(inputs, outputs, WIDTH, draw)
        ours, theirs = jacfunc.jacrev(func), torch.func.jacrev(func)
        yield "top level", outputs, x, ours, theirs
        batch = draw(BATCH, inputs)
        yield "vmap", outputs, batch, torch.func.vmap(ours), torch.func.vmap(theirs)


def measure(device: torch.device) -> dict[str, Any]:
    """The body of the results file."""
    every = track(list(pairs(device)), "overhead", console=console)
    sizes = {"rounds": ROUNDS, "width": WIDTH, "batch": BATCH, "targets": TARGETS}
    return sizes | {"results": [timed(pair, device) for pair in every]}


def timed(pair: Pair, device: torch.device) -> dict[str, Any]:
    """The two answers checked against each other, then timed in rounds; ours over theirs."""
    level, outputs, x, ours, theirs = pair
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    runs = {"ours": lambda: ours(x), "theirs": lambda: theirs(x)}
    interleaved(runs, WARM_UPS, device)
    times = interleaved(runs, ROUNDS, device)
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    sizes = {"level": level, "inputs": x.shape[-1], "outputs": outputs}
    return sizes | {n: asdict(Spread.of(v)) for n, v in ({"ratio": ratios} | times).items()}


def tables(body: Mapping[str, Any]) -> list[Table]:
    """Ratios by inputs and outputs, a table a level; rows with one above the target stand out."""
    shown = []
    for level, target in body["targets"].items():
        results = [result for result in body["results"] if result["level"] == level]
        above = sum(result["ratio"]["median"] > target for result in results)
        caption = f"Medians (quartiles). Target ≤ {target:.2f}: {above} of {len(results)} above it"
        title = f"jacfunc.jacrev ÷ torch.func.jacrev, {level}"
        of_level = table(title, caption, "inputs \\ outputs", *map(str, SIZES))
        for inputs in SIZES:
            ratios = [result["ratio"] for result in results if result["inputs"] == inputs]
            is_high = any(ratio["median"] > target for ratio in ratios)
            add(of_level, str(inputs), *map(spread, ratios), style="red" if is_high else "")
        shown.append(of_level)
    return shown


def says(body: Mapping[str, Any]) -> str:
    """What ``jacrev`` of small functions takes beside torch.func's, at both levels."""
    ratios: dict[str, list[float]] = {level: [] for level in TARGETS}
    for result in body["results"]:
        ratios[result["level"]].append(result["ratio"]["median"])
    sizes = [result["inputs"] for result in body["results"]]
    return (
        "On small functions `jacfunc.jacrev` drives plain autograd instead of functorch: on MLPs "
        f"of width {body['width']} with {min(sizes)} to {max(sizes)} inputs and outputs it takes "
        f"{span(ratios['top level'])} of the time of `torch.func.jacrev` at the top level and "
        f"{span(ratios['vmap'])} under vmap ({{source}}, medians of {body['rounds']} rounds)."
    )
