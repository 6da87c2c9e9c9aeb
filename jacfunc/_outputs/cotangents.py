"""Sums of outputs, by cotangents of one's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._outputs.choice import OutputChoice, Returned, check_size
from jacfunc._trees import Structure, unflatten
from jacfunc._types import Leaves


@dataclass(frozen=True, eq=False)
class OwnCotangents(OutputChoice):
    """Sums of outputs, by cotangents ``[R, *out]``, or ``[B, R, *out]`` of each sample's own.

    Args:
        spec: how they are a tree, which is one like the output.
        is_of_one: are they meant for one batch? For several they can't be of samples.
    """

    cotangents: Leaves
    spec: Structure
    is_of_one: bool = True

    @property
    def kind(self) -> Hashable:
        return "cotangents", tuple([x.shape for x in self.cotangents])

    @property
    def tensors(self) -> Leaves:
        return self.cotangents

    def is_of_samples(self, api: str, size: int | None, ranks: Callable[[], list[int]]) -> bool:
        if size is None:
            return False
        pairs = zip(self.cotangents, ranks(), strict=False)
        # what fits neither form is refused where it meets the outputs
        if any(x.dim() - rank != 2 for x, rank in pairs):
            return False
        form, one = "[B, R, *out]", self.is_of_one
        return all(check_size(api, x, form, size, one) for x in self.cotangents)

    def of(self, returned: Returned, own: Leaves) -> Tensor:
        row = returned.row
        cotangents = self._in_a_row(returned, own).to(row)
        with torch.autocast(row.device.type, enabled=False):
            if cotangents.dim() == 2:
                return row @ cotangents.mT
            return (cotangents @ row.unsqueeze(-1)).squeeze(-1)

    def _in_a_row(self, returned: Returned, own: Leaves) -> Tensor:
        """The cotangents ``[R, M]`` or ``[B, R, M]``, leaf after leaf."""
        aligned, shapes = returned.align(unflatten(self.spec, own)), returned.shapes
        leads = [_lead_of(x, shape) for x, shape in zip(aligned, shapes, strict=False)]
        if len(aligned) != len(shapes) or len(set(leads)) != 1 or leads[0] is None:
            expected = ", ".join(f"[R, {', '.join(map(str, shape))}]" for shape in shapes)
            got = ", ".join(str(tuple(x.shape)) for x in aligned)
            raise ValueError(
                f"{returned.api}: outputs must be cotangents [R, *out] or [B, R, *out] of a "
                f"sample's outputs, here {expected.replace(', ]', ']')}, got {got}. Give a tensor "
                "for each output, all with the same R."
            )
        lead = leads[0]
        rows = [x.reshape(*lead, s.numel()) for x, s in zip(aligned, shapes, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def _lead_of(cotangent: Any, shape: torch.Size) -> torch.Size | None:
    """The dimensions in front of an output's own, of which there are one or two."""
    count = cotangent.dim() - len(shape) if isinstance(cotangent, Tensor) else 0
    fits = count in (1, 2) and cotangent.shape[count:] == shape and cotangent.numel()
    return cotangent.shape[:count] if fits else None
