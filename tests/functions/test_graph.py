"""``graph_jacobian``: Jacobians of tensors whose forward pass the user has made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import jacfunc
from jacfunc import graph_jacobian
from jacfunc._memory import PeakBytes

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "reverse": {"strategy": "reverse"},
    "looped": {"strategy": "looped"},
    "chunks": {"chunk_size": 5},
    "object": {"strategy": jacfunc.Reverse(7)},
    "loop": {"strategy": jacfunc.Looped()},
    "memory": {"memory": "1 MB"},
    "create": {"create_graph": True},
    "retain": {"retain_graph": True},
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def by_loops(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Blocks by ``torch.autograd.grad``, one row at a time; the graph is kept."""
    blocks = []
    for out in outputs:
        rows = [
            torch.autograd.grad(number, inputs, retain_graph=True, materialize_grads=True)
            for number in out.flatten()
        ]
        columns = zip(*rows, strict=True)
        blocks.append(
            [
                torch.stack([row.to_dense() for row in column]).view(out.shape + x.shape)
                for column, x in zip(columns, inputs, strict=True)
            ]
        )
    return blocks


def agrees(outputs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any) -> None:
    """The oracle comes first: its loop keeps the graph."""
    expected = by_loops(outputs, inputs)
    torch.testing.assert_close(graph_jacobian(list(outputs), list(inputs), **options), expected)


class Sweeps:
    """Counts the sweeps that pass by a tensor, and the rows of each."""

    def __init__(self, tensor: Tensor) -> None:
        self.count = 0
        tensor.register_hook(self._add)

    def _add(self, _: Tensor) -> None:
        self.count += 1


