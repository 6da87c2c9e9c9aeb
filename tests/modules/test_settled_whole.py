"""Whole batches of one sample: later calls are taken as one sample's are, with the same answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._settled import SettledBatch
from tests.house.calls import num_calls

CALLS = 6


class Turned(nn.Module):
    """Returns the samples behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).T


class Ones(nn.Module):
    """Returns more than one row for one sample, or a number."""

    def __init__(self, is_number: bool) -> None:
        super().__init__()
        self.linear, self.is_number = nn.Linear(3, 2), is_number

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh()
        return out.sum() if self.is_number else out.expand(2, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def expected(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A row at a time, by plain autograd."""
    params = dict(module.named_parameters())
    out = module(x)
    rows = [torch.autograd.grad(each, params.values(), retain_graph=True) for each in out.flatten()]
    blocks = [torch.stack(list(block)) for block in zip(*rows, strict=True)]
    pairs = zip(params, blocks, strict=True)
    return {name: block.view(*out.shape, *block.shape[1:]) for name, block in pairs}


def is_settled(call: Callable[[], Any]) -> bool:
    """Is the call taken as an earlier one has settled it?"""

    def is_result(frame: Any, event: str, _: Any) -> bool:
        return event == "call" and frame.f_code is SettledBatch.result.__code__

    return bool(num_calls(call, is_result))


def check(module: nn.Module, x: Tensor, settles: bool, **options: Any) -> None:
    door = jacfunc.module_jacobian(module, **options)
    for _ in range(CALLS):
        door(torch.randn_like(x))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert is_settled(lambda: door(x)) is settles
    result, blocks = door(x), expected(module.train(module.training), x)
    if options.get("flat"):
        count = next(iter(blocks.values())).numel() // next(module.parameters()).numel()
        matrix = torch.cat([block.reshape(count, -1) for block in blocks.values()], 1)
        torch.testing.assert_close(result, matrix)
    else:
        assert result.keys() == blocks.keys()
        for name, block in blocks.items():
            torch.testing.assert_close(result[name], block)
    if not module.training:
        assert all(torch.equal(before[n], buffer) for n, buffer in module.named_buffers())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("module", "sizes", "settles"),
    [
        (mlp(), (1, 3), True),
        (nn.Sequential(nn.Conv2d(2, 3, 2), nn.GELU()), (1, 2, 4, 4), True),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), (1, 3), True),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (1, 3, 4), True),
        (mlp(), (2, 3), False),
        (mlp(), (3,), False),
        (Turned(), (1, 3), False),
        (Ones(is_number=True), (1, 3), False),
        (Ones(is_number=False), (1, 3), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_it_is_that_of_rows(
    module: nn.Module, sizes: tuple[int, ...], settles: bool, flat: bool
) -> None:
    check(module, torch.randn(sizes), settles, flat=flat)


def test_normalization_over_the_batch_is_taken_as_before() -> None:
    module = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    door = jacfunc.module_jacobian(module)
    for _ in range(CALLS):
        x = torch.randn(1, 2, 5)
        assert not is_settled(lambda x=x: door(x))  # type: ignore[misc]
        for name, block in expected(module, x).items():
            torch.testing.assert_close(door(x)[name], block, atol=1e-5, rtol=1e-4)


class ByKeyword(nn.Linear):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sum([*args, *kwargs.values()]))  # type: ignore[arg-type]


def test_calls_by_keyword_and_of_several_tensors_are_settled() -> None:
    module = ByKeyword(3, 2)
    door = jacfunc.module_jacobian(module)
    x = torch.randn(1, 3)
    rows = expected(nn.Linear(3, 2), x)
    for args, kwargs in (((), {"x": x}), ((x / 2, x / 2), {}), ((x / 2,), {"y": x / 2})):
        for _ in range(CALLS):
            result = door(*args, **kwargs)
        assert is_settled(lambda args=args, kwargs=kwargs: door(*args, **kwargs))  # type: ignore[misc]
        for name, block in rows.items():
            torch.testing.assert_close(result[name], block)


def test_what_draws_draws_as_before() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    door = jacfunc.module_jacobian(module)
    for seed in range(2 * CALLS):
        x = torch.randn(1, 3)
        torch.manual_seed(seed)
        result = door(x)
        torch.manual_seed(seed)
        for name, block in expected(module, x).items():
            torch.testing.assert_close(result[name], block)


def test_a_change_of_the_module_is_seen() -> None:
    module: Any = mlp()
    door = jacfunc.module_jacobian(module)
    x = torch.randn(1, 3)
    for change in (None, "values", "layer", "frozen"):
        for _ in range(CALLS):
            door(x)
        if change == "values":
            with torch.no_grad():
                module[0].weight.mul_(2)
        elif change == "layer":
            module[1] = nn.Sigmoid()
        elif change == "frozen":
            module[2] = nn.Linear(4, 3)
        for name, block in expected(module, x).items():
            torch.testing.assert_close(door(x)[name], block)


@pytest.mark.parametrize("options", [{"full_output": True}, {"wrt": "inputs"}, {"memory": 2**20}])
def test_other_options_are_taken_as_before(options: dict[str, Any]) -> None:
    door = jacfunc.module_jacobian(mlp(), **options)
    for _ in range(CALLS):
        door(torch.randn(1, 3))
    assert not is_settled(lambda: door(torch.randn(1, 3)))
