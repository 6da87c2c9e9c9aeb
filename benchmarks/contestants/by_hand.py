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
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import CLASSES, labels_of, parts, sample_by_sample
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

ONE_GRAPH, FACTORS = "by hand, one graph", "by hand, factors of layers"
ROWS, IN_FLOAT32 = "by hand, rows at once", "by hand, in float32"
NORMS, KERNEL = "norms", "ntk"  # names of the only block of an answer
Seeds = Callable[[Tensor], Tensor]  # from scores [B, C] to what is pulled back, [K, B, C]


@dataclass(frozen=True)
class Outer:
    """Rows of a parameter: what came back times what went in, summed over positions."""

    back: Tensor  # [B, K, O, T]
    inputs: Tensor | None  # [B, I, T]; None for a bias, which is only added

    @property
    def is_at_one(self) -> bool:
        return self.back.shape[-1] == 1

    def rows(self) -> Tensor:
        """``[B, K, O, I]``, or ``[B, K, O]`` of a bias."""
        if self.inputs is None:
            return self.back.sum(-1)
        if self.is_at_one:
            return self.back * self.inputs[:, None, None, :, 0]
        rows = self.back.flatten(1, 2) @ self.inputs.transpose(1, 2)
        return rows.view(*self.back.shape[:3], -1)

    def squares(self) -> Tensor:
        """The sum of squared rows over samples and seeds: ``[O, I]``, or ``[O]``."""
        if self.inputs is None or not self.is_at_one:
            return self.rows().square().sum((0, 1))
        return self.back[..., 0].square().sum(1).T @ self.inputs[..., 0].square()

    def norms(self) -> Tensor:
        """Squared norms of the rows of each sample's only seed: ``[B]``."""
        if self.inputs is None:
            return self.rows().square().sum((1, 2))
        outputs, positions = self.back.shape[2:]
        if self.is_at_one:
            return self.back.square().sum((1, 2, 3)) * self.inputs.square().sum((1, 2))
        if positions * (outputs + self.inputs.shape[1]) > outputs * self.inputs.shape[1]:
            return self.rows().square().sum((1, 2, 3))
        first, second = (side.transpose(1, 2) @ side for side in (self.back[:, 0], self.inputs))
        return (first * second).sum((1, 2))


Part = Outer | Tensor  # or rows ``[B, K, *param]`` as they are


def one_hot(scores: Tensor) -> Tensor:
    """A seed a class, shared by all samples."""
    return torch.eye(CLASSES).to(scores)[:, None].expand(-1, *scores.shape)


def factors(seeds: Seeds, problem: Problem) -> Callable[[], dict[str, Part]]:
    """What makes the parts of all parameters; on a copy of the model, for the hooks stay."""
    model, images = parts(problem)
    own = copy.deepcopy(model)
    names: dict[Tensor, str] = {param: name for name, param in own.named_parameters()}
    if isinstance(getattr(own, "read", None), nn.LSTM):
        own.read = _Unrolled(own.read)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        seen = inputs[0].detach()
        if isinstance(layer, nn.Embedding) and seen.dim() == 1:
            # all samples share what is looked up, and each has a cotangent of its own
            seen, out = (each.expand(len(images), *each.shape) for each in (seen, out))
        calls.append((layer, seen, out))
        return out

    for layer in own.modules():
        if layer._parameters:
            layer.register_forward_hook(keep)

    def run() -> dict[str, Part]:
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
        return {name: _joined(by_name[name]) for name in names.values()}

    return run


def _joined(uses: list[Any]) -> Any:
    """The part of a parameter that is used several times: one, of more positions."""
    if len(uses) == 1:
        return uses[0]
    inputs = None if uses[0].inputs is None else torch.cat([use.inputs for use in uses], -1)
    return Outer(torch.cat([use.back for use in uses], -1), inputs)


def _parts_of(layer: Any, inputs: Tensor, back: Tensor) -> Iterator[tuple[Tensor, Part]]:
    """Parameters of a layer and their parts, from ``[B, *in]`` and ``[B, K, *out]``."""
    match layer:
        case nn.Linear():
            inputs, back = _positions_last(inputs, 1), _positions_last(back, 2)
            yield layer.weight, Outer(back, inputs)
        case nn.Conv2d():
            how: Any = layer.kernel_size, layer.dilation, layer.padding, layer.stride
            back = back.flatten(3)
            yield layer.weight, Outer(back, F.unfold(inputs, *how))
        case nn.LayerNorm():
            normal = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
            normal, back = _positions_last(normal, 1), _positions_last(back, 2)
            yield layer.weight, (back * normal[:, None]).sum(-1)
        case nn.GroupNorm():
            normal, back = F.group_norm(inputs, layer.num_groups).flatten(2), back.flatten(3)
            yield layer.weight, (back * normal[:, None]).sum(-1)
        case nn.BatchNorm2d(running_mean=mean, running_var=variance):
            normal, back = F.batch_norm(inputs, mean, variance).flatten(2), back.flatten(3)
            yield layer.weight, (back * normal[:, None]).sum(-1)
        case nn.Embedding():
            rows = back.new_zeros(*back.shape[:2], *layer.weight.shape)
            yield layer.weight, rows.scatter_add_(2, inputs[:, None, :, None].expand_as(back), back)
        case object(cls_token=first, position_embeddings=positions):  # HuggingFace's
            yield first, back[:, :, None, :1]
            yield positions, back[:, :, None]
        case _:
            raise NotImplementedError(f"{type(layer).__name__} is not written by hand here")
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, Outer(back, None)


