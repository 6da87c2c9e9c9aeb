"""Recurrent layers with the steps in front: samples in dimension 1 of inputs, outputs and states.

Beside them layers over the batch that a module has and does not call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import jacfunc

FEATURES, STATES = 3, 2


class Tagging(nn.Module):
    """A network that returns steps and states as its layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(FEATURES, STATES), nn.Linear(STATES, 2)

    def forward(self, x: Tensor) -> Any:
        steps, last = self.layer(x)
        return {"tags": self.head(steps), "last": last}


class Classifying(Tagging):
    """A network that returns the batch in front."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


def steps(num_steps: int, size: int, width: int = FEATURES) -> Tensor:
    generator = torch.Generator().manual_seed(num_steps)
    return torch.randn(num_steps, size, width, generator=generator, dtype=torch.float64)


def with_states(layers: int, lstm: bool = False) -> Callable[[int, int], Any]:
    def inputs(num_steps: int, size: int) -> Any:
        state = steps(layers, size, STATES)
        return steps(num_steps, size), ((state, state.cos()) if lstm else state)

    return inputs


def alone(num_steps: int, size: int) -> Any:
    return (steps(num_steps, size),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any]]] = {
    "GRU": (lambda: nn.GRU(FEATURES, STATES), alone),
    "RNN of two layers": (lambda: nn.RNN(FEATURES, STATES, 2), alone),
    "GRU at states": (lambda: nn.GRU(FEATURES, STATES, 1, bidirectional=True), with_states(2)),
    "LSTM at states": (lambda: nn.LSTM(FEATURES, STATES), with_states(1, lstm=True)),
    "tagging": (Tagging, alone),
    "classifying": (Classifying, alone),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        lambda num_steps, size: (steps(num_steps, size, 4),) * 3,
    ),
}
SIZES = {"more steps": (4, 3), "as many": (3, 3), "one step": (1, 3), "one sample": (3, 1)}


class Truth:
    """Outputs and Jacobians of each sample alone, a row after the other."""

    def __init__(self, module: nn.Module, inputs: Any, size: int) -> None:
        params, outputs, every = list(module.parameters()), [], []
        for number in range(size):
            one = tree_map(lambda x, n=number: x[:, n : n + 1].clone(), inputs)
            out = torch.cat([leaf.flatten() for leaf in tree_leaves(module(*one))])
            rows = [
                torch.autograd.grad(x, params, retain_graph=True, materialize_grads=True)
                for x in out
            ]
            outputs.append(out.detach())
            every.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        self.outputs, self.matrix = torch.stack(outputs), torch.stack(every)


def matrix(jacobian: Any, module: nn.Module, size: int) -> Tensor:
    """``[B, M, P]`` of a tree of blocks."""
    params, blocks = list(module.parameters()), tree_leaves(jacobian)
    rows = [blocks[n : n + len(params)] for n in range(0, len(blocks), len(params))]
    flat = [
        torch.cat([b.reshape(size, -1, p.numel()) for b, p in zip(row, params, strict=True)], 2)
        for row in rows
    ]
    return torch.cat(flat, 1)


def half(outputs: Any, _: Any) -> Tensor:
    return sum((leaf.square().sum() / 2 for leaf in tree_leaves(outputs)), torch.zeros(()))


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in named.values()])


Problem = tuple[nn.Module, Any, int, Truth]


@pytest.fixture(params=[(name, size) for name in CASES for size in SIZES], ids="-".join)
def problem(request: pytest.FixtureRequest) -> Problem:
    name, kind = request.param
    make, inputs_of = CASES[name]
    torch.manual_seed(0)
    module, (num_steps, size) = make().double(), SIZES[kind]
    inputs = inputs_of(num_steps, size)
    return module, inputs, size, Truth(module, inputs, size)


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured"])
def test_jacobians(problem: Problem, strategy: str) -> None:
    module, inputs, size, true = problem
    jacobian = jacfunc.module_jacobian(module, per_sample=True, in_dims=1, strategy=strategy)
    for _ in range(2):
        torch.testing.assert_close(matrix(jacobian(*inputs), module, size), true.matrix)


def test_outputs(problem: Problem) -> None:
    module, inputs, size, true = problem
    jacobian = jacfunc.module_jacobian(module, per_sample=True, in_dims=1, full_output=True)
    leaves = tree_leaves(jacobian(*inputs).outputs)
    torch.testing.assert_close(torch.cat([x.reshape(size, -1) for x in leaves], 1), true.outputs)


def test_kernels_and_projections(problem: Problem) -> None:
    module, inputs, _, true = problem
    kernels = tree_leaves(jacfunc.ntk(module, None, inputs, in_dims=1))
    traces = torch.stack([_trace(kernel) for kernel in kernels]).sum(0)
    torch.testing.assert_close(traces, torch.einsum("amp,bmp->ab", true.matrix, true.matrix))
    projected = tree_leaves(jacfunc.random_projection(module, 8, in_dims=1)(*inputs))
    shapes = sum(x[0].numel() // 8 for x in projected)
    assert shapes == true.matrix.shape[1]


def _trace(kernel: Tensor) -> Tensor:
    width = int(kernel[0, 0].numel() ** 0.5)
    return kernel.reshape(*kernel.shape[:2], width, width).diagonal(0, 2, 3).sum(-1)


def test_curvature(problem: Problem) -> None:
    module, inputs, _, true = problem
    seen = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        seen.append(tree_map(lambda x: x.shape, outputs))
        return half(outputs, targets)

    J, targets = true.matrix, torch.zeros(())
    G = jacfunc.ggn(module, loss, in_dims=1)(*inputs, targets)
    torch.testing.assert_close(flat(G.diagonal()), J.square().sum((0, 1)))
    torch.testing.assert_close(G.matrix(), torch.einsum("bmp,bmq->pq", J, J))
    ones = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    torch.testing.assert_close(flat(G @ ones), torch.einsum("bmp,bmq->p", J, J))
    norms = jacfunc.gradient_norms(module, loss, in_dims=1)(*inputs, targets)
    gradients = torch.einsum("bmp,bm->bp", J, true.outputs)
    torch.testing.assert_close(norms, gradients.norm(dim=1))
    assert (
        jacfunc.fisher(module, "gaussian", in_dims=1)(*inputs).matrix().shape == (J.shape[2],) * 2
    )
    # the loss gets what the module returns
    as_returned = tree_map(lambda x: x.shape, module(*inputs))
    assert all(shapes == as_returned for shapes in seen)


@pytest.mark.parametrize("by", ["params", "samples"])
def test_streams(problem: Problem, by: Any) -> None:
    module, inputs, _, true = problem
    blocks = [
        b for _, b in jacfunc.stream_jacobian(module, by, per_sample=True, in_dims=1)(*inputs)
    ]
    squares = sum(x.square().sum() for x in tree_leaves(blocks))
    torch.testing.assert_close(squares, true.matrix.square().sum())


def test_squared_errors_of_steps() -> None:
    module, x = Tagging().double(), steps(3, 3)
    torch.manual_seed(1)
    targets = torch.randn(3, 3, 2).double()

    def tags(outputs: Any, y: Tensor) -> Tensor:
        return F.mse_loss(outputs["tags"], y)

    layer = nn.GRU(FEATURES, STATES).double()
    params = list(module.parameters())
    out = module(x)["tags"]
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in out.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    G = jacfunc.ggn(module, tags, in_dims=1)(x, targets)
    torch.testing.assert_close(flat(G.diagonal()), 2 * J.square().sum(0) / out.numel())
    steps_alone = jacfunc.module_jacobian(layer, per_sample=True, in_dims=1, flat=True)
    assert steps_alone(x).shape == (3, 4 * STATES, sum(p.numel() for p in layer.parameters()))


# --- layers that are not called ---


class Spare(nn.Module):
    """A layer over the batch that is called at will."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor, normed: bool = False) -> Tensor:
        out = torch.tanh(self.layer(x))
        return self.norm(out) if normed else out


