"""Answers that come later are those of the point at which the call was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.kinds.modules import floats

Change = Callable[[nn.Module, Tensor, Tensor], Any]


class Net(nn.Module):
    """Each thing that may change later makes a difference to its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("shift", torch.ones(4))
        self.scale, self.factors = 2.0, [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.scale * self.first(x) * self.factors[0] + self.shift)
        output: Tensor = self.last(hidden + self.frozen(hidden))
        return output if self.training else 3 * output


def made() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net().double(), floats(3, 3), floats(3, 2)


def step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5)
    module(floats(2, 3)).sum().backward()
    optimizer.step()


def written(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


CHANGES: dict[str, Change] = {
    "parameter in place": lambda m, x, y: written(m.first.weight),
    "parameter by data": lambda m, x, y: m.first.weight.data.mul_(2),
    "parameter by new data": lambda m, x, y: setattr(m.last.weight, "data", floats(2, 4)),
    "parameter replaced": lambda m, x, y: setattr(m.last, "weight", nn.Parameter(floats(2, 4))),
    "parameter by numpy": lambda m, x, y: m.last.weight.detach().numpy().fill(0.5),
    "frozen parameter by data": lambda m, x, y: m.frozen.weight.data.mul_(2),
    "frozen parameter in place": lambda m, x, y: written(m.frozen.weight),
    "state loaded": lambda m, x, y: m.load_state_dict(Net().double().state_dict()),
    "optimizer": lambda m, x, y: step(m),
    "buffer by data": lambda m, x, y: m.shift.data.mul_(2),
    "buffer replaced": lambda m, x, y: setattr(m, "shift", m.shift * 2),
    "attribute": lambda m, x, y: setattr(m, "scale", 1.0),
    "tensor in a list": lambda m, x, y: m.factors[0].mul_(2),
    "list": lambda m, x, y: m.factors.insert(0, m.factors[0] * 2),
    "mode": lambda m, x, y: m.eval(),
    "hook": lambda m, x, y: m.first.register_forward_hook(lambda _, args, out: 2 * out),
    "part replaced": lambda m, x, y: setattr(m, "first", nn.Linear(3, 4).double()),
    "inputs in place": lambda m, x, y: x.mul_(2),
    "inputs by numpy": lambda m, x, y: x.numpy().fill(0.5),
    "targets by data": lambda m, x, y: y.data.mul_(2),
    "random numbers": lambda m, x, y: torch.rand(5),
}


def gauss_newton(module: nn.Module, x: Tensor, y: Tensor) -> list[Callable[[], Any]]:
    result = jacfunc.ggn(module, F.mse_loss)(x, y)
    vector = {n: torch.ones_like(p) for n, p in module.named_parameters() if p.requires_grad}
    return [result.diagonal, lambda: result @ vector, result.matrix, lambda: result @ vector]


def fisher(module: nn.Module, x: Tensor, y: Tensor) -> list[Callable[[], Any]]:
    result = jacfunc.fisher(
        module, "gaussian", generator=torch.Generator().manual_seed(3), chunk_size=2
    )(x)
    return [result.diagonal, result.matrix]


def stream(*args: Any, **options: Any) -> Callable[..., list[Callable[[], Any]]]:
    def questions(module: nn.Module, x: Tensor, y: Tensor) -> list[Callable[[], Any]]:
        blocks = jacfunc.stream_jacobian(module, *args, **options)(x)
        return [lambda: next(blocks)[1], lambda: [block for _, block in blocks]]

    return questions


LAZY: dict[str, Callable[..., list[Callable[[], Any]]]] = {
    "ggn": gauss_newton,
    "fisher": fisher,
    "parameters": stream("params"),
    "rows": stream("rows", chunk_size=2),
    "parameters per sample": stream("params", per_sample=True),
    "samples": stream("samples", per_sample=True, chunk_size=1),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("door", LAZY)
@pytest.mark.parametrize("change", CHANGES)
def test_answers_are_those_of_the_call(change: str, door: str, number: int) -> None:
    """Whether the change comes before the first question or after it."""
    expected = [question() for question in LAZY[door](*made())]
    module, x, y = made()
    questions = LAZY[door](module, x, y)
    result = []
    for i, question in enumerate(questions):
        if i == number:
            CHANGES[change](module, x, y)
            after = {key: value.clone() for key, value in module.state_dict().items()}
        result.append(question())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(module.state_dict()), after, rtol=0, atol=0)


def test_a_change_stays() -> None:
    """A hook, a mode, a part that came after the call are there when it has been answered."""
    module, x, y = made()
    result = jacfunc.ggn(module, F.mse_loss)(x, y)
    calls: list[int] = []
    module.first.register_forward_hook(lambda *_: calls.append(1))
    module.frozen, module.scale = nn.Linear(4, 4).double(), 1.0
    module.eval()
    new = module.frozen
    result.diagonal()
    assert not calls
    assert module.frozen is new
    assert (module.training, module.scale) == (False, 1.0)
    module(x)
    assert calls == [1]


def test_masks_are_those_of_the_call() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x = floats(3, 3)
    options: dict[str, Any] = {"per_sample": True, "chunk_size": 1, "randomness": "same"}
    stream_of = jacfunc.stream_jacobian(module, "samples", **options)
    torch.manual_seed(1)
    expected = [block["0.weight"] for _, block in stream_of(x)]
    torch.manual_seed(1)
    result = []
    blocks = stream_of(x)
    for _ in range(3):
        torch.rand(7)
        result.append(next(blocks)[1]["0.weight"])
    torch.testing.assert_close(result, expected)


def test_a_loader_may_write_into_its_batch_and_train() -> None:
    module, x, _ = made()
    expected = jacfunc.ntk(module, None, torch.cat([x, 2 * x]))

    def loader() -> Iterator[Tensor]:
        batch = x.clone()
        yield batch
        batch.data.mul_(2)
        module.first.weight.data.mul_(3)
        yield batch

    torch.testing.assert_close(jacfunc.ntk(module, None, loader()), expected)


@pytest.mark.parametrize("way", ["in place", "by data"])
def test_a_loss_that_closes_over_what_has_changed_is_refused(way: str) -> None:
    module, x, y = made()
    weight = torch.ones(2, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (weight * (outputs - targets).square()).sum()

    result = jacfunc.ggn(module, loss)(x, y)
    vector = {n: torch.ones_like(p) for n, p in module.named_parameters() if p.requires_grad}
    result @ vector
    (weight if way == "in place" else weight.data).mul_(2)
    for question in (result.diagonal, lambda: result @ vector):
        with pytest.raises(ValueError, match="ggn: what the loss closes over must stay as it was"):
            question()


def test_who_answers_at_once_keeps_no_copy() -> None:
    module, x, y = made()
    seen: list[int] = []
    module.frozen.register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))
    # to see whether samples depend would evaluate copies
    norms = jacfunc.gradient_norms(module, F.mse_loss, independent=True)
    norms(x, y)
    seen.clear()
    norms(x, y)
    assert set(seen) == {module.frozen.weight.data_ptr()}
