"""Networks by hand, as fast as one can write it in PyTorch without a library.

Hooks keep what goes into each layer, and one pullback of all seeds at once gives what comes back to
its output. Jacobians, kernels, norms and curvatures are products of the two.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import CLASSES, Recurrent, labels_of, parts, sample_by_sample
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

NORMS = "norms"
ONE_GRAPH, FACTORS = "by hand, one graph", "by hand, factors of layers"
EXPANDED, ROWS = "by hand, expanded parameters", "by hand, rows at once"
IN_FLOAT32 = "by hand, in float32"
Seeds = Callable[[Tensor], Tensor]
"""From scores ``[B, C]`` to what is pulled back, ``[K, B, C]``."""


@dataclass(frozen=True)
class Outer:
    """Rows of a parameter: what came back times what went in, summed over positions."""

    back: Tensor  # [B, K, O, T]
    inputs: Tensor | None  # [B, I, T]; None for a bias, which is only added

    def rows(self) -> Tensor:
        """``[B, K, O, I]``, or ``[B, K, O]`` of a bias."""
        if self.inputs is None:
            return self.back.sum(-1)
        if self.back.shape[-1] == 1:
            return self.back * self.inputs[:, None, None, :, 0]
        rows = self.back.flatten(1, 2) @ self.inputs.transpose(1, 2)
        return rows.unflatten(1, self.back.shape[1:3])

    def squares(self) -> Tensor:
        """The sum of squared rows: ``[O, I]``, or ``[O]``."""
        if self.inputs is None or self.back.shape[-1] > 1:
            return self.rows().square().sum((0, 1))
        return self.back[..., 0].square().sum(1).T @ self.inputs[..., 0].square()

    def norms(self) -> Tensor:
        """Squared norms of the rows of each sample's only seed: ``[B]``."""
        back = self.back[:, 0]
        if self.inputs is None:
            return back.sum(-1).square().sum(1)
        (_, outputs, positions), width = back.shape, self.inputs.shape[1]
        if positions == 1:
            return back.square().sum((1, 2)) * self.inputs.square().sum((1, 2))
        if positions * (outputs + width) < outputs * width:
            grams = back.transpose(1, 2) @ back, self.inputs.transpose(1, 2) @ self.inputs
            return (grams[0] * grams[1]).sum((1, 2))
        return self.rows().square().sum((1, 2, 3))


Part = Outer | Tensor  # or rows ``[B, K, *param]`` as they are


def one_hot(scores: Tensor) -> Tensor:
    """A seed a class, shared by all samples."""
    return torch.eye(CLASSES).to(scores)[:, None].expand(-1, *scores.shape)


def factors(seeds: Seeds, problem: Problem) -> Callable[[], dict[str, Part]]:
    """What makes the parts of all parameters; on a copy of the model, for the hooks stay."""
    model, images = parts(problem)
    own = copy.deepcopy(model)
    names = {param: name for name, param in own.named_parameters()}
    if isinstance(own, Recurrent):
        own.read = _Unrolled(own.read)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        if isinstance(layer, nn.Embedding) and inputs[0].dim() == 1:
            # all samples share what is looked up, and each has a cotangent of its own
            out, inputs = (each.expand(len(images), *each.shape) for each in (out, inputs[0]))
            inputs = (inputs,)
        calls.append((layer, inputs[0].detach(), out))
        return out

    for layer in own.modules():
        if layer._parameters:
            layer.register_forward_hook(keep)

    def run() -> dict[str, Part]:
        calls.clear()
        # the fused kernels of attention take batched cotangents one by one
        with sdpa_kernel(SDPBackend.MATH):
            scores = own(images)
        outputs = [out for _, _, out in calls]
        backs = torch.autograd.grad(scores, outputs, seeds(scores), is_grads_batched=True)
        by_name: dict[str, list[Part]] = {}
        for (layer, inputs, _), back in zip(calls, backs, strict=True):
            for param, part in _parts_of(layer, inputs, back.transpose(0, 1)):
                by_name.setdefault(names[param], []).append(part)
        calls.clear()
        return {name: _sum(by_name[name]) for name in names.values()}

    return run


def _sum(uses: list[Any]) -> Part:
    """The part of a parameter that is used several times: one, of more positions."""
    if len(uses) == 1:
        return uses[0]  # type: ignore[no-any-return]
    inputs = None if uses[0].inputs is None else torch.cat([use.inputs for use in uses], -1)
    return Outer(torch.cat([use.back for use in uses], -1), inputs)


