"""Convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc.layers._forms import EVERY, Outer, Rows, summed
from jacfunc.layers._rules import FormOf, rule

Ints: TypeAlias = int | Sequence[int]

UNFOLDED_BYTES = 2**22
"""Bytes of unfolded images and products that are made at once: they stay in the cache."""


@dataclass(frozen=True)
class Windows:
    """The windows of an image that a kernel sees; each field has a number for each dimension."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Ints, padding: Ints | str, dilation: Ints
    ) -> Windows:
        """The windows of a convolution with these options, as torch takes them."""
        count = len(kernel)
        steps = _for_each(dilation, count)
        if padding == "same":
            totals = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = 0 if isinstance(padding, str) else padding
            pads = [(side, side) for side in _for_each(sides, count)]
        return cls(kernel, _for_each(stride, count), pads, steps)

    def padded(self, images: Tensor) -> Tensor:
        """The images with zeros around them, as far as the kernel sees them."""
        sides = [side for pair in reversed(self.padding) for side in pair]
        return torch.constant_pad_nd(images, sides) if any(sides) else images

    def on(self, images: Tensor, places: Sequence[int]) -> Tensor:
        """What the kernel sees of images ``[…, *sizes]``, as ``[…, *kernel, *places]``."""
        windows, count = self.padded(images), len(places)
        first = windows.dim() - count
        for n, place in enumerate(places):
            span = self.dilation[n] * (self.kernel[n] - 1) + 1
            windows = windows.unfold(first + n, span, self.stride[n])
            windows = windows.narrow(first + n, 0, place)
            if self.dilation[n] != 1:
                windows = windows[..., :: self.dilation[n]]
        here = range(first, first + count)
        return windows.movedim(tuple(here), tuple(n + count for n in here))


class Convolution(Outer):
    """An :class:`Outer` at all places of a kernel, whose factors are unfolded when they are needed.

    Args:
        images: inputs of the convolution, ``[B, N, channels, *sizes]``.
        seeds: cotangents of its output, ``[K, B, N, channels, *sizes]``.
        windows: the kernel's windows on the input; on the output of a transposed convolution.
        num_groups: the number of groups of channels.
        shape: the shape of the weight.
        is_transposed: is the convolution transposed?
    """

    images: Tensor
    seeds: Tensor
    windows: Windows
    num_groups: int

    def __init__(
        self,
        images: Tensor,
        seeds: Tensor,
        windows: Windows,
        num_groups: int,
        shape: torch.Size,
        is_transposed: bool = False,
    ) -> None:
        own = {"images": images, "seeds": seeds, "windows": windows, "num_groups": num_groups}
        vars(self).update(own, shape=shape, is_transposed=is_transposed)

    @property
    def groups(self) -> int:
        return self.num_groups

    @property
    def width(self) -> int:
        return self.shape[0] // self.groups if self.is_transposed else self.shape[1:].numel()

    @property
    def places(self) -> Sequence[int]:
        """The number of places of the kernel, in each dimension."""
        count = len(self.windows.kernel)
        return (self.images if self.is_transposed else self.seeds).shape[-count:]

    @cached_property
    def inputs(self) -> Tensor:
        images = self.images if self.is_transposed else self.windows.on(self.images, self.places)
        return self._by_position(images, 1)

    @cached_property
    def cotangents(self) -> Tensor:
        seeds = self.windows.on(self.seeds, self.places) if self.is_transposed else self.seeds
        return self._by_position(seeds, 2)

    def write(self, block: Tensor, at_once: int = UNFOLDED_BYTES) -> None:
        """Write the rows for few samples at a time, so that their windows stay in the cache."""
        kernel = prod(self.windows.kernel)
        images, seeds = self.images[0].numel(), self.seeds[:, 0].numel()
        unfolded = images + kernel * seeds if self.is_transposed else kernel * images + seeds
        step = max(1, at_once // (block.element_size() * (unfolded + block[0].numel())))
        for start in range(0, len(block), step):
            samples = slice(start, start + step)
            super(Convolution, self.of_samples(samples)).write(block[samples])

    def of_samples(self, samples: slice, seeds: slice = EVERY) -> Convolution:
        """The form of some of the samples and cotangents, with nothing unfolded yet."""
        images, some = self.images[samples], self.seeds[seeds, samples]
        return Convolution(images, some, self.windows, self.groups, self.shape, self.is_transposed)

    def _by_position(self, images: Tensor, lead: int) -> Tensor:
        """``[*lead, N, channels, …, *places]`` as ``[*lead, groups, T, channels · …]``."""
        count = len(self.places)
        sizes, groups = images.shape, self.groups
        apart = (*sizes[: lead + 1], groups, sizes[lead + 1] // groups, *sizes[lead + 2 :])
        moved = images.reshape(apart).movedim(lead, -count - 1)
        return moved.flatten(-count - 1).flatten(lead + 1, -2).mT


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Mapping[str, FormOf]:
    """``z[o, t] = Σᵢₛ input[i, stride · t + dilation · s] weight[o, i, s] + bias[o]``."""
    windows = Windows.of(weight.shape[3:], stride, padding, dilation)
    return _forms(input, weight.shape[1:], windows, groups)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Mapping[str, FormOf]:
    """``z[o, stride · t + dilation · s] += Σᵢ input[i, t] weight[i, o, s]``, plus ``bias[o]``."""
    windows = Windows.of(weight.shape[3:], stride, padding, dilation)
    return _forms(input, weight.shape[1:], windows, groups, is_transposed=True)


def _forms(
    input: Tensor, shape: torch.Size, windows: Windows, groups: int, is_transposed: bool = False
) -> Mapping[str, FormOf]:
    """The forms of a weight of this shape, and of a bias."""
    count = len(shape) - 2

    def of_weight(seeds: Tensor) -> Convolution:
        images, seeds = _batched(input, 1, count), _batched(seeds, 2, count)
        return Convolution(images, seeds, windows, groups, shape, is_transposed)

    return {
        "weight": of_weight,
        "bias": lambda seeds: Rows(of_channels(_batched(seeds, 2, count))),
    }


def of_channels(products: Tensor) -> Tensor:
    """``[K, B, channels]``: products ``[K, B, N, channels, …]``, summed over all else."""
    shape = (products.shape[3], *(1,) * (products.dim() - 4))
    return summed(products, shape).flatten(2)


def _batched(images: Tensor, lead: int, count: int) -> Tensor:
    """``[*lead, N, channels, *sizes]``, where a missing N becomes one."""
    return images.unsqueeze(lead) if images.dim() == lead + 1 + count else images


def _for_each(sizes: Ints, count: int) -> Sequence[int]:
    """A size for each dimension, from one for all or one for each."""
    values = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return values * count if len(values) == 1 else values
