"""The basis: the identity matrix, a chunk of rows at a time."""

from __future__ import annotations

import pytest
import torch

from jacfunc._assembly.basis import basis, numel

SHAPES = {
    "one_vector": [(4,)],
    "scalar": [()],
    "scalars": [(), ()],
    "mixed": [(2, 2), (), (3,)],
    "with_empty": [(0,), (2,), (0, 3), (1,)],
    "only_empty": [(0,)],
    "no_leaves": [],
}
CHUNKS = [None, 1, 2, 3, 5, 100]


def leaves_of(shapes: list[tuple[int, ...]], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(shape, dtype=torch.float64, device=device) for shape in shapes)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", SHAPES)
def test_chunks_put_together_are_the_identity(
    name: str, chunk_size: int | None, device: str
) -> None:
    leaves = leaves_of(SHAPES[name], device)
    total = numel(leaves)
    rows = [
        torch.cat([seed.flatten(1) if seed.dim() > 1 else seed[:, None] for seed in chunk], 1)
        for chunk in basis(leaves, chunk_size)
        if leaves
    ]
    whole = torch.cat(rows) if rows else torch.zeros(0, 0, dtype=torch.float64, device=device)
    assert torch.equal(whole, torch.eye(total, dtype=torch.float64, device=device))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_no_chunk_is_larger_than_asked(chunk_size: int, device: str) -> None:
    leaves = leaves_of([(2, 2), (), (3,)], device)
    sizes = [chunk[0].shape[0] for chunk in basis(leaves, chunk_size)]
    assert max(sizes) <= chunk_size
    assert sum(sizes) == 8
    # all but the last are full: no sweep is wasted
    assert all(size == chunk_size for size in sizes[:-1])


def test_seeds_have_shape_dtype_and_device_of_their_leaf(device: str) -> None:
    leaves = (
        torch.ones(2, 3, dtype=torch.float32, device=device),
        torch.ones((), dtype=torch.float64, device=device),
    )
    for chunk in basis(leaves, 4):
        for seed, leaf in zip(chunk, leaves, strict=True):
            assert seed.shape[1:] == leaf.shape
            assert (seed.dtype, seed.device) == (leaf.dtype, leaf.device)


def test_chunks_are_made_when_they_are_asked_for() -> None:
    # a full basis would be 4 TB
    (huge,) = leaves_of([(1,)], "cpu")
    chunks = basis((huge.expand(10**6),), 2)
    assert next(chunks)[0].shape == (2, 10**6)


def test_leaves_without_entries_have_one_chunk_of_no_seeds(device: str) -> None:
    chunks = list(basis(leaves_of([(0, 2)], device), 3))
    assert [chunk[0].shape for chunk in chunks] == [(0, 0, 2)]


def test_numel_counts_all_leaves() -> None:
    assert numel(leaves_of([(2, 3), (), (0,)], "cpu")) == 7
    assert numel(()) == 0
