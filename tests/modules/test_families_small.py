"""What families of HuggingFace showed to be hard, each in a module of a few lines."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.kinds.modules import B, ModuleKind, floats, integers, kind
from tests.modules.test_module_kinds import Judged, judge_samples
from tests.truth.oracles import assert_same


class Relative(nn.Module):
    """DeBERTa: a normed table, which all samples share, goes through the layer of the samples."""

    def __init__(self, *, is_checkpointed: bool) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.table, self.norm, self.keys = nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def scores(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(self.keys(x)) @ torch.tanh(self.keys(table)).T

    def forward(self, x: Tensor) -> Tensor:
        layer = partial(self.scores, table=self.norm(self.table.weight))
        scores: Tensor = (
            checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        )
        return scores.mean(1)


class Prompted(nn.Module):
    """ViT: a token that is learned goes before the others, and then through checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 3))
        self.body, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def layer(self, x: Tensor) -> Tensor:
        return self.norm(x + F.gelu(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = checkpoint(self.layer, x, use_reentrant=False)
        return self.head(x[:, 0])


class Padded(nn.Module):
    """BERT: its lookups have no forward mode, and its checkpoints hold norms."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, padding_idx=0)
        self.body, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def layer(self, x: Tensor) -> Tensor:
        return self.norm(x + F.gelu(self.body(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = checkpoint(self.layer, self.words(tokens), use_reentrant=False)
        return self.head(x.mean(1))


class Windowed(nn.Module):
    """Longformer: windows that overlap are read by strides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).contiguous()
        windows = x.as_strided((len(x), 3, 2, 3), (x.stride(0), 3, 3, 1))
        return torch.tanh(windows).prod(2).sum(1)


class Routed(nn.Module):
    """Mixtral: each token goes to the expert that its numbers choose, beside others' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = tokens.new_zeros(len(tokens), 2)
        for number in chosen.unique().tolist():
            (where,) = torch.nonzero(chosen == number, as_tuple=True)
            each = torch.tanh(self.experts[number](tokens[where])) * weights[where].unsqueeze(1)
            out = out.index_add(0, where, each)
        return out.view(*x.shape[:2], 2).sum(1)


class Looking(nn.Module):
    """BERT: a mask that is whole is left away."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        if not mask.bool().all():
            x = x * mask.unsqueeze(-1)
        return self.head(x.mean(1))


def masked() -> tuple[Any, ...]:
    return floats(B, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])


KINDS: dict[str, ModuleKind] = {
    each.name: each
    for each in (
        kind("a shared table", lambda: Relative(is_checkpointed=False), (4, 3)),
        kind("a shared table, checkpointed", lambda: Relative(is_checkpointed=True), (4, 3)),
        kind("a learned token, checkpointed", Prompted, (4, 3)),
        kind("padding, checkpointed", Padded, inputs=lambda: (integers(5, B, 4),)),
        kind("windows", Windowed, (4, 3)),
        kind("experts", Routed, (4, 3)),
        kind("a mask that is looked at", Looking, inputs=masked),
    )
}


@cache
def judged(name: str) -> Judged:
    return judge_samples(KINDS[name], same_draws=False)


def in_matrix(name: str) -> Tensor:
    """The Jacobian ``[B, M, P]``."""
    (blocks,) = judged(name).params
    count = judged(name).output[0].numel()
    return torch.cat([block.reshape(B, count, -1) for block in blocks], 2)


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured"])
@pytest.mark.parametrize("name", KINDS)
def test_by_parameters(name: str, strategy: str) -> None:
    case = KINDS[name]
    jac = jacfunc.module_jacobian(case.make(), per_sample=True, strategy=strategy)
    assert_same(jac(*case.inputs()), judged(name).tree("params"))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "padding, checkpointed"])
def test_by_inputs(name: str) -> None:
    case = KINDS[name]
    got = jacfunc.module_jacobian(case.make(), "inputs", inputs=0, per_sample=True)(*case.inputs())
    assert_same(got, judged(name).inputs[0][0])


@pytest.mark.parametrize("name", KINDS)
def test_streams(name: str) -> None:
    case, want = KINDS[name], judged(name).tree("params")
    of = partial(jacfunc.stream_jacobian, case.make(), per_sample=True)
    assert_same(dict(of("params")(*case.inputs())), want)
    rows = [block for _, block in of("rows")(*case.inputs())]
    assert_same({key: torch.cat([row[key] for row in rows], 1) for key in want}, want)


@pytest.mark.parametrize("name", KINDS)
def test_without_the_jacobian(name: str) -> None:
    case, J = KINDS[name], in_matrix(name)
    module, inputs = case.make(), case.inputs()
    kernel = jacfunc.ntk(module, None, inputs)
    assert_same(kernel, torch.einsum("aip,bjp->abij", J, J))
    targets = torch.zeros(J.shape[:2], dtype=J.dtype)
    G = jacfunc.ggn(module, lambda out, y: 0.5 * (out - y).square().sum())(*inputs, targets)
    matrix = torch.einsum("bip,biq->pq", J, J)
    vector = {key: floats(*param.shape) for key, param in module.named_parameters()}
    flat = torch.cat([each.flatten() for each in vector.values()])
    assert_same(torch.cat([x.flatten() for x in G.diagonal().values()]), matrix.diagonal())
    assert_same(torch.cat([x.flatten() for x in (G @ vector).values()]), matrix @ flat)