X, Y = torch.arange(12.0).sin().view(4, 3), torch.tensor([0, 1, 1, 0])
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "module_jacobian": lambda m: jacfunc.module_jacobian(m, per_sample=True, select="layer.*")(X),
    "stream_jacobian": lambda m: dict(
        jacfunc.stream_jacobian(m, per_sample=True, select="layer.*")(X)
    ),
    "ntk": lambda m: jacfunc.ntk(m, None, X),
    "ggn": lambda m: jacfunc.ggn(m, F.cross_entropy)(X, Y).matrix()[:8, :8],
    "gradient_norms": lambda m: jacfunc.gradient_norms(m, F.cross_entropy)(X, Y),
}


@pytest.mark.parametrize("door", CALLS)
def test_layers_that_are_not_called_are_no_reason_to_refuse(door: str) -> None:
    torch.manual_seed(0)
    module = Spare()
    plain = nn.Sequential()
    plain.layer, plain.act = module.layer, nn.Tanh()
    before = dict(module.norm.named_buffers()), list(module.norm._forward_pre_hooks)
    for _ in range(2):
        torch.testing.assert_close(CALLS[door](module), CALLS[door](plain))
    assert (dict(module.norm.named_buffers()), list(module.norm._forward_pre_hooks)) == before
    assert int(module.norm.num_batches_tracked) == 0
    with pytest.raises(ValueError, match="batch normalization over the batch in norm"):
        jacfunc.module_jacobian(module, per_sample=True)(X, normed=True)