def _parts_of(layer: Any, inputs: Tensor, back: Tensor) -> Iterator[tuple[nn.Parameter, Part]]:
    """Parameters of a layer and their parts, from ``[B, *in]`` and ``[B, K, *out]``."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    match layer:
        case nn.Linear():
            inputs, back = _positions_last(inputs, 1), _positions_last(back, 2)
            yield weight, Outer(back, inputs)
        case nn.Conv2d():
            how = layer.kernel_size, layer.dilation, layer.padding, layer.stride
            back = back.flatten(3)
            yield weight, Outer(back, F.unfold(inputs, *how))
        case nn.LayerNorm():
            inputs = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
            inputs, back = _positions_last(inputs, 1), _positions_last(back, 2)
            yield weight, (back * inputs[:, None]).sum(-1)
        case nn.GroupNorm() | nn.BatchNorm2d():
            inputs, back = _normalized(layer, inputs).flatten(2), back.flatten(3)
            yield weight, (back * inputs[:, None]).sum(-1)
        case nn.Embedding():
            rows = back.new_zeros(*back.shape[:2], *weight.shape)
            yield weight, rows.scatter_add_(2, inputs[:, None, :, None].expand_as(back), back)
        case object(cls_token=first, position_embeddings=positions):  # HuggingFace's
            yield first, back[:, :, None, :1]
            yield positions, back[:, :, None]
        case _:
            raise NotImplementedError(f"{type(layer).__name__} is not written by hand here")
    if bias is not None:
        yield bias, Outer(back, None)


def _normalized(layer: Any, images: Tensor) -> Tensor:
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(images, layer.num_groups, eps=layer.eps)
    return F.batch_norm(images, layer.running_mean, layer.running_var, eps=layer.eps)


def _positions_last(values: Tensor, lead: int) -> Tensor:
    """``[*lead, *positions, width]`` as ``[*lead, width, positions]``."""
    if values.dim() == lead + 1:
        return values[..., None]
    return values.flatten(lead, -2).transpose(-1, -2)


class _Unrolled(nn.Module):
    """An LSTM of one layer step by step, with the same parameters."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.read = nn.Linear(*lstm.weight_ih_l0.shape[::-1])
        self.keep = nn.Linear(*lstm.weight_hh_l0.shape[::-1])
        self.read.weight, self.read.bias = lstm.weight_ih_l0, lstm.bias_ih_l0
        self.keep.weight, self.keep.bias = lstm.weight_hh_l0, lstm.bias_hh_l0

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        state = memory = rows.new_zeros(len(rows), self.keep.in_features)
        states = []
        for read in self.read(rows).unbind(1):
            let_in, kept, new, out = (read + self.keep(state)).chunk(4, -1)
            memory = kept.sigmoid() * memory + let_in.sigmoid() * new.tanh()
            state = out.sigmoid() * memory.tanh()
            states.append(state)
        return torch.stack(states, 1), None


def _rows(part: Part) -> Tensor:
    return part.rows() if isinstance(part, Outer) else part


def jacobian(problem: Problem) -> Run:
    """Blocks ``[B, C, *param]``."""
    run, params = factors(one_hot, problem), dict(parts(problem)[0].named_parameters())

    def blocks() -> Answer:
        rows = {name: _rows(part) for name, part in run().items()}
        return {n: block.reshape(*block.shape[:2], *params[n].shape) for n, block in rows.items()}

    return blocks


def kernel(problem: Problem) -> Run:
    """``J Jᵀ`` with rows by sample, then class: products of Gram matrices at single positions."""
    run, batch = factors(one_hot, problem), len(problem.args[0])

    def matrix() -> Tensor:
        scales: dict[Tensor, Any] = {}
        rows = []
        for part in run().values():
            if isinstance(part, Tensor) or part.back.shape[-1] > 1:
                rows.append(_rows(part).flatten(2).flatten(0, 1))
                continue
            seen = None if part.inputs is None else part.inputs[..., 0]
            scales[part.back] = scales.get(part.back, 0) + (1 if seen is None else seen @ seen.T)
        joined = torch.cat(rows, 1) if rows else images_of(problem).new_zeros(batch * CLASSES, 0)
        total = joined @ joined.T
        pairs = total.view(batch, CLASSES, batch, CLASSES)
        for back, scale in scales.items():
            flat = back.flatten(0, 1)[..., 0]
            pairs.addcmul_((flat @ flat.T).view_as(pairs), scale[:, None, :, None])
        return total

    return matrix