def network(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for m, n in pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def points(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- answers ---


@EVERY_WAY
def test_parameters_and_inputs_by_every_way(way: str) -> None:
    model, x = network(3, 8, 4), points(6, 3)
    params = dict(model.named_parameters())
    (expected,) = by_loops([model(x)], [*params.values(), x])
    own, of_x = graph_jacobian(model(x), (params, x), **WAYS[way])
    assert list(own) == list(params)
    torch.testing.assert_close([*own.values(), of_x], expected)


@EVERY_WAY
def test_flat(way: str) -> None:
    model, x = network(3, 8, 4), points(6, 3)
    (expected,) = by_loops([model(x)], [*model.parameters(), x])
    flat = graph_jacobian(model(x), [*model.parameters(), x], flat=True, **WAYS[way])
    torch.testing.assert_close(flat, torch.cat([block.reshape(24, -1) for block in expected], 1))


@EVERY_WAY
@pytest.mark.parametrize("flat", [False, True])
def test_every_sample(way: str, flat: bool) -> None:
    model, x = network(3, 8, 4), points(6, 3)
    ((expected,),) = by_loops([model(x)], [x])
    own = expected.diagonal(0, 0, 2).movedim(-1, 0)
    result = graph_jacobian(model(x), x, per_sample=True, flat=flat, **WAYS[way])
    assert result.shape == (6, 4, 3)
    torch.testing.assert_close(result, own)


def test_closed_form() -> None:
    W, x = points(4, 3), points(3)
    y = torch.tanh(W @ x)
    J = graph_jacobian(y, x)
    torch.testing.assert_close(J, (1 - y**2).diag() @ W)
    assert not J.requires_grad


def test_trees_of_losses() -> None:
    model, x = network(3, 5, 2), points(6, 3)
    error = model(x) - 1
    losses = {"squared": error.square().mean(), "absolute": error.abs().mean((0,))}
    params = list(model.parameters())
    expected = by_loops(list(losses.values()), params)
    J = graph_jacobian(losses, params)
    assert [block.shape for block in J["absolute"]] == [(2, *param.shape) for param in params]
    torch.testing.assert_close([J["squared"], J["absolute"]], expected)


def test_leaves_that_are_not_floating_have_none() -> None:
    x = points(3)
    J = graph_jacobian([x.sin(), x.argmax()], [x, torch.arange(2)])
    assert J[1] is None
    assert J[0][1] is None
    torch.testing.assert_close(J[0][0], x.cos().diag())


def test_features_on_the_way() -> None:
    trunk, head, x = network(3, 5), network(5, 4), points(6, 3)
    features = trunk(x)
    agrees([head(features)], [features])
    features = trunk(x)
    agrees([head(features)], [features, x])
    features = trunk(x)
    result = graph_jacobian(head(features), features, per_sample=True, retain_graph=True)
    ((whole,),) = by_loops([head(features)], [features])
    torch.testing.assert_close(result, whole.diagonal(0, 0, 2).movedim(-1, 0))


def test_nothing_is_evaluated_again_and_no_grad_is_written() -> None:
    model, x = network(3, 5, 4), points(6, 3)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.grad = before[name].clone()
    graph_jacobian(model(x), (list(model.parameters()), x))
    assert len(calls) == 1
    assert x.grad is None
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())  # type: ignore[arg-type]


def test_one_tensor_twice_and_views() -> None:
    x = points(4, 3)
    agrees([x.sin()], [x, x])
    copy = x * 1
    view = copy[0]
    agrees([view.sin() + copy[1]], [copy, view, x])
    copy = x * 1
    view = copy[0]
    copy.mul_(2)
    agrees([copy.sum(0) + view], [copy, view, x])
    agrees([x, x * 1], [x])


def test_both_results_of_one_node() -> None:
    first, second = points(4, 3).split(2)
    agrees([first.sin() * second], [first, second])
    first, second = points(4, 3).split(2)
    with pytest.raises(ValueError, match=r"got inputs\[1\], to which no path leads"):
        graph_jacobian(first.sin(), [first, second])


def test_what_no_path_leads_to_is_zero() -> None:
    x, unused = points(3), points(2)
    J = graph_jacobian([x.sin(), unused.sum()], [x, unused])
    assert not J[0][1].any()
    assert J[0][1].shape == (3, 2)
    assert not J[1][0].any()


def test_an_infinite_derivative_spoils_no_other_output() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    h = x * 1
    J = graph_jacobian([h.sqrt(), h * 3], x)
    torch.testing.assert_close(J[1], 3 * torch.eye(2, dtype=torch.float64))


def test_many_kinds_of_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
    tokens = points(3, 5, 4)
    agrees([layer(tokens)[:, 0]], [tokens, *layer.parameters()])  # dropout has one mask
    lstm = nn.LSTM(4, 3, batch_first=True, dtype=torch.float64)
    agrees([lstm(tokens)[0][:, -1]], [tokens, *lstm.parameters()])
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    agrees([table(torch.tensor([1, 2, 1])).sin().sum(1)], [table.weight])
    x, y = points(5, 3), points(4, 3)
    agrees([torch.cdist(x.sin(), y)], [x, y])  # torch's batching rule gives wrong rows


@pytest.mark.parametrize("model", ["lstm", "conv", "encoder"])
def test_samples_of_many_kinds_of_layers(model: str) -> None:
    torch.manual_seed(0)
    makes: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "lstm": lambda: (x := points(5, 4, 3), nn.LSTM(3, 2, batch_first=True).double()(x)[0]),
        "conv": lambda: (x := points(5, 2, 4, 4), nn.Conv2d(2, 3, 3).double()(x).tanh()),
        "encoder": lambda: (
            x := points(5, 3, 4),
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()(x),
        ),
    }
    x, y = makes[model]()
    ((whole,),) = by_loops([y], [x])
    own = torch.stack([whole[b].select(y.dim() - 1, b) for b in range(5)])
    torch.testing.assert_close(graph_jacobian(y, x, per_sample=True), own)


