"""What the first call of a process takes of its budget, as the system sees it.

Beside each network stands what torch alone takes in such a process, but for tensors, where the rows
of one sample are pulled back by hand: code that it writes, and room that its kernels keep. It is in
the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import jacfunc
from benchmarks.report.tables import add, console, table
from benchmarks.studies.resident import STATUS, alone, case_alone, settle, taken_by
from jacfunc._memory import PeakBytes
from jacfunc._units import in_bytes

MEGABYTES = (5, 40, 200)
TARGET = 1.2  # of a budget of twice the result
CLASSES, COLUMNS = 10, 512
FACTOR = 4  # of what is never whole, all rows would take so many times the result's size
LIMIT = 600  # seconds of one process


class Recurrent(nn.Module):
    """The last state of a GRU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 48, batch_first=True), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x)[0][:, -1])
        return out


class Encoder(nn.Module):
    """Two layers of a transformer, and a linear layer of the mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


def perceptron() -> nn.Module:
    hidden = nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(64, CLASSES))


def convolutional() -> nn.Module:
    def block(ins: int, outs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(ins, outs, 3, padding=1), nn.GroupNorm(8, outs), nn.ReLU()

    first, last = (*block(3, 32), *block(32, 32), nn.MaxPool2d(2)), block(32, 64)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(*first, *last, *head)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (perceptron, (256,)),
    "CNN": (convolutional, (3, 32, 32)),
    "GRU": (Recurrent, (20, 16)),
    "transformer": (Encoder, (16, 32)),
}
Call = Callable[[nn.Module, int, Tensor, Tensor], Any]


def consumed(module: nn.Module, by: Any, memory: int, x: Tensor) -> None:
    """All blocks of a stream, one after the other."""
    for _, block in jacfunc.stream_jacobian(module, by, per_sample=True, memory=memory)(x):
        del block


DOORS: dict[str, Call] = {
    "module_jacobian, params": lambda f, memory, x, _: jacfunc.module_jacobian(
        f, per_sample=True, memory=memory
    )(x),
    "module_jacobian, inputs": lambda f, memory, x, _: jacfunc.module_jacobian(
        f, "inputs", per_sample=True, memory=memory
    )(x),
    "ntk": lambda f, memory, x, _: jacfunc.ntk(f, None, x, memory=memory),
    "ggn, diagonal": lambda f, memory, x, y: jacfunc.ggn(f, F.cross_entropy, memory=memory)(
        x, y
    ).diagonal(),
    "gradient_norms": lambda f, memory, x, y: jacfunc.gradient_norms(
        f, F.cross_entropy, memory=memory
    )(x, y),
    "stream_jacobian, params": lambda f, memory, x, _: consumed(f, "params", memory, x),
    "stream_jacobian, samples": lambda f, memory, x, _: consumed(f, "samples", memory, x),
    "random_projection": lambda f, memory, x, _: jacfunc.random_projection(
        f, COLUMNS, memory=memory
    )(x),
}


def samples_for(door: str, size: int, params: int, inputs: int) -> int:
    """How many samples have a result of so many bytes.

    Of what is never whole, all rows of the Jacobian would take several times as many.
    """
    rows, all_rows = 4 * CLASSES, 4 * CLASSES * params
    each = {
        "module_jacobian, params": all_rows,
        "module_jacobian, inputs": rows * inputs,
        "stream_jacobian, params": all_rows,
        "random_projection": rows * COLUMNS,
    }.get(door, all_rows / FACTOR)
    return max(1, round((size / (rows * CLASSES)) ** 0.5 if door == "ntk" else size / each))


def taken(door: str, network: str, megabytes: int) -> dict[str, Any]:
    """The most bytes of this process in its first call, beside those before it."""
    module, shape = _prepared(network)
    size, params = megabytes * 2**20, sum(param.numel() for param in module.parameters())
    count = samples_for(door, size, params, shape.numel())
    x, y = torch.randn(count, *shape), torch.randint(CLASSES, (count,))
    budget = 2 * size
    most, code, refusal = taken_by(lambda: DOORS[door](module, budget, x, y), ValueError)
    counts = {"samples": count, "budget": budget, "most": most, "code": code}
    return counts | {"refusal": refusal}


def floor(network: str) -> int:
    """Bytes that torch takes beside tensors, where the rows of a sample are pulled back by hand."""
    module, shape = _prepared(network)
    x, params = torch.randn(1, *shape), tuple(module.parameters())

    def by_hand() -> None:
        for out in module(x)[0]:
            torch.autograd.grad(out, params, retain_graph=True)

    most, code, _ = taken_by(by_hand)
    with PeakBytes() as counter:
        by_hand()
    return int(max(0, most - code - counter.peak))


def _prepared(network: str) -> tuple[nn.Module, torch.Size]:
    """A network, and the shape of its samples, in a process that has multiplied matrices."""
    settle()
    make, shape = NETWORKS[network]
    return make(), torch.Size(shape)


def measure(device: torch.device) -> dict[str, Any]:
    """The body of the results file; each case has a process of its own, on the CPU."""
    if device.type != "cpu" or not STATUS.exists():
        return {"target": TARGET, "results": []}
    every = list(product(DOORS, NETWORKS, MEGABYTES))
    names = "door", "network", "megabytes"
    return {
        "target": TARGET,
        "floors": {network: alone(floor, network, limit=LIMIT) for network in NETWORKS},
        "results": [
            case_alone(taken, dict(zip(names, case, strict=True)), LIMIT)
            for case in track(every, "calls", console=console)
        ],
    }


def share(case: Mapping[str, Any]) -> float:
    """Bytes that the call took, without code, as a part of its budget."""
    return float((case["most"] - case["code"]) / case["budget"])


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A table a size, of parts of the budget; doors that take more than wanted stand out."""
    shown = []
    for megabytes in _sizes(body):
        title = f"What a first call takes of a budget of twice {megabytes} MB"
        caption = f"Wanted: at most {body['target']}. In brackets: with the pages of code"
        for network, nbytes in body.get("floors", {}).items():
            part = nbytes / (2 * megabytes * 2**20)
            caption += f". Of {network} torch alone takes {part:.2f}"
        of_size = table(title, caption, "door", *NETWORKS)
        for door in DOORS:
            cases = {
                case["network"]: case
                for case in body["results"]
                if (case["door"], case["megabytes"]) == (door, megabytes)
            }
            above = [c for c in cases.values() if "most" in c and share(c) > body["target"]]
            cells = (_told(cases.get(network)) for network in NETWORKS)
            add(of_size, door, *cells, style="red" if above else "")
        shown.append(of_size)
    return shown


def _sizes(body: Mapping[str, Any]) -> list[int]:
    return sorted({case["megabytes"] for case in body["results"]})


def _told(case: Mapping[str, Any] | None) -> str:
    if case is None or "most" not in case:
        return "–" if case is None else case["refusal"]
    told = f"{share(case):.2f} ({case['most'] / case['budget']:.2f})"
    return f"{told}, refused" if case["refusal"] else told


def says(body: Mapping[str, Any]) -> str:
    """How many first calls keep to their budget."""
    parts = []
    for megabytes in _sizes(body):
        cases = [c for c in body["results"] if c["megabytes"] == megabytes and "most" in c]
        kept = sum(share(case) <= body["target"] for case in cases)
        parts.append(f"{kept} of {len(cases)} of {in_bytes(megabytes * 2**20)}")
    return (
        f"Of first calls with a budget of twice the result, {'; '.join(parts)} take at most "
        f"{body['target']} of it, as the system counts a process without its code ({{source}})."
    )