def images_of(problem: Problem) -> Tensor:
    return parts(problem)[1]


def norms(problem: Problem) -> Run:
    """Ghost norms: of each sample's part of the gradient of the mean cross-entropy."""
    images = images_of(problem)

    def seeds(scores: Tensor) -> Tensor:
        scores = scores.detach()
        return (scores.softmax(-1) - F.one_hot(labels_of(images), CLASSES))[None] / len(images)

    def squares(part: Part) -> Tensor:
        return part.norms() if isinstance(part, Outer) else part.flatten(1).square().sum(1)

    run = factors(seeds, problem)
    return lambda: {NORMS: torch.stack([*map(squares, run().values())]).sum(0).sqrt()}


def diagonal(problem: Problem) -> Run:
    """The diagonal of the GGN of the mean cross-entropy: squares of a root that is pulled back."""

    def root(scores: Tensor) -> Tensor:
        chances = scores.detach().softmax(-1)
        roots = (chances / len(scores)).sqrt()
        return (roots.diag_embed() - chances[:, :, None] * roots[:, None, :]).movedim(2, 0)

    def squares(part: Part) -> Tensor:
        return part.squares() if isinstance(part, Outer) else part.square().sum((0, 1))

    run, params = factors(root, problem), dict(parts(problem)[0].named_parameters())
    return lambda: {n: squares(part).reshape(params[n].shape) for n, part in run().items()}


def by_one_graph(problem: Problem) -> Run:
    """Jacobians in the inputs: the batch as it is, and all classes pulled back at once."""
    model, images = parts(problem)
    own = copy.deepcopy(model).requires_grad_(False)

    def run() -> Answer:
        points = images.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            scores = own(points)
        (rows,) = torch.autograd.grad(scores, points, one_hot(scores), is_grads_batched=True)
        return {"input": rows.transpose(0, 1)}

    return run


def by_expanded_parameters(problem: Problem) -> Run:
    """Parameters of its own for each sample, one graph, and all classes pulled back at once."""
    model, images = parts(problem)
    params = {name: param.detach() for name, param in model.named_parameters()}
    score = lambda params, image: functional_call(model, params, (image[None],))[0]  # noqa: E731

    def run() -> Answer:
        copies = {n: p.expand(len(images), *p.shape).requires_grad_() for n, p in params.items()}
        with sdpa_kernel(SDPBackend.MATH):
            scores = vmap(score)(copies, images)
        leaves, seeds = [*copies.values()], one_hot(scores)
        rows = torch.autograd.grad(scores, leaves, seeds, is_grads_batched=True)
        return {n: row.transpose(0, 1) for n, row in zip(params, rows, strict=True)}

    return run


def by_rows_at_once(problem: Problem) -> Run:
    """A graph for each sample, and all its rows pulled back at once."""
    model, images = parts(problem)
    params = dict(model.named_parameters())

    def run() -> Answer:
        with sdpa_kernel(SDPBackend.MATH):
            scores = model(images)
        leaves, seeds = [*params.values()], torch.eye(CLASSES).to(scores)
        rows = torch.autograd.grad(scores[0], leaves, seeds, is_grads_batched=True)
        return {n: row[None] for n, row in zip(params, rows, strict=True)}

    return run


def in_float32(problem: Problem) -> Run:
    """Low precision by way of a higher one: factors of a copy, rounded at the end."""
    model, images = parts(problem)
    own = replace(problem, target=copy.deepcopy(model).float(), args=(images.float(),))
    run = jacobian(own)
    return lambda: {name: block.to(images.dtype) for name, block in run().items()}


def by_gradients(problem: Problem) -> Run:
    """Norms from gradients that are written out."""
    model, images = parts(problem)
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: Answer, image: Tensor, label: Tensor) -> Tensor:
        score = functional_call(model, params, (image[None],))
        return F.cross_entropy(score, label[None]) / len(images)

    derive = vmap(grad(loss), (None, 0, 0))

    def run() -> Answer:
        blocks = derive(params, images, labels_of(images)).values()
        return {NORMS: torch.stack([block.flatten(1).norm(dim=1) for block in blocks]).norm(dim=0)}

    return run


JACOBIANS: tuple[Contestant[Problem], ...] = (
    Contestant(FACTORS, "autograd", jacobian),
    Contestant(EXPANDED, "autograd", by_expanded_parameters),
    Contestant(ROWS, "autograd", partial(sample_by_sample, by_rows_at_once)),
)
HALF = Contestant(IN_FLOAT32, "autograd", in_float32)
