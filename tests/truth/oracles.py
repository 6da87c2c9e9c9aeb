"""Derivatives by the plainest means, to judge jacfunc by. Nothing here uses jacfunc.

Trees are taken apart by a small recursion of our own, so that neither jacfunc's nor optree's idea
of a tree can agree with itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def children(tree: Any) -> list[Any] | None:
    """The children of a container in order, or None for a leaf."""
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, tuple | list):
        return list(tree)
    if dataclasses.is_dataclass(tree):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


def with_children(tree: Any, new: Sequence[Any]) -> Any:
    """The same container around other children."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return type(tree)(zip(tree, new, strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*new)
    if isinstance(tree, tuple | list):
        return type(tree)(new)
    names = [field.name for field in dataclasses.fields(tree)]
    return type(tree)(**dict(zip(names, new, strict=True)))


def leaves_of(tree: Any) -> list[Any]:
    parts = children(tree)
    if parts is None:
        return [tree]
    return [leaf for part in parts for leaf in leaves_of(part)]


def tree_map(func: Callable[[Any], Any], tree: Any) -> Any:
    parts = children(tree)
    return func(tree) if parts is None else with_children(tree, [tree_map(func, p) for p in parts])


def is_real_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def float_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(tree) if is_real_tensor(leaf)]


def place(tree: Any, values: Sequence[Any]) -> Any:
    """The tree with a value at each floating leaf and None at every other."""
    rest = iter(values)
    return tree_map(lambda leaf: next(rest) if is_real_tensor(leaf) else None, tree)


def picked(args: tuple[Any, ...], argnums: int | tuple[int, ...]) -> Any:
    """What argnums names: one argument, or a tuple of them."""
    return args[argnums] if isinstance(argnums, int) else tuple(args[n] for n in argnums)


def on_picked(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """``func`` as a function of what argnums names, all else constant."""

    def of_picked(chosen: Any) -> Any:
        full = list(args)
        if isinstance(argnums, int):
            full[argnums] = chosen
        else:
            for n, arg in zip(argnums, chosen, strict=True):
                full[n] = arg
        return func(*full, **(kwargs or {}))

    return of_picked


def _graph(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    kwargs: Mapping[str, Any] | None,
) -> tuple[Any, list[Tensor], Any]:
    """The chosen arguments, their floating leaves requiring grad, and the output."""
    chosen = tree_map(
        lambda x: x.detach().clone().requires_grad_() if is_real_tensor(x) else x,
        picked(args, argnums),
    )
    # clones, so that func may write into its input
    inner = tree_map(lambda x: x.clone() if is_real_tensor(x) else x, chosen)
    with torch.enable_grad():
        output = on_picked(func, args, argnums, kwargs)(inner)
    return chosen, float_leaves(chosen), output


def _gradients(scalar: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
    """One row: zeros where the scalar does not depend on a leaf."""
    if not scalar.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(
        scalar, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(grads, leaves, strict=True)
    ]


def _rows(out: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Blocks ``[*out, *in]`` of one output, a row at a time."""
    rows = [_gradients(entry, leaves, create_graph) for entry in out.reshape(-1).unbind()]
    blocks = []
    for j, leaf in enumerate(leaves):
        shape = out.shape + leaf.shape
        dtype = torch.promote_types(out.dtype, leaf.dtype)
        stacked = torch.stack([row[j] for row in rows]) if rows else leaf.new_empty(0)
        blocks.append(stacked.reshape(shape).to(dtype))
    return blocks


def looped_jacobian(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...] = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Output tree of input trees of blocks, by ``torch.autograd.grad`` a row at a time."""
    chosen, leaves, output = _graph(func, args, argnums, kwargs)
    blocks = [_rows(out, leaves) for out in float_leaves(output)]
    return place(output, [place(chosen, row) for row in blocks])


def looped_hessian(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...] = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Output tree of input trees of input trees of blocks, by two loops of autograd.grad."""
    chosen, leaves, output = _graph(func, args, argnums, kwargs)

    def second(first: Tensor) -> Any:
        return place(chosen, _rows(first, leaves))

    firsts = [_rows(out, leaves, create_graph=True) for out in float_leaves(output)]
    return place(output, [place(chosen, [second(block) for block in row]) for row in firsts])


def finite_differences(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...] = 0,
    kwargs: Mapping[str, Any] | None = None,
    step: float = 1e-6,
) -> Any:
    """The same tree by central differences: no derivative of torch's is involved."""
    chosen = picked(args, argnums)
    point = float_leaves(chosen)

    def evaluate(j: int, k: int, shift: float) -> Any:
        moved = [leaf.detach().clone() for leaf in point]
        moved[j].view(-1)[k] += shift
        fresh = iter(moved)
        inner = tree_map(lambda x: next(fresh) if is_real_tensor(x) else x, chosen)
        with torch.no_grad():
            return on_picked(func, args, argnums, kwargs)(inner)

    centre = on_picked(func, args, argnums, kwargs)(
        tree_map(lambda x: x.detach().clone() if is_real_tensor(x) else x, chosen)
    )
    outs = [out.detach() for out in float_leaves(centre)]
    blocks = [[out.new_zeros((*out.shape, leaf.numel())) for leaf in point] for out in outs]
    for j, leaf in enumerate(point):
        for k in range(leaf.numel()):
            above = float_leaves(evaluate(j, k, step))
            below = float_leaves(evaluate(j, k, -step))
            for i, (up, down) in enumerate(zip(above, below, strict=True)):
                blocks[i][j][..., k] = (up - down) / (2 * step)
    shaped = [
        [block.reshape(out.shape + leaf.shape) for block, leaf in zip(row, point, strict=True)]
        for row, out in zip(blocks, outs, strict=True)
    ]
    return place(centre, [place(chosen, row) for row in shaped])


def leaf_pairs(got: Any, want: Any, path: str = "result") -> Iterator[tuple[str, Any, Any]]:
    """Leaves side by side; asserts that both trees have the same types and keys, in order."""
    got_parts, want_parts = children(got), children(want)
    if want_parts is None or got_parts is None:
        assert (got_parts is None) == (want_parts is None), (
            f"{path}: {type(got).__name__} against {type(want).__name__}"
        )
        yield path, got, want
        return
    assert type(got) is type(want), f"{path}: {type(got).__name__}, not {type(want).__name__}"
    if isinstance(want, Mapping):
        assert list(got) == list(want), f"{path}: keys {list(got)}, not {list(want)}"
    assert len(got_parts) == len(want_parts), f"{path}: {len(got_parts)} children"
    for k, (a, b) in enumerate(zip(got_parts, want_parts, strict=True)):
        yield from leaf_pairs(a, b, f"{path}[{k}]")


def assert_same(
    got: Any, want: Any, *, rtol: float = 1e-9, atol: float = 1e-10, dtype: bool = True
) -> None:
    """Same tree, shapes, dtypes, and values to rounding."""
    for path, a, b in leaf_pairs(got, want):
        if not isinstance(b, Tensor):
            assert type(a) is type(b), f"{path}: {type(a).__name__}, not {type(b).__name__}"
            assert a == b, f"{path}: {a!r}, not {b!r}"
            continue
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, check_dtype=dtype, msg=lambda text, at=path: f"{at}: {text}"
        )
