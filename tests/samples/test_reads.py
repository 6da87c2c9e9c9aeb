"""What Python reads of a batch may lead a sample another way than the sample alone is led."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.modules import test_settled
from tests.modules.test_settled_layers import assert_same, loop, normal

SETTLED = 6
"""After so many calls nothing is left to learn."""

SIZES: list[int] = []
"""Of the batches that were evaluated."""

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Reading(nn.Module):
    """A network that does something between its layers, by what it reads.

    The first numbers of a sample are 0 or 1: its mask.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(4, 4), nn.Linear(4, 2), step
        self.register_buffer("gate", torch.zeros(()))
        self.register_buffer("kept", torch.tensor([1, 0, 1]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        mask = x[:, :4].detach() > 0.5
        return self.last(self.step(self, self.first(x[:, 4:]), mask))  # type: ignore[no-any-return]


def batch(mask: Tensor) -> Tensor:
    return torch.cat([mask.double(), normal(4)(len(mask))], 1)


def all_of_mask(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h if mask.all() else h * mask


def count_of_mask(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h if mask.sum() == mask.numel() else h * mask


def any_of_numbers(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    large = h > 9
    return h.where(~large, 9.0) if large.any() else h.tanh()


def all_of_numbers(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    positive = h > 0
    return h if bool(positive.all()) else h * positive


def by_element(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h.sin() if 0 in mask.long()[:, [0, -1]] else h


def by_buffer(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h.tanh() if (self.kept == 1).any() else h


def by_positions(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(len(h), device=h.device)
    return h.unsqueeze(2).repeat(1, 1, 4)[places, (mask * torch.arange(4)).argmax(1)] * h.cos()


TOLD: list[Step] = [
    *(all_of_mask, count_of_mask, any_of_numbers, all_of_numbers),
    *(by_element, by_buffer, by_positions),
]


@pytest.mark.parametrize("step", TOLD, ids=lambda step: step.__name__)
@pytest.mark.parametrize("of", ["params", "inputs"])
def test_no_sample_is_evaluated_alone_that_would_read_the_same(step: Step, of: Any) -> None:
    torch.manual_seed(0)
    module = Reading(step)
    strategy: Any = "structured" if of == "params" else "auto"
    jac = jacfunc.module_jacobian(module, of, per_sample=True, strategy=strategy)
    for number in range(20):
        mask = torch.ones(5, 4)
        if step is by_positions:
            mask = torch.rand(5, 4).round()
        x = batch(mask)
        own = loop(module, x) if of == "params" else by_inputs(module, x)
        SIZES.clear()
        assert_same(jac(x) if of == "params" else {"x": jac(x)}, own)
        assert number < SETTLED or is_due(number) or 1 not in SIZES


def is_due(number: int) -> bool:
    """Are batches compared at this call?"""
    return number & (number + 1) == 0


def by_inputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": test_settled.loop(module, x)}


def test_samples_that_would_read_otherwise_are_evaluated_alone() -> None:
    torch.manual_seed(0)
    module = Reading(all_of_mask)
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")
    for number in range(12):
        mask = torch.ones(6, 4)
        mask[torch.randperm(6)[:4], number % 4] = 0
        x = batch(mask)
        own = loop(module, x)
        SIZES.clear()
        assert_same(jac(x), own)
        assert number < SETTLED or is_due(number) or SIZES.count(1) == 2


def bends(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h if mask.all() else h.relu()


def doubles(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return 2 * h if (h > 0).all() else h


def doubles_any(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return 2 * h if (h > 1).any() else h


def uses_count(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    return h + self.gate * count * h if count == mask.numel() else h


def uses_answer(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    answer = mask.all()
    h = h * torch.where(answer, 1.0 + self.gate, 1.0)
    return h if bool(answer) else h * 1.0


def counts_to_twenty(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h * (2.0 if mask.sum() == 20 else 1.0)


def across(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h * (2.0 if mask[:, :1].T.any(0).all() else 1.0)


def turned(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    square = mask.T.contiguous()
    return h * (2.0 if square.all() else 1.0)


def rewritten(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    own = mask.clone()
    answer = own.all()
    own.fill_(True)
    return h * (2.0 if answer else 1.0)


def rewritten_unseen(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    own = mask.clone()
    behind = own.numpy() if not h.requires_grad else own.detach().numpy()
    answer = own.all()
    behind[...] = False
    return h * (2.0 if answer else 1.0)


def number_of_samples(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h * (2.0 if len(h) in mask.long().sum(1, keepdim=True) else 1.0)


def by_item(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h * (1.0 + mask.all().item() * mask.any(0).sum().item())


def numbered(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h + self.gate * h * torch.arange(len(h))[:, None]


def neighbours(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    places, last = torch.arange(len(h)), mask.long().argmax(1)
    return h + self.gate * h[places.flip(0), last][:, None]


def others_choice(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    places, last = torch.arange(len(h)), mask.long().argmin(1).roll(1, 0)
    return h + h[places, last][:, None]


def turned_choice(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(len(h)).clamp(max=3)
    return h + h.T[places, mask.long().argmin(1) % len(h)][:, None]


def shifted(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    return h * (2.0 if mask.roll(1, 0).all() else 1.0)


def shifted_beside(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    h = h * (1 + mask.roll(1, 0)[:, :1].double())
    return h if mask.all() else h * 1.0


def shifted_in_place(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    own = mask.clone()
    own[torch.arange(len(h)).flip(0)] = mask
    return h * (2.0 if own.all() else 1.0)


def by_bare_numbers(self: Any, h: Tensor, mask: Tensor) -> Tensor:
    scale = torch.from_numpy(mask.numpy().cumsum(0)[:, :1]).double()
    return h + self.gate * h * scale if mask.all() else h


CHEATS: list[Step] = [
    *(bends, doubles, doubles_any, uses_count, uses_answer, counts_to_twenty, across, turned),
    *(rewritten, rewritten_unseen, number_of_samples, by_item, numbered, neighbours),
    *(others_choice, turned_choice, shifted, shifted_beside, shifted_in_place, by_bare_numbers),
]


def masks(size: int) -> Iterable[Tensor]:
    """First all ones, later some zeros, then what they like."""
    for number in range(24):
        mask = torch.ones(size, 4)
        if number >= 10:
            mask[torch.randint(size, ()), number % 4] = 0
        if number >= 18:
            mask = torch.rand(size, 4).round()
        yield mask


@pytest.mark.parametrize("step", CHEATS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("strategy", ["structured", "auto"])
def test_no_number_is_wrong_where_reads_couple_samples(
    step: Step, size: int, strategy: Any
) -> None:
    torch.manual_seed(0)
    module = Reading(step)
    with torch.no_grad():
        module.first.bias += 3  # so that all is positive at first
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    inputs = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for number, mask in enumerate(masks(size)):
        if number == 8:
            module.gate.fill_(0.5)
        if number == 14:
            with torch.no_grad():
                module.first.bias -= 3
        x = batch(mask)
        own, of_inputs = loop(module, x), by_inputs(module, x)
        with suppress(ValueError):  # it may say that samples depend on each other
            assert_same(jac(x), own)
        with suppress(ValueError):
            assert_same({"x": inputs(x)}, of_inputs)
        rows = torch.cat([block.flatten(2) for block in own.values()], 2)
        with suppress(ValueError):
            kernel = jacfunc.ntk(module, None, x, trace_axes=-1)
            expected = torch.einsum("bkp,ckp->bc", rows, rows)
            torch.testing.assert_close(kernel, expected, rtol=1e-12, atol=1e-12)
