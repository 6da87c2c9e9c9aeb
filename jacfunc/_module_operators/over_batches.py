"""The Jacobian of a module at many batches, one after the other, as one linear operator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jacfunc._kernels import gram_of_samples
from jacfunc._module_operators.evaluated import Evaluated
from jacfunc._module_operators.one_batch import DetachedOperator
from jacfunc._showing import Progress
from jacfunc._solving import check_gram
from jacfunc._torch import RandomState
from jacfunc._trees import flatten, kind_of, positional
from jacfunc._types import Leaves, Tree
from jacfunc.operators import LinearOperator, Space


class OverBatches(LinearOperator):
    """Jacobians of several batches, one below the other: rows of the first batch come first.

    Each product passes through all batches, evaluates each, and keeps no graph of another.

    Args:
        at: makes the point of a batch, from the module's inputs.
        batches: may be passed through many times, and gives the same ones each time.
        progress: wraps the batches at each pass.
    """

    def __init__(
        self,
        api: str,
        at: Callable[[tuple[Tree, ...]], Evaluated],
        batches: Iterable[Any],
        progress: Progress | None,
    ) -> None:
        self._at, self._batches, self._progress = at, batches, progress or iter
        self._api, self._marks = api, list[Hashable]()
        self._random_state = RandomState(())
        self._sizes: list[int] = []
        domain, codomains = None, []
        for batch in self._pass():
            evaluated = at(positional(batch))
            codomain = Space.of(evaluated.outputs(evaluated.point()))
            self._sizes.append(_size_of(api, codomain.leaves))
            codomains.append(codomain)
            domain = domain or evaluated.domain
        if domain is None:
            raise ValueError(
                f"{api}: there must be at least one batch, got an iterable of none. Pass a batch, "
                "or an iterable of batches that has not been used up."
            )
        self._first = codomains[0]
        super().__init__(api, domain, _below_each_other(api, codomains))

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        products = [linear.pushforward_batch(tangents) for linear, _ in self._linearized()]
        return tuple(torch.cat(leaves, 1) for leaves in zip(*products, strict=True))

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        total: Leaves | None = None
        for linear, rows in self._linearized():
            products = linear.pullback_batch(tuple(seeds[:, rows] for seeds in cotangents))
            total = products if total is None else tuple(map(torch.add, total, products))
        assert total is not None
        return total

    def gram(self, *, center: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """``J Jᵀ``; of independent samples from the factors of layers of all batches."""
        every = [self._at(positional(batch)).samples for batch in self._pass()]
        batches = [samples.at_batch for samples in every if samples is not None]
        if len(batches) < len(every) or len(self.codomain.leaves) > 1:
            return super().gram(center=center, dtype=dtype)
        check_gram(self.api, center, dtype)
        return gram_of_samples(batches, center=center, dtype=dtype or self.dtype)

    def _linearized(self) -> Iterator[tuple[DetachedOperator, slice]]:
        """The operator of each batch, and its samples among all."""
        start = 0
        for size, batch in zip(self._sizes, self._pass(), strict=True):
            evaluated = self._at(positional(batch))
            spaces = evaluated.domain, self._first
            yield (
                DetachedOperator(self._api, *spaces, evaluated.point, evaluated.around),
                slice(start, start + size),
            )
            start += size

    def _pass(self) -> Iterator[Any]:
        """The batches, each compared with what it was at the first pass."""
        is_first, count = not self._sizes, 0
        with RandomState(()).kept():
            self._random_state.repeat()  # a loader may draw its order, and the module a mask
            for number, batch in enumerate(self._progress(self._batches)):
                mark = tuple(map(_mark_of, flatten(batch)[0]))
                if is_first:
                    self._marks.append(mark)
                elif number >= len(self._marks) or mark != self._marks[number]:
                    raise self._changed(f"another one in place {number}")
                count += 1
                yield batch
        if count < len(self._marks):
            raise self._changed(f"{count} batches, and {len(self._marks)} at the first pass")

    def _changed(self, came: str) -> ValueError:
        return ValueError(
            f"{self._api}: an iterable must give the same batches in the same order at each pass, "
            f"got {came}. Use a list or a DataLoader, with shuffle=False and without random "
            "augmentations."
        )


def _mark_of(leaf: object) -> Hashable:
    """Equal for equal leaves, and most likely for no others."""
    if not isinstance(leaf, Tensor):
        return kind_of(leaf)
    return kind_of(leaf), torch.hash_tensor(leaf).view(torch.int64).item() if leaf.numel() else 0


def _size_of(api: str, outputs: Leaves) -> int:
    """The number of samples of a batch, which all outputs have in front."""
    sizes = {out.shape[:1] for out in outputs}
    if len(sizes) != 1 or not (size := sizes.pop()):
        shapes = ", ".join(str(tuple(out.shape)) for out in outputs)
        raise ValueError(
            f"{api}: outputs must have the samples of each batch in front, got shapes {shapes}. "
            "Pass one batch, or a module with the batch in front of its outputs."
        )
    return size[0]


def _below_each_other(api: str, spaces: list[Space]) -> Space:
    """The space of the outputs of all batches, which differ in the number of samples alone."""
    columns = zip(*(space.leaves for space in spaces), strict=True)
    leaves = []
    for column in columns:
        if len({leaf.shape[1:] for leaf in column}) > 1:
            shapes = ", ".join(sorted({str(tuple(leaf.shape)) for leaf in column}))
            raise ValueError(
                f"{api}: outputs of all batches must have one shape but for the samples, got "
                f"{shapes}. Pad the inputs, or pass batches one by one."
            )
        size = sum(leaf.shape[0] for leaf in column)
        leaves.append(column[0].new_empty(()).expand(size, *column[0].shape[1:]))
    return Space(replace(spaces[0].split, leaves=tuple(leaves)))