def test_several_leaves_of_samples() -> None:
    x, z = points(5, 3), points(5, 2)
    outputs = {"a": (x.sin() * z[:, :1]).sum(1), "b": z.square()}
    J = graph_jacobian(outputs, [x, z], per_sample=True, retain_graph=True)
    assert J["a"][0].shape == (5, 3)
    assert J["b"][1].shape == (5, 2, 2)
    assert J["b"][1].is_contiguous()
    torch.testing.assert_close(J["b"][1], torch.diag_embed(2 * z.detach()))
    assert not J["b"][0].any()
    flat = graph_jacobian(outputs, [x, z], per_sample=True, flat=True)
    torch.testing.assert_close(flat[:, 0, :3], J["a"][0])
    torch.testing.assert_close(flat[:, 1:, 3:], J["b"][1])


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size: int) -> None:
    x = points(size, 3)
    J = graph_jacobian(x.sin(), x, per_sample=True)
    torch.testing.assert_close(J, torch.diag_embed(x.detach().cos()))
    assert graph_jacobian(x.sin(), x, per_sample=True, flat=True).shape == (size, 3, 3)
    assert graph_jacobian(x.sin(), x).shape == (size, 3, size, 3)


# --- forms of result ---


def test_dtype_and_out() -> None:
    x = points(5, 3)
    for options in ({}, {"per_sample": True}, {"flat": True}, {"per_sample": True, "flat": True}):
        y = x.sin()
        first = graph_jacobian(y, x, retain_graph=True, **options)
        half = graph_jacobian(y, x, retain_graph=True, dtype=torch.float32, **options)
        torch.testing.assert_close(half, first.float())
        buffer = torch.full_like(first, torch.nan)
        assert graph_jacobian(y, x, out=buffer, **options) is buffer
        torch.testing.assert_close(buffer, first)


def test_out_of_a_differentiable_result_is_refused() -> None:
    x = points(3)
    with pytest.raises(ValueError, match=r"^graph_jacobian: out must be for a result without"):
        graph_jacobian(x.sin(), x, create_graph=True, out=torch.empty(3, 3).double())


# --- graphs: kept, freed, differentiated again ---


@EVERY_WAY
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_graph_is_freed_unless_it_is_wanted(way: str, per_sample: bool) -> None:
    x = points(6, 3)
    y = x.exp()
    graph_jacobian(y, x, per_sample=per_sample, **WAYS[way])
    if way in ("create", "retain"):
        graph_jacobian(y, x, per_sample=per_sample)
    with pytest.raises(ValueError, match=r"^graph_jacobian: the graph of outputs must be there"):
        graph_jacobian(y, x, per_sample=per_sample)


def test_a_graph_of_several_losses_is_freed() -> None:
    x = points(3)
    hidden = x.exp()
    losses = [hidden.sum(), hidden.square().sum(), hidden.sin().sum(), hidden.cos().sum()]
    graph_jacobian(losses, x)
    with pytest.raises(RuntimeError, match="a second time"):
        losses[1].backward()


def test_sweeps_are_counted() -> None:
    x = points(6, 3)
    for options, count in (
        ({"retain_graph": True}, 1),
        ({}, 2),  # one more frees the graph
        ({"strategy": "looped"}, 18),
        ({"chunk_size": 5, "retain_graph": True}, 4),
        ({"chunk_size": 1}, 18),  # the last row frees it
        ({"per_sample": True, "retain_graph": True, "independent": True}, 3),  # rows one by one
        ({"per_sample": True, "retain_graph": True}, 3 + 1),  # six groups, under vmap
    ):
        y = x.sin()
        sweeps = Sweeps(y)
        graph_jacobian(y, x, **options)
        assert sweeps.count == count, options


def test_few_rows_are_swept_one_by_one() -> None:
    x = points(3)
    losses = torch.stack([x.sin().sum(), x.cos().sum()])
    sweeps = Sweeps(losses)
    graph_jacobian(losses, x)
    assert sweeps.count == 2


