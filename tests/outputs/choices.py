"""Modules whose outputs are asked for in all ways, beside the cotangents that each way means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import jacfunc
from tests.truth.doors import Inputs, Truth, truth_of
from tests.truth.oracles import float_leaves

B = 3


class Steps(nn.Module):
    """Scores of every step, as of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x)).tanh())


class Heads(nn.Module):
    """A dict of outputs: one without a dimension of its own, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one, self.many = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.inner(x).tanh()
        scores = self.many(hidden)
        return {"energy": self.one(hidden)[:, 0], "class": scores.argmax(1), "scores": scores}


class Recurrent(nn.Module):
    """One that torch refuses under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Case(NamedTuple):
    """A module at a batch, and what a loop of autograd says of it."""

    module: nn.Module
    inputs: Inputs
    truth: Truth


MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), (3,)),
    "steps": (Steps, (2, 3)),
    "heads": (Heads, (3,)),
    "recurrent": (Recurrent, (2, 3)),
}


def case_of(name: str) -> Case:
    make, shape = MAKERS[name]
    torch.manual_seed(0)
    module = make().double()
    inputs = (torch.randn(B, *shape, dtype=torch.float64),)
    return Case(module, inputs, truth_of(module, inputs))


class Asked(NamedTuple):
    """A value of ``outputs=``, and the cotangents ``[B, R, M]`` that it stands for."""

    outputs: Any
    cotangents: Tensor


def units(numbers: Tensor, size: int) -> Tensor:
    """Unit cotangents ``[…, M]`` of outputs with these numbers."""
    return torch.eye(size, dtype=torch.float64)[numbers]


def numbered(case: Case, outputs: Any, numbers: Tensor) -> Asked:
    size = case.truth.outputs.shape[1]
    return Asked(outputs, units(numbers.expand(B, *numbers.shape[-1:]) % size, size))


def by_value(case: Case, outputs: Any) -> Asked:
    with torch.no_grad():
        return numbered(case, outputs, outputs.indices(case.module(*case.inputs)))


def summed(case: Case, lead: tuple[int, ...]) -> Asked:
    """Random cotangents, as a tree like the output; lone numbers stay tensors."""
    generator = torch.Generator().manual_seed(1)

    def like(out: Tensor) -> Tensor | None:
        shape = (*lead, *out.shape[1:])
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    output = case.module(*case.inputs)
    if isinstance(output, dict):
        tree: Any = {name: like(x) if x.is_floating_point() else None for name, x in output.items()}
    else:
        tree = like(output)
    row = torch.cat([x.reshape(*lead, -1) for x in float_leaves(tree)], -1)
    return Asked(tree, row.expand(B, *row.shape[-2:]))


CHOICES: dict[str, Callable[[Case], Asked]] = {
    "numbers": lambda case: numbered(case, [0, 2, -1], torch.tensor([0, 2, -1])),
    "twice the same": lambda case: numbered(case, (1, 1), torch.tensor([1, 1])),
    "a range": lambda case: numbered(case, range(1, 3), torch.tensor([1, 2])),
    "a tensor": lambda case: numbered(case, torch.tensor([-2, 0]), torch.tensor([-2, 0])),
    "a slice": lambda case: numbered(
        *(case, slice(None, 0, -2)), torch.arange(case.truth.outputs.shape[1])[1:].flip(0)[::2]
    ),
    "own numbers": lambda case: numbered(case, OWN, OWN),
    "largest": lambda case: by_value(case, jacfunc.TopK(2)),
    "drawn": lambda case: by_value(case, jacfunc.Sampled(2, seed=3)),
    "drawn alike": lambda case: by_value(case, jacfunc.Sampled(2, seed=3, chances="uniform")),
    "cotangents": lambda case: summed(case, (2,)),
    "own cotangents": lambda case: summed(case, (B, 2)),
}
OWN = torch.tensor([[0, -1], [2, 1], [-3, 0]])
