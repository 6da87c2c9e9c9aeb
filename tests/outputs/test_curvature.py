"""Curvature in the outputs that are asked for, against matrices that are written out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import jacfunc
from tests.outputs.choices import CHOICES, Asked, B, Case, case_of
from tests.truth.doors import flat

NUMBERED = ["numbers", "a slice", "own numbers", "largest", "drawn"]


def by_step(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets)


def coupled_heads(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """One in which the outputs of a sample know of each other."""
    both = outputs["scores"].sum(1) * outputs["energy"]
    total = both.square() + outputs["scores"].exp().sum(1)
    return ((total - targets) ** 2).mean()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * outputs.square().sum() + 0.0 * targets.sum()


LOSSES: dict[str, tuple[str, Any, Any]] = {
    "cross entropy": ("mlp", F.cross_entropy, torch.tensor([0, 4, 2])),
    "squares": ("mlp", F.mse_loss, torch.zeros(B, 5, dtype=torch.float64)),
    "a loss of one's own": ("mlp", squared, torch.zeros(1)),
    "of steps": ("steps", by_step, torch.tensor([[0, 1], [4, 3], [2, 2]])),
}


@cache
def of(name: str, choice: str) -> tuple[Case, Asked, Tensor]:
    """A case, what is asked of it, and those rows ``[B, R, P]``."""
    case = case_of(name)
    asked = CHOICES[choice](case)
    return case, asked, torch.einsum("brm,bmp->brp", asked.cotangents, case.truth.params)


def second_derivatives(case: Case, loss: Any, targets: Any) -> Tensor:
    """``H [B, M, M]`` in all outputs of every sample."""
    output = case.module(*case.inputs).detach()
    hessian = torch.autograd.functional.hessian(lambda out: loss(out, targets), output)
    assert isinstance(hessian, Tensor)
    size = output[0].numel()
    every = hessian.reshape(B, size, B, size)
    return torch.stack([every[b, :, b] for b in range(B)])


def vector(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn_like(param) for name, param in case.module.named_parameters()}


def assert_forms(G: Any, expected: Tensor, case: Case) -> None:
    close = torch.testing.assert_close
    close(G.matrix(), expected, rtol=1e-8, atol=1e-10)
    close(flat(G.diagonal()), expected.diagonal(), rtol=1e-8, atol=1e-10)
    start = 0
    for block in G.blocks().values():
        part = slice(start, start + len(block))
        close(block, expected[part, part], rtol=1e-8, atol=1e-10)
        start += len(block)
    v = vector(case)
    for _ in range(3):  # forward, on a graph that is made, and on the same again
        close(flat(G @ v), expected @ flat(v), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("choice", NUMBERED)
def test_other_outputs_are_constants_to_the_loss(name: str, choice: str) -> None:
    kind, loss, targets = LOSSES[name]
    case, asked, rows = of(kind, choice)
    H = second_derivatives(case, loss, targets)
    own = torch.einsum("brm,bmn,bsn->brs", asked.cotangents, H, asked.cotangents)
    expected = torch.einsum("brp,brs,bsq->pq", rows, own, rows)
    G = jacfunc.ggn(case.module, loss, outputs=asked.outputs)
    assert_forms(G(*case.inputs, targets), expected, case)
    few = jacfunc.ggn(case.module, loss, outputs=asked.outputs, memory="4 MiB")
    torch.testing.assert_close(few(*case.inputs, targets).matrix(), expected, rtol=1e-8, atol=1e-10)


def test_of_a_function_and_of_a_tree_of_outputs() -> None:
    case, asked, rows = of("heads", "numbers")
    targets = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    params = dict(case.module.named_parameters())

    def predict(params: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(case.module, params, (x,))

    every = case.truth.outputs.clone()

    def of_rows(chosen: Tensor) -> Tensor:
        row = every.clone()
        row[:, [0, 2, 3]] = chosen
        return coupled_heads({"energy": row[:, 0], "scores": row[:, 1:]}, targets)

    hessian = torch.autograd.functional.hessian(of_rows, every[:, [0, 2, 3]])
    assert isinstance(hessian, Tensor)
    H = torch.stack([hessian[b, :, b] for b in range(B)])
    expected = torch.einsum("brp,brs,bsq->pq", rows, H, rows)
    v = vector(case)
    for made in (
        jacfunc.ggn(case.module, coupled_heads, outputs=asked.outputs)(*case.inputs, targets),
        jacfunc.ggn(predict, coupled_heads, outputs=asked.outputs)(params, *case.inputs, targets),
    ):
        torch.testing.assert_close(flat(made @ v), expected @ flat(v), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "steps", "heads"])
@pytest.mark.parametrize("choice", ["numbers", "largest", "cotangents", "own cotangents"])
def test_without_a_loss_rows_are_squared(kind: str, choice: str) -> None:
    case, asked, rows = of(kind, choice)
    expected = torch.einsum("brp,brq->pq", rows, rows)
    G = jacfunc.ggn(case.module, None, outputs=asked.outputs)
    assert_forms(G(*case.inputs), expected, case)


@pytest.mark.parametrize("choice", ["numbers", "own numbers", "largest"])
def test_fisher_matrices_have_the_expectation_of_those_rows(choice: str) -> None:
    case, asked, rows = of("mlp", choice)
    p = case.truth.outputs.softmax(1)
    H = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / B
    own = torch.einsum("brm,bmn,bsn->brs", asked.cotangents, H, asked.cotangents)
    expected = torch.einsum("brp,brs,bsq->pq", rows, own, rows)
    for likelihood in ("categorical", F.cross_entropy):
        generator = torch.Generator().manual_seed(0)
        draw = jacfunc.fisher(
            *(case.module, likelihood), draws=20_000, generator=generator, outputs=asked.outputs
        )
        matrix = draw(*case.inputs).matrix()
        assert (matrix - expected).norm() < 0.03 * expected.norm()


def test_fisher_matrices_keep_their_draws() -> None:
    case, asked, _ = of("steps", "largest")
    F = jacfunc.fisher(case.module, "categorical", draws=3, outputs=asked.outputs)(*case.inputs)
    v = vector(case)
    torch.testing.assert_close(flat(F @ v), F.matrix() @ flat(v))
    torch.testing.assert_close(flat(F.diagonal()), F.matrix().diagonal())


def test_what_has_no_second_derivative_is_refused() -> None:
    case, asked, _ = of("mlp", "cotangents")
    targets = torch.tensor([0, 4, 2])
    words = "outputs must be numbers, a slice, TopK or Sampled, in which a loss has a second"
    with pytest.raises(TypeError, match=f"ggn: {words}"):
        jacfunc.ggn(case.module, F.cross_entropy, outputs=asked.outputs)(
            *case.inputs, targets
        ).matrix()
    with pytest.raises(TypeError, match=f"fisher: {words}"):
        jacfunc.fisher(case.module, "categorical", outputs=asked.outputs)(*case.inputs)
    with pytest.raises(ValueError, match="ggn: outputs must name each output of a sample once"):
        jacfunc.ggn(case.module, F.cross_entropy, outputs=[1, -4])(*case.inputs, targets).matrix()
    with pytest.raises(TypeError, match="ggn: loss must be a function"):
        jacfunc.ggn(case.module, None)