def test_second_derivatives() -> None:
    x = points(4, 3)
    W = points(3, 2)
    J = graph_jacobian(torch.tanh(x @ W), x, create_graph=True)
    own = graph_jacobian(torch.tanh(x @ W), x, create_graph=True, per_sample=True)
    y = torch.tanh(x @ W)
    by_hand = (1 - y**2).unsqueeze(2) * W.t()  # [B, out, in], a differentiable closed form
    torch.testing.assert_close(own, by_hand)
    expected = torch.autograd.grad(by_hand.square().sum(), [x, W])
    for result in (J, own):
        torch.testing.assert_close(torch.autograd.grad(result.square().sum(), [x, W]), expected)


def test_a_hessian_from_two_graphs() -> None:
    x = points(3)
    gradient = graph_jacobian((x**3).sum(), x, create_graph=True)
    torch.testing.assert_close(graph_jacobian(gradient, x), (6 * x.detach()).diag())


def test_second_derivatives_of_layer_norm() -> None:
    """Under vmap torch's backward pass of it takes saved statistics for constants."""
    x = points(2, 4)

    def penalty(y: Tensor, jac: Tensor) -> Tensor:
        return torch.autograd.grad(jac.square().sum(), x)[0]

    norm = nn.functional.layer_norm
    y = norm(x, (4,)).sin()
    rows = [torch.autograd.grad(v, x, create_graph=True)[0] for v in y.flatten()]
    expected = penalty(y, torch.stack(rows))
    y = norm(x, (4,)).sin()
    torch.testing.assert_close(penalty(y, graph_jacobian(y, x, create_graph=True)), expected)


def test_modes_of_the_caller() -> None:
    x = points(6, 3)
    y = x.sin()
    with torch.no_grad():
        torch.testing.assert_close(graph_jacobian(y, x, per_sample=True)[0], x[0].cos().diag())
    y = x.sin()
    with torch.inference_mode():
        own = graph_jacobian(y, x, per_sample=True, retain_graph=True)
        whole = graph_jacobian(y, x)
    assert torch.equal(own[1], whole[1, :, 1])
    z = x.sin()
    with torch.no_grad():
        assert not graph_jacobian(z, x, create_graph=True).requires_grad


# --- hooks, checkpoints, what was written ---


def test_hooks_are_honoured() -> None:
    def doubled(x: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = x * 1
        hidden.register_hook(hook)
        return hidden.sin()

    x = points(5, 3)
    agrees([doubled(x, lambda g: 2 * g)], [x])
    agrees([doubled(x, lambda g: 2 * g if g.sum().item() > 0 else g)], [x])  # not under vmap


def test_a_hook_that_raises() -> None:
    def hook(_: Tensor) -> Tensor:
        raise LookupError("mine")

    x = points(5)
    y = x.sin()
    y.register_hook(hook)
    with pytest.raises(NotImplementedError, match=r"^graph_jacobian: the graph must be .*mine"):
        graph_jacobian(y, x)


def test_retained_gradients() -> None:
    x = points(5)
    hidden = x * 1
    hidden.retain_grad()
    y = hidden.sin()
    y.retain_grad()
    torch.testing.assert_close(graph_jacobian(y, hidden), x.detach().cos().diag())
    assert hidden.grad is None
    assert y.grad is None
    hidden = x * 1
    hidden.retain_grad()
    with pytest.raises(ValueError, match=r"^graph_jacobian: tensors .* must not retain"):
        graph_jacobian(hidden.sin(), x)
    hidden = x * 1
    hidden.retain_grad()
    J = graph_jacobian(hidden.sin(), x, strategy="looped")
    torch.testing.assert_close(J, x.detach().cos().diag())


def test_checkpoints() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4).double(), points(5, 3)

    def block(z: Tensor) -> Tensor:
        return nn.functional.dropout(layer(z).tanh()).exp()

    agrees([checkpoint(block, x, use_reentrant=False)], [x, layer.weight])  # type: ignore[list-item]
    reentrant: Any = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(NotImplementedError, match=r"^graph_jacobian: .*must not be reentrant"):
        graph_jacobian(reentrant, x)
    agrees([reentrant.sin()], [reentrant])  # it lies behind the input