def _positions_last(values: Tensor, lead: int) -> Tensor:
    """``[*lead, *positions, width]`` as ``[*lead, width, positions]``."""
    if values.dim() == lead + 1:
        return values[..., None]
    return values.flatten(lead, -2).transpose(-1, -2)


class _Unrolled(nn.Module):
    """An LSTM of one layer step by step, with the same parameters."""

    def __init__(self, lstm: Any) -> None:
        super().__init__()
        self.width, (self.read, self.keep) = lstm.hidden_size, (nn.Linear(1, 1), nn.Linear(1, 1))
        self.read.weight, self.read.bias = lstm.weight_ih_l0, lstm.bias_ih_l0
        self.keep.weight, self.keep.bias = lstm.weight_hh_l0, lstm.bias_hh_l0

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        state = memory = rows.new_zeros(len(rows), self.width)
        states = []
        for read in self.read(rows).unbind(1):
            let_in, kept, new, out = (read + self.keep(state)).chunk(4, -1)
            memory = kept.sigmoid() * memory + let_in.sigmoid() * new.tanh()
            state = out.sigmoid() * memory.tanh()
            states.append(state)
        return torch.stack(states, 1), None


def _rows(part: Part) -> Tensor:
    return part.rows() if isinstance(part, Outer) else part


def _shaped(rows: Answer, problem: Problem, lead: int = 0) -> Answer:
    """Blocks with the shapes of parameters behind so many dimensions."""
    params = dict(parts(problem)[0].named_parameters())
    return {n: row.reshape(*row.shape[:lead], *params[n].shape) for n, row in rows.items()}


def jacobian(problem: Problem) -> Run:
    """Blocks ``[B, C, *param]``."""
    run = factors(one_hot, problem)
    return lambda: _shaped({name: _rows(part) for name, part in run().items()}, problem, 2)


def kernel(problem: Problem) -> Run:
    """``J Jᵀ`` as ``[B, B, C, C]``: products of Gram matrices at single positions."""
    run, images = factors(one_hot, problem), parts(problem)[1]

    def blocks() -> Answer:
        scales, rows = dict[Tensor, Any](), [images.new_zeros(len(images) * CLASSES, 0)]
        ones = images.new_ones(len(images), 1)
        for part in run().values():
            if isinstance(part, Tensor) or not part.is_at_one:
                rows.append(_rows(part).flatten(2).flatten(0, 1))
            else:
                seen = ones if part.inputs is None else part.inputs[..., 0]
                scales[part.back] = scales.get(part.back, 0) + seen @ seen.T
        joined = torch.cat(rows, 1)
        pairs = (joined @ joined.T).view(len(images), CLASSES, len(images), CLASSES)
        for back, scale in scales.items():
            flat = back.flatten(0, 1)[..., 0]
            pairs.addcmul_((flat @ flat.T).view_as(pairs), scale[:, None, :, None])
        return {KERNEL: pairs.transpose(1, 2)}

    return blocks


def ghost_norms(problem: Problem) -> Run:
    """Of each sample's part of the gradient of the mean cross-entropy."""
    labels = F.one_hot(labels_of(parts(problem)[1]), CLASSES)
    seeds = lambda scores: (scores.detach().softmax(-1) - labels)[None] / len(labels)  # noqa: E731
    squares = lambda p: p.norms() if isinstance(p, Outer) else p.flatten(1).square().sum(1)  # noqa: E731
    run = factors(seeds, problem)
    return lambda: {NORMS: torch.stack([*map(squares, run().values())]).sum(0).sqrt()}


def diagonal(problem: Problem) -> Run:
    """The diagonal of the GGN of the mean cross-entropy: squares of a root that is pulled back."""

    def root(scores: Tensor) -> Tensor:
        chances = scores.detach().softmax(-1)
        roots = (chances / len(scores)).sqrt()
        return (roots.diag_embed() - chances[:, :, None] * roots[:, None, :]).movedim(2, 0)

    squares = lambda p: p.squares() if isinstance(p, Outer) else p.square().sum((0, 1))  # noqa: E731
    run = factors(root, problem)
    return lambda: _shaped({name: squares(part) for name, part in run().items()}, problem)


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


def by_rows_at_once(problem: Problem) -> Run:
    """A graph of one sample, and all its rows pulled back at once."""
    model, image = parts(problem)
    names, params = zip(*model.named_parameters(), strict=True)

    def run() -> Answer:
        with sdpa_kernel(SDPBackend.MATH):
            (scores,) = model(image)
        rows = torch.autograd.grad(scores, params, torch.eye(CLASSES), is_grads_batched=True)
        return {name: row[None] for name, row in zip(names, rows, strict=True)}

    return run


def in_float32(problem: Problem) -> Run:
    """Low precision by way of a higher one: factors of a copy, rounded at the end."""
    model, images = parts(problem)
    run = jacobian(replace(problem, target=copy.deepcopy(model).float(), args=(images.float(),)))
    return lambda: {name: block.to(images.dtype) for name, block in run().items()}


JACOBIANS: tuple[Contestant[Problem], ...] = (
    Contestant(FACTORS, "autograd", jacobian),
    Contestant(ROWS, "autograd", partial(sample_by_sample, by_rows_at_once)),
)
HALF = Contestant(IN_FLOAT32, "autograd", in_float32)
