"""What Jacobians of networks that vmap refuses take beside their result, as the system sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacfunc
from benchmarks.problems.networks import CLASSES, PIXELS, Recurrent, Transformer, perceptron
from benchmarks.problems.refusing import ACTIVATIONS, OldStyle
from benchmarks.report.tables import add, console, table
from benchmarks.studies.resident import STATUS, case_alone, settle, taken_by
from benchmarks.verdicts.intervals import span

Wrt: TypeAlias = Literal["params", "inputs"]

MEGABYTES = (20, 60, 200)
TARGET = 2.0  # of the result
WRT = ("params", "inputs")
LIMIT = 120  # seconds of one process


class Item(nn.Module):
    """ReLU, unless a number that Python reads says that something is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.detach().abs().sum().isfinite().item() else x


class Counting(nn.Module):
    """ReLU; the last sample is written into a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.detach()[-1].sum())
        return x.relu()


class Checkpointed(nn.Module):
    """A network whose layers are all recomputed in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Unruled(nn.Module):
    """A perceptron with slopes that are used where no rule says what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = perceptron(64, 64), nn.Linear(64, CLASSES)
        self.slopes, self.between = nn.Parameter(torch.ones(64)), OldStyle()

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.atan2(self.between(self.first(x)), self.slopes))


class Each(nn.Module):
    """A perceptron that goes through the samples one by one, and looks at each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron(64, 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(row if (row > 0).any() else 2 * row) for row in x.split(1)])


class Masked(nn.Module):
    """A transformer whose mask of pixels is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer(width=48)

    def forward(self, x: Tensor) -> Any:
        mask = x > -2
        return self.inner(x if mask.all() else x * mask)


def convolutional() -> nn.Module:
    first = nn.Conv2d(1, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), ACTIVATIONS["mask"]()
    second = nn.Conv2d(16, 32, 3, 2, padding=1), nn.GroupNorm(4, 32), OldStyle()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 49, CLASSES))


def multilayer(between: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return perceptron(64, 64, CLASSES, between=between)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(multilayer, between) for name, between in ACTIVATIONS.items()},
    "item": partial(multilayer, Item),
    "buffer": partial(multilayer, Counting),
    "checkpoint, whole": lambda: Checkpointed(multilayer()),
    "GRU": partial(Recurrent, nn.GRU),
    "LSTM": partial(Recurrent, nn.LSTM),
    "RNN": partial(Recurrent, nn.RNN),
    "CNN, mask": convolutional,
    "transformer, mask": Masked,
    "without a rule": Unruled,
    "one by one": Each,
}


def taken(network: str, wrt: Wrt, megabytes: int) -> dict[str, Any]:
    """The most bytes of this process in its first call, with the result."""
    settle()
    module = NETWORKS[network]()
    columns = PIXELS**2 if wrt == "inputs" else sum(x.numel() for x in module.parameters())
    each = 4 * CLASSES * columns
    count = max(1, megabytes * 2**20 // each)
    x = torch.randn(count, 1, PIXELS, PIXELS)
    module(x[:1]).sum().backward()  # torch loads some of its code only now
    most, code, _ = taken_by(lambda: jacfunc.module_jacobian(module, wrt, per_sample=True)(x))
    return {"samples": count, "result": count * each, "most": most, "code": code}


def measure(device: torch.device) -> dict[str, Any]:
    """The body of the results file; each case has a process of its own, on the CPU."""
    if device.type != "cpu" or not STATUS.exists():
        return {"target": TARGET, "results": []}
    every = track([*product(NETWORKS, WRT, MEGABYTES)], "ladder", console=console)
    named = (dict(zip(("network", "wrt", "megabytes"), case, strict=True)) for case in every)
    return {"target": TARGET, "results": [case_alone(taken, names, LIMIT) for names in named]}


def share(case: Mapping[str, Any]) -> float:
    """Bytes that the call took, without code, beside those of its result."""
    return float((case["most"] - case["code"]) / case["result"])


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A table a side, of parts of the result; networks that take more than wanted stand out."""
    shown = []
    for wrt in WRT if body["results"] else ():
        cases = [case for case in body["results"] if case["wrt"] == wrt]
        sizes = sorted({case["megabytes"] for case in cases})
        title = f"What Jacobians by {wrt} take where vmap refuses, beside their result"
        caption = f"Wanted: at most {body['target']:g}"
        of_side = table(title, caption, "network", *(f"{size} MB" for size in sizes))
        for network in dict.fromkeys(case["network"] for case in cases):
            own = sorted((c for c in cases if c["network"] == network), key=_size)
            is_above = any("most" not in c or share(c) > body["target"] for c in own)
            add(of_side, network, *map(_told, own), style="red" if is_above else "")
        shown.append(of_side)
    return shown


def _size(case: Mapping[str, Any]) -> int:
    return int(case["megabytes"])


def _told(case: Mapping[str, Any]) -> str:
    return f"{share(case):.2f}" if "most" in case else str(case["refusal"])


def says(body: Mapping[str, Any]) -> str:
    """How many Jacobians keep to twice their result."""
    shares = [share(case) for case in body["results"] if "most" in case]
    kept = sum(each <= body["target"] for each in shares)
    return (
        f"Where vmap refuses, {kept} of {len(shares)} first calls of `module_jacobian` take at "
        f"most {body['target']:g} times the bytes of their result, with the result, as the system "
        f"counts a process; all take {span(shares)} times these ({{source}})."
    )
