"""Whole Jacobians of batches whose samples are independent, which auto takes sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._log import trail

B = 20


class Counted(torch.autograd.Function):
    """The identity; counts how many cotangents are pulled back through it."""

    rows = 0
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        return CountedBack.apply(cotangent)


class CountedBack(torch.autograd.Function):
    """The identity of cotangents, which counts them."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        Counted.rows += 1
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def vmap(info: object, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        Counted.rows += x.shape[in_dims[0]]
        return x.clone(), in_dims[0]


class Net(nn.Module):
    """Two layers, and something between their outputs and the result."""

    def __init__(self, last: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Counted.apply(self.layers(x)))


def inputs() -> Tensor:
    return torch.randn(B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def looped(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    params, out = dict(module.named_parameters()), module(x)
    rows = [torch.autograd.grad(e, params.values(), retain_graph=True) for e in out.flatten()]
    stacked = map(torch.stack, zip(*rows, strict=True))
    return {n: r.view(*out.shape, *r.shape[1:]) for n, r in zip(params, stacked, strict=True)}


def nbytes(blocks: dict[str, Tensor]) -> int:
    return sum(block.nbytes for block in blocks.values())


def mixed(h: Tensor) -> Tensor:
    return h + 0.1 * h.roll(1, 0)


def two_mixed(h: Tensor) -> Tensor:
    return torch.cat([h[:7], h[7:8] * h[12:13], h[8:]])


def centred(h: Tensor) -> Tensor:
    return h - h.detach().mean(0)


any_last = pytest.mark.parametrize(
    "last",
    [
        lambda h: h,
        torch.exp,
        mixed,
        two_mixed,
        centred,
        lambda h: h.t(),
        lambda h: h.sum(0),
        lambda h: h.flatten(),
        lambda h: h @ h.t(),
        lambda h: h.sort(0)[0],
    ],
    ids=[
        "plain",
        "exp",
        "mixed",
        "two",
        "centred",
        "transposed",
        "summed",
        "flat",
        "gram",
        "sorted",
    ],
)


@any_last
def test_any_module(last: Callable[[Tensor], Tensor]) -> None:
    module, x = Net(last), inputs()
    jacobian = jacfunc.module_jacobian(module)
    for _ in range(3):
        got, want = jacobian(x), looped(module, x)
        assert got.keys() == want.keys()
        for name, block in want.items():
            torch.testing.assert_close(got[name], block, rtol=0, atol=1e-10)


def test_rows_of_all_samples_share_a_cotangent() -> None:
    module, x = Net(), inputs()
    jacobian = jacfunc.module_jacobian(module)
    jacobian(x)
    Counted.rows = 0
    jacobian(x)
    assert Counted.rows < B  # two rows of a sample, and some to compare batches; 40 as a whole
    jacfunc.module_jacobian(module, strategy="reverse")(x)
    assert Counted.rows > 2 * B


@any_last
def test_any_module_within_a_budget(last: Callable[[Tensor], Tensor]) -> None:
    """Samples go a few at once: what comes of a chunk says little of the batch as a whole."""
    module, x = Net(last), inputs()
    want = looped(module, x)
    got = jacfunc.module_jacobian(module, memory=3000 + 2 * nbytes(want))(x)
    for name, block in want.items():
        torch.testing.assert_close(got[name], block, rtol=0, atol=1e-10)


def test_samples_that_go_a_few_at_once_are_not_taken_as_a_whole_after_all() -> None:
    module, x = Net(), inputs()
    with trail() as steps:
        jacfunc.module_jacobian(module, memory=2 * nbytes(looped(module, x)))(x)
    assert any("samples at once" in step for step in steps)
    assert not any("as a whole" in step for step in steps)


def test_samples_that_depend_on_each_other_from_a_later_call_on() -> None:
    is_on = [False]
    module, x = Net(lambda h: mixed(h) if is_on[0] else h), inputs()
    jacobian = jacfunc.module_jacobian(module)
    for is_on[0] in (False, False, False, True, True, False):
        for name, block in looped(module, x).items():
            torch.testing.assert_close(jacobian(x)[name], block, rtol=0, atol=1e-10)


class Counting(nn.Module):
    """Counts how often it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return self.layer(x).tanh()


CALLS: list[int] = []


@pytest.mark.parametrize("wrt", ["params", "inputs"])
def test_layouts_are_learned_beside_one_sample_and_once(wrt: Literal["params", "inputs"]) -> None:
    """What is done to lend the module, such as copies of constants, is no part of the function."""
    door = jacfunc.module_jacobian(
        Counting(), wrt, per_sample=True, strategy="structured", independent=True
    )
    CALLS.clear()
    door(torch.ones(4, 3))
    # the first of one sample: where do outputs hold it? the next: do numbers choose unseen?
    assert sorted(CALLS) == [1, 1, 1, 4]
    CALLS.clear()
    door(torch.zeros(4, 3))
    assert CALLS == [4]


def test_one_sample_is_evaluated_plainly_and_once() -> None:
    door = jacfunc.module_jacobian(Counting(), per_sample=True, strategy="reverse")
    door(torch.ones(1, 3))
    CALLS.clear()
    result = door(torch.ones(1, 3))
    assert CALLS == [1]
    assert result["layer.weight"].shape == (1, 2, 2, 3)
