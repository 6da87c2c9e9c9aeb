"""What rows that are asked for cost: those rows, whatever else the module returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import jacfunc
from jacfunc._memory.counting import PeakBytes

ROWS = [0, 9, 17, 40, 63]


class Picking(nn.Module):
    """A module that returns some outputs of another one, as a user writes it by hand."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[:, ROWS]


Door = Callable[..., Any]
X = torch.linspace(-1, 1, 32).view(4, 8)


def jacobian(strategy: str) -> Door:
    return lambda module, **more: jacfunc.module_jacobian(
        module, per_sample=True, strategy=strategy, independent=True, **more
    )(X)


def streamed(by: Any) -> Door:
    return lambda module, **more: list(
        jacfunc.stream_jacobian(module, by, per_sample=True, independent=True, **more)(X)
    )


DOORS: dict[str, Door] = {
    **{strategy: jacobian(strategy) for strategy in ("auto", "reverse", "looped", "structured")},
    **{f"stream by {by}": streamed(by) for by in ("params", "rows", "samples")},
    "ntk": lambda module, **more: jacfunc.ntk(module, None, X, independent=True, **more),
    "squares": lambda module, **more: jacfunc.ggn(
        module, (None if more else half_square), independent=True, **more
    )(*((X,) if more else (X, X))).diagonal(),
}


def half_square(outputs: Tensor, _: Tensor) -> Tensor:
    return 0.5 * outputs.square().sum()


class FlopCounter(TorchDispatchMode):
    """Counts FLOPs; torch's own counter sets hooks on what layers return, which are honoured."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Callable[[], Any]) -> int:
    """Of a call of a kind that is known."""
    for _ in range(2):
        call()
    with FlopCounter() as counter:
        call()
    return counter.total


@pytest.mark.parametrize("door", DOORS)
def test_five_rows_cost_five_rows(door: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64))
    asked = flops(lambda: DOORS[door](model, outputs=ROWS))
    by_hand = flops(lambda: DOORS[door](Picking(model)))
    every = flops(lambda: DOORS[door](model))
    assert asked <= by_hand
    assert every > 4 * asked


class LanguageModel(nn.Module):
    """The outputs of a small one: scores of all words at every step."""

    def __init__(self, vocabulary: int, steps: int) -> None:
        super().__init__()
        self.vocabulary, self.steps = vocabulary, steps
        self.words = nn.Embedding(vocabulary, 6)
        self.mix = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=True)
        self.eval()

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.mix(self.words(words)), self.words.weight)

    def sample(self) -> Tensor:
        return torch.randint(self.vocabulary, (1, self.steps))


def loss_of_steps(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mT, targets)


WORDS = [5, 10, 20, 40, 80]
LARGE, SMALL = (50_257, 128), (1000, 16)
OF_WORDS: dict[str, tuple[tuple[int, int], Door]] = {
    "jacobian": (LARGE, lambda model, words, **more: of_samples(model, **more)(words)),
    "stream": (LARGE, lambda model, words, **more: dict(blocks_of(model, **more)(words))),
    "ntk": (LARGE, lambda model, words, **more: jacfunc.ntk(model, None, words, **more)),
    "fisher": (LARGE, lambda model, words, **more: drawn(model, **more)(words).diagonal()),
    "ggn": (SMALL, lambda model, words, **more: of_loss(model, **more)(words, words).diagonal()),
}
of_samples = partial(jacfunc.module_jacobian, per_sample=True)
blocks_of = partial(jacfunc.stream_jacobian, per_sample=True)
drawn = partial(jacfunc.fisher, likelihood="categorical")
of_loss = partial(jacfunc.ggn, loss=loss_of_steps)


@pytest.mark.parametrize("name", OF_WORDS)
def test_rows_of_a_language_model(name: str) -> None:
    (vocabulary, steps), door = OF_WORDS[name]
    model = LanguageModel(vocabulary, steps)
    words = model.sample()
    rows = [(steps - 1) * vocabulary + word for word in WORDS]
    with PeakBytes() as counter:
        answer = door(model, words, outputs=rows, independent=True)
    logits, params = model(words), list(model.parameters())
    # all rows of the Jacobian would take as many times the logits as there are parameters
    assert counter.peak < 24 * logits.nbytes
    if name == "fisher":  # of which only the expectation is known
        return
    pulled = [torch.autograd.grad(x, params, retain_graph=True) for x in logits[0, -1, WORDS]]
    names = [name for name, _ in model.named_parameters()]
    blocks = dict(zip(names, map(torch.stack, zip(*pulled, strict=True)), strict=True))
    if name == "ntk":
        J = torch.cat([block.flatten(1) for block in blocks.values()], 1)
        torch.testing.assert_close(answer[0, 0], J @ J.T, rtol=1e-4, atol=1e-4)
        return
    p = logits[0, -1].softmax(0)[WORDS].detach()
    H = (p.diag() - torch.outer(p, p)) / steps
    for param, block in blocks.items():
        squares = torch.einsum("r...,rs,s...->...", block, H, block)
        expected = squares if name == "ggn" else block.unsqueeze(0)
        small = 1e-10 if name == "ggn" else 1e-6
        torch.testing.assert_close(answer[param], expected, rtol=1e-3, atol=small)