# --- samples in front of inputs, and elsewhere in outputs ---


class States(nn.Module):
    """The last states of each layer, which are in front of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(FEATURES, STATES, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1]


def at(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, FEATURES, generator=generator, dtype=torch.float64)


def states() -> nn.Module:
    torch.manual_seed(0)
    return States().double()


def looped(module: nn.Module, x: Tensor, by: list[Tensor]) -> list[Tensor]:
    """``[*out, *in]``, a backward pass a row."""
    out = module(x)
    rows = [torch.autograd.grad(y, by, retain_graph=True) for y in out.flatten()]
    every = (torch.stack(block) for block in zip(*rows, strict=True))
    return [block.unflatten(0, out.shape) for block in every]


def test_a_batch_as_a_whole_is_differentiated_as_it_is_returned() -> None:
    module = states()
    jacobian = jacfunc.module_jacobian(module)
    for size in (2, 16, 16):
        got = jacobian(at(size, size))
        want = looped(module, at(size, size), list(module.parameters()))
        torch.testing.assert_close(list(got.values()), want)


def test_states_by_inputs_at_every_call() -> None:
    module = states()
    jacobian = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for number, size in enumerate([3, 3, 3, 3, 1, 5, 2]):
        x = at(number, size)
        ones = [x[b : b + 1].clone().requires_grad_() for b in range(size)]
        want = torch.stack([looped(module, one, [one])[0][:, 0, :, 0] for one in ones])
        torch.testing.assert_close(jacobian(x), want)


def test_sizes_of_batches_are_no_reason_to_look_again() -> None:
    module, seen = states(), list[int]()
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    jacobian = jacfunc.module_jacobian(module, per_sample=True, independent=True, strategy="looped")
    for size in (4, 5, 4):
        jacobian(at(size, size))
    assert seen.count(2) == 1  # where the samples are is seen once


# --- masks ---


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.last(F.dropout(self.first(x), 0.5)), 0.3)


@pytest.mark.parametrize("flat", [True, False])
def test_one_seed_draws_one_mask_for_auto_and_structured(flat: bool) -> None:
    module, every = Masked(), []
    for strategy in ("auto", "auto", "auto", "structured", "reverse"):
        torch.manual_seed(3)
        every.append(
            jacfunc.module_jacobian(
                module, per_sample=True, randomness="different", strategy=strategy, flat=flat
            )(X)
        )
    for other in every[1:]:
        torch.testing.assert_close(other, every[0])


@pytest.mark.parametrize("options", [{}, {"memory": 40_000}, {"outputs": [0]}], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "reverse", "forward", "structured"])
def test_samples_of_all_chunks_draw_the_same(strategy: str, options: dict[str, Any]) -> None:
    """Samples that are alike then have one Jacobian, at the first call, too."""
    module, x = Masked(), X[:1].expand(len(X), -1)
    jacobian = jacfunc.module_jacobian(
        module, per_sample=True, randomness="same", strategy=strategy, flat=True, **options
    )
    for seed in range(3):
        torch.manual_seed(seed)
        rows = jacobian(x)
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
