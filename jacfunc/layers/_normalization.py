"""Rules for normalizations: the weight and the bias that come after one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc.layers._forms import Rows, summed
from jacfunc.layers._rules import FormOf, rule


@rule(F.layer_norm, torch.layer_norm, keeps_lead=True)
def of_layers(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Mapping[str, FormOf]:
    """``z = weight · normalized(input) + bias``, over the last dimensions."""
    return _affine(lambda: F.layer_norm(input, normalized_shape, eps=eps), normalized_shape)


@rule(F.rms_norm, torch.rms_norm, keeps_lead=True)
def of_roots(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Mapping[str, FormOf]:
    """``z = weight · input / rms(input)``, over the last dimensions."""
    forms = _affine(lambda: F.rms_norm(input, normalized_shape, eps=eps), normalized_shape)
    return {"weight": forms["weight"]}


@rule(F.group_norm, torch.group_norm)
def of_groups(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Mapping[str, FormOf]:
    """``z[:, c] = weight[c] · normalized(input)[:, c] + bias[c]``."""

    def normalized() -> Tensor:
        images = F.group_norm(input.flatten(0, 1), num_groups, eps=eps)
        return images.reshape(input.shape)

    return _of_channels(normalized, input)


@rule(F.batch_norm)
def of_batches(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Mapping[str, FormOf]:
    """``z[:, c] = weight[c] · normalized(input)[:, c] + bias[c]``, by running statistics.

    Statistics of the batch itself would couple samples.
    """
    if training or running_mean is None or running_var is None:
        return {}
    mean, variance = running_mean, running_var

    def normalized() -> Tensor:
        return (input - _expanded(mean, input)) * torch.rsqrt(_expanded(variance, input) + eps)

    return _of_channels(normalized, input)


@rule(torch.batch_norm)
def of_batches_below(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Mapping[str, FormOf]:
    """The rule of :func:`of_batches` for torch.batch_norm, which F.batch_norm calls."""
    return of_batches(input, running_mean, running_var, training=training, eps=eps)


@rule(F.instance_norm)
def of_instances(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Mapping[str, FormOf]:
    """``z[:, c] = weight[c] · normalized(input)[:, c] + bias[c]``, each channel by itself."""
    if use_input_stats:
        return of_groups(input, input.shape[2], eps=eps)
    return of_batches(input, running_mean, running_var, eps=eps)


@rule(torch.instance_norm)
def of_instances_below(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Mapping[str, FormOf]:
    """The rule of :func:`of_instances` for torch.instance_norm, which F.instance_norm calls."""
    return of_instances(input, running_mean, running_var, use_input_stats=use_input_stats, eps=eps)


def _affine(
    normalized: Callable[[], Tensor], shape: Sequence[int], behind: int = 0
) -> Mapping[str, FormOf]:
    """The forms of a weight and a bias of this shape, before ``behind`` dimensions of the input."""

    @cache
    def once(with_graph: bool) -> Tensor:
        """The normalized input, which is computed once for all sweeps."""
        return normalized()

    def rows(products: Tensor) -> Rows:
        total = summed(products, (*shape, *(1,) * behind))
        return Rows(total.reshape(*total.shape[:2], *shape))

    return {
        "weight": lambda seeds: rows(seeds * once(torch.is_grad_enabled())),
        "bias": rows,
    }


def _of_channels(normalized: Callable[[], Tensor], input: Tensor) -> Mapping[str, FormOf]:
    """The forms of a weight and a bias with an entry for each channel."""
    return _affine(normalized, input.shape[2:3], input.dim() - 3)


def _expanded(statistics: Tensor, input: Tensor) -> Tensor:
    """Statistics ``[B, channels]`` with the dimensions of an input ``[B, N, channels, …]``."""
    return statistics.reshape(len(statistics), 1, -1, *(1,) * (input.dim() - 3))
