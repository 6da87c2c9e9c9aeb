"""What is measured: a row here is a workload for every contestant and every device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import digits

Wrt = Literal["params", "inputs"]
Answer = dict[str, Tensor]
"""Blocks ``[B, C, *param]`` by parameter name, or ``{"input": [B, C, *image]}``."""


@dataclass(frozen=True)
class Workload:
    """Per-sample Jacobians of one model, in its parameters or its inputs."""

    model: str
    wrt: Wrt

    @property
    def name(self) -> str:
        return f"{self.model}-{self.wrt}"


@dataclass(frozen=True)
class Problem:
    """A workload set up: what a contestant is given."""

    model: nn.Module
    images: Tensor
    wrt: Wrt

    def cuda(self) -> bool:
        return self.images.is_cuda


@dataclass(frozen=True)
class Suite:
    """How large and how long: images in a batch, rounds, seconds a contestant a workload."""

    batch: int
    rounds: int
    seconds: float


WORKLOADS: tuple[Workload, ...] = (
    Workload("mlp", "params"),
    Workload("mlp", "inputs"),
    Workload("cnn", "params"),
    Workload("cnn", "inputs"),
)
SUITES: dict[str, Suite] = {
    "quick": Suite(batch=16, rounds=40, seconds=1.5),
    "full": Suite(batch=64, rounds=100, seconds=10.0),
}


def named(name: str) -> Workload:
    """The workload of this name."""
    return next(workload for workload in WORKLOADS if workload.name == name)


def prepare(workload: Workload, model: nn.Module, batch: int, device: torch.device) -> Problem:
    """The workload on a device, on a copy of the trained model."""
    images = digits.held_out(batch).to(device)
    return Problem(copy.deepcopy(model).to(device), images, workload.wrt)