def test_what_was_written_into_since() -> None:
    x = points(5)
    y = x.exp()
    y.mul_(2)
    message = r"^graph_jacobian: tensors that the graph keeps must be as they were.*version 1"
    with pytest.raises(ValueError, match=message):
        graph_jacobian(y, x)
    hidden = x * 1
    total = hidden.sum()
    hidden.mul_(2)
    with pytest.raises(ValueError, match=r"got inputs, to which no path leads.*written into"):
        graph_jacobian(total, hidden)
    with torch.no_grad():
        y = 3 * x
        x.add_(1)  # as an optimizer does; the graph does not keep x
    total = (3 * x).sum()
    with torch.no_grad():
        x.add_(1)
    torch.testing.assert_close(graph_jacobian(total, x), torch.full_like(x, 3).detach())


# --- samples that depend on each other ---


@pytest.mark.parametrize("first", range(6))
def test_any_pair_of_samples_is_seen(first: int) -> None:
    for second in range(6):
        if first != second:
            x = points(6, 3)
            rows = list(x.sin())
            rows[first] = rows[first] + 1e-3 * x[second].square()
            with pytest.raises(ValueError, match=r"samples that do not depend on each other, got"):
                graph_jacobian(torch.stack(rows), x, per_sample=True)


def test_batch_normalization_couples() -> None:
    norm, x = nn.BatchNorm1d(3).double(), points(6, 3)
    with pytest.raises(ValueError, match=r"^graph_jacobian: per_sample needs samples that do not"):
        graph_jacobian(norm(x), x, per_sample=True)
    norm.eval()
    assert graph_jacobian(norm(x), x, per_sample=True).shape == (6, 3, 3)


def test_parameters_have_no_samples() -> None:
    layer, x = nn.Linear(3, 6).double(), points(6, 3)
    with pytest.raises(ValueError, match=r"batch in front, got .*weight.*module_jacobian\(model"):
        graph_jacobian(layer(x)[:5], dict(layer.named_parameters()), per_sample=True)
    with pytest.raises(ValueError, match=r"a parameter that all samples share.* module_jacobian"):
        graph_jacobian(layer(x), layer.weight, per_sample=True)  # as many rows as samples
    scale = points(6, 3)
    own = graph_jacobian(x * scale, scale, per_sample=True)
    torch.testing.assert_close(own, torch.diag_embed(x.detach()))


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_numbers_of_samples(shape: tuple[int, ...]) -> None:
    """Outputs, or inputs, that are one number a sample."""
    x = points(*shape)
    y = x.sin()
    total = y.reshape(5, -1).sum(1)
    own = graph_jacobian(total, x, per_sample=True, flat=True, retain_graph=True)
    torch.testing.assert_close(own, x.detach().cos().reshape(5, 1, -1))
    assert graph_jacobian(total, x, per_sample=True, retain_graph=True).shape == shape
    with pytest.raises(ValueError, match="samples that do not depend"):
        graph_jacobian(total + total.roll(1), x, per_sample=True)


def test_an_infinite_derivative_is_no_dependence() -> None:
    x = torch.zeros(3, 1, requires_grad=True)
    assert graph_jacobian(x.sqrt(), x, per_sample=True).isinf().all()


# --- memory ---


