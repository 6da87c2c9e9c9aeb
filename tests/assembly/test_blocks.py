"""Chunks of rows and columns become blocks."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import jacfunc
from jacfunc._assembly.blocks import columns_to_blocks, rows_to_blocks, stack

OUT_SHAPES = [(2, 2), (), (3,), (0,)]
IN_SHAPES = [(), (4,), (1, 2), (0, 2)]


def sample(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def size(leaves: tuple[Tensor, ...]) -> int:
    return sum(leaf.numel() for leaf in leaves)


def matrix_of(blocks: tuple, outputs: tuple, primals: tuple) -> Tensor:
    """The blocks laid side by side, by an indexing that is not theirs."""
    rows = [
        torch.cat([b.reshape(o.numel(), p.numel()) for b, p in zip(row, primals, strict=True)], 1)
        for row, o in zip(blocks, outputs, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("num_out", [1, 2, 4])
@pytest.mark.parametrize("num_in", [1, 2, 4])
def test_rows_and_columns_cut_the_same_blocks(num_out: int, num_in: int) -> None:
    outputs, primals = sample(OUT_SHAPES[:num_out]), sample(IN_SHAPES[:num_in])
    matrix = torch.randn(size(outputs), size(primals), dtype=torch.float64)
    by_input = matrix.split([p.numel() for p in primals], 1)
    rows = tuple(
        part.reshape(len(matrix), *p.shape) for part, p in zip(by_input, primals, strict=True)
    )
    by_output = matrix.T.split([o.numel() for o in outputs], 1)
    columns = tuple(
        part.reshape(matrix.shape[1], *o.shape) for part, o in zip(by_output, outputs, strict=True)
    )
    from_rows = rows_to_blocks(rows, outputs, primals)
    from_columns = columns_to_blocks(columns, outputs, primals)
    for (i, out), (j, primal) in itertools.product(enumerate(outputs), enumerate(primals)):
        assert from_rows[i][j].shape == out.shape + primal.shape
        assert torch.equal(from_rows[i][j], from_columns[i][j])
    assert torch.equal(matrix_of(from_rows, outputs, primals), matrix)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_have_the_promoted_dtype(out_dtype: torch.dtype, in_dtype: torch.dtype) -> None:
    outputs, primals = sample([(2,)], out_dtype), sample([(3,)], in_dtype)
    rows, columns = sample([(2, 3)], in_dtype), sample([(3, 2)], out_dtype)
    want = torch.promote_types(out_dtype, in_dtype)
    assert rows_to_blocks(rows, outputs, primals)[0][0].dtype == want
    assert columns_to_blocks(columns, outputs, primals)[0][0].dtype == want


def test_mixed_dtypes_are_promoted_block_by_block() -> None:
    outputs = (*sample([(2,)], torch.float32), *sample([(2,)], torch.float64))
    primals = (*sample([(1,)], torch.float32), *sample([(1,)], torch.bfloat16))
    rows = (*sample([(4, 1)], torch.float32), *sample([(4, 1)], torch.bfloat16))
    dtypes = [[block.dtype for block in row] for row in rows_to_blocks(rows, outputs, primals)]
    assert dtypes == [[torch.float32] * 2, [torch.float64] * 2]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_stack_is_a_concatenation(step: int, requires_grad: bool) -> None:
    whole = sample([(7, 2), (7,)])
    for leaf in whole:
        leaf.requires_grad_(requires_grad)
    chunks = [tuple(leaf[start : start + step] for leaf in whole) for start in range(0, 7, step)]
    stacked = stack(iter(chunks), 7)
    for got, want in zip(stacked, whole, strict=True):
        assert torch.equal(got, want)
        assert got.requires_grad == requires_grad


def test_stacked_chunks_that_carry_a_graph_stay_differentiable() -> None:
    (x,) = sample([(6,)])
    x.requires_grad_()
    (stacked,) = stack([(x[:4] * 2,), (x[4:] * 3,)], 6)
    (gradient,) = torch.autograd.grad(stacked.sum(), x)
    assert gradient.tolist() == [2, 2, 2, 2, 3, 3]


def test_results_are_writable_even_where_autograd_expands() -> None:
    # the backward of sum hands out an expanded view, all of whose entries are one number
    jacobian = jacfunc.jacrev(lambda x: x.sum())(torch.zeros(3))
    jacobian[0] = 5
    assert jacobian.tolist() == [5, 1, 1]


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_blocks_share_no_memory_with_arguments(strategy: str) -> None:
    x = torch.ones(3)
    jacobian = jacfunc.jacobian(lambda x: x * x, strategy=strategy)(x)
    jacobian.zero_()
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_blocks_of_one_result_do_not_overlap(strategy: str) -> None:
    first, second = jacfunc.jacobian(lambda x: (x, x), strategy=strategy)(torch.ones(2))
    first.zero_()
    assert torch.equal(second, torch.eye(2))


@pytest.mark.parametrize("step", [1, 10])
def test_chunks_are_let_go_once_written(step: int) -> None:
    """Memory is the result and one chunk: a list of chunks would double it."""
    made: list[weakref.ref] = []
    alive: list[int] = []

    def chunks() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(100 // step):
            alive.append(sum(ref() is not None for ref in made))
            chunk = torch.zeros(step, 3)
            made.append(weakref.ref(chunk))
            yield (chunk,)
            del chunk

    (result,) = stack(chunks(), 100)
    assert result.shape == (100, 3)
    assert max(alive) == 0, f"{max(alive)} chunks were alive while the next was made"


def test_chunks_may_get_a_graph_after_the_first() -> None:
    """Rows of a linear output are constants, those of another one are not."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
            self.v = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.w + self.v * x, self.w.sin() * x, self.v * x

    module, x = Two(), torch.ones(2, dtype=torch.float64)
    matrix = jacfunc.module_jacobian(module, flat=True, strategy="reverse", create_graph=True)(x)
    slopes, one = torch.diag(module.w.detach().cos()), torch.eye(2, dtype=torch.float64)
    rows = [one, one], [slopes, 0 * one], [0 * one, one]
    torch.testing.assert_close(matrix.detach(), torch.cat([torch.cat(row, 1) for row in rows]))
    (slope,) = torch.autograd.grad(matrix.sum(), module.w)
    torch.testing.assert_close(slope, -module.w.detach().sin())