def test_chunks_keep_to_the_memory() -> None:
    model, x = network(8, 64, 64, 32), points(32, 8)
    result = 8 * 32 * 32 * 32 * 8
    for memory in (2 * result, 4 * result):
        y = model(x)
        with PeakBytes() as counter:
            graph_jacobian(y, x, memory=memory, retain_graph=True)
        assert result <= counter.peak <= memory
        y = model(x)
        with PeakBytes() as counter:
            graph_jacobian(y, x, per_sample=True, memory=memory // 16)
        assert result // 32 <= counter.peak <= memory // 16
    with pytest.raises(ValueError, match=r"^graph_jacobian: memory must hold the Jacobian"):
        graph_jacobian(model(x), x, memory=result // 2)


# --- bad input ---


def refused(match: str, kind: type[Exception] = ValueError, **arguments: Any) -> Any:
    return pytest.param(kind, match, arguments, id=match[:40])


X = points(4, 3)
BAD = [
    refused("outputs must require grad, got outputs, which no", outputs=X.detach()),
    refused(r"outputs must require grad, got outputs\[1\]", outputs=[X.sin(), X.detach()]),
    refused("inputs must require grad, got inputs, which no", inputs=X.detach()),
    refused(r"inputs must require grad, got inputs\['w'\]", inputs={"x": X, "w": X.detach()}),
    refused("inputs must be the tensors that .* got inputs, to which", inputs=points(2)),
    refused("inputs must be the tensors that .* a view or copy", inputs=X.view(-1)),
    refused("outputs must hold at least one .* got torch.int64", TypeError, outputs=X.argmax()),
    refused("outputs must hold at least one .* got none", TypeError, outputs=[]),
    refused("inputs must hold at least one .* got none", TypeError, inputs={}),
    refused(
        r"outputs must be a tree of tensors, got float at outputs\[0\]", TypeError, outputs=[1.0]
    ),
    refused("got generator at inputs. .* list", TypeError, inputs=nn.Linear(1, 1).parameters()),
    refused("got Linear at inputs. .* list", TypeError, inputs=nn.Linear(1, 1)),
    refused("inputs must be a tree of tensors, got str", TypeError, inputs="x"),
    refused("inputs must be real, got torch.complex", NotImplementedError, inputs=X + 1j),
    refused("outputs must be real, got torch.complex", NotImplementedError, outputs=X * 1j),
    refused(r"strategy must be one that pulls .* got Forward\(", strategy="forward"),
    refused("strategy must be one that pulls", strategy="forward", memory="1 GiB"),
    refused(r"strategy must be one that pulls .* got Structured\(", strategy="structured"),
    refused(r"strategy must be one that pulls .* got Autotune\(", strategy="autotune"),
    refused("strategy must be one that pulls", strategy=jacfunc.Looped("columns")),
    refused("strategy must be one of 'auto'", strategy="sideways"),
    refused("strategy must be a name or an object", TypeError, strategy=3),
    refused("chunk_size must be an int or None", TypeError, chunk_size=1.5),
    refused("chunk_size must be at least 1", chunk_size=0),
    refused("must have no chunk_size, got 2", strategy="looped", chunk_size=2),
    refused("memory must be a number of bytes", TypeError, memory=1.5),
    refused("memory must be a positive number", memory="much"),
    refused("independent must be None or True, got 'always'", independent="always"),
    refused("out must come alone", out=torch.empty(4, 3, 4, 3), dtype=torch.float32),
    refused("out must be a tree of tensors", TypeError, out="here"),
    refused("out must", out=torch.empty(2, 2)),
    refused("with the batch in front, got outputs of shape", outputs=X.sum(), per_sample=True),
    refused("with the batch in front, got outputs.1. of", outputs=[X, X[1:]], per_sample=True),
    refused("samples that do not depend", outputs=X + X.mean(0), per_sample=True),
]


@pytest.mark.parametrize(("kind", "match", "arguments"), BAD)
def test_bad_input(kind: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    given = {"outputs": X.sin(), "inputs": X, **arguments}
    with pytest.raises(kind, match=rf"^graph_jacobian: .*{match}"):
        graph_jacobian(**given)


def test_inside_transforms() -> None:
    x = points(3)

    def call(z: Tensor) -> Any:
        return graph_jacobian(x.sin() * z, x)

    message = r"^graph_jacobian: it must be called outside of transforms"
    with pytest.raises(ValueError, match=message):
        torch.vmap(call)(x.detach().expand(2, 3))
    with pytest.raises(ValueError, match=message):
        torch.func.jacrev(call)(x.detach())
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(call, (x.detach(),), (x.detach(),))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        call(x)
