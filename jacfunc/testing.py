"""Checks of Jacobians, of your functions and strategies, and forecasts that are always the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._calls import Derivation, FlatCall
from jacfunc._errors import Refused
from jacfunc._forecasting import known_machine
from jacfunc._linear_map import JacobianOperator
from jacfunc._planning import resolve
from jacfunc._types import Argnums, Blocks, Leaves
from jacfunc.strategies import Strategy, worded

__all__ = ["check_jacobian", "known_machine"]

API = "check_jacobian"
STEP = 6e-6  # about the cube root of float64's precision: best for central differences


def check_jacobian(
    func: Callable[..., Any],
    *args: Any,
    argnums: Argnums = 0,
    strategies: Sequence[str | Strategy] = ("reverse", "forward", "looped"),
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **kwargs: Any,
) -> dict[str, str]:
    """Checks a Jacobian: strategies against finite differences, and J against Jᵀ.

    ``(f(x + h e_j) - f(x - h e_j)) / 2h ≈ J e_j`` and ``⟨w, J v⟩ = ⟨Jᵀ w, v⟩``.

    Args:
        func: takes trees, returns a tree of tensors. It must be smooth around the point and give
            the same value for the same arguments.
        *args: the point, its floating tensors in float64.
        argnums: which positional arguments to differentiate.
        strategies: names or strategy objects to check.
        rtol: relative tolerance, to the largest entry of a block.
        atol: absolute tolerance.
        **kwargs: passed to ``func``.

    Returns:
        For each strategy ``"agrees"``, or ``"refused: …"`` with torch's or jacfunc's reason.

    Raises:
        AssertionError: naming the first leaf and entry that disagree.
        TypeError, ValueError: if the point is not in float64, or options do not fit.

    Cost:
        2N evaluations, the Jacobian by each strategy, one pushforward and one pullback.

    Example:
        >>> import torch
        >>> from jacfunc.testing import check_jacobian
        >>> check_jacobian(torch.sin, torch.ones(3, dtype=torch.float64))
        {'reverse': 'agrees', 'forward': 'agrees', 'looped': 'agrees'}
    """
    _check_options(strategies, {"rtol": rtol, "atol": atol})
    call = FlatCall(Derivation(API, func, argnums), args, kwargs)
    for primal in call.primals:
        if primal.dtype != torch.float64:
            raise TypeError(
                f"{API}: the point must be in float64, got {primal.dtype}. "
                "Finite differences in less cannot tell right from wrong; convert with .double()."
            )
    with torch.no_grad(), worded(API, "the function must be one that torch can differentiate"):
        trial = _Trial(call, JacobianOperator(call, call.primals), rtol, atol)
        trial.operator.rewind_generators()
        expected = _finite_differences(call, trial.operator)
        verdicts = {}
        for strategy in strategies:
            verdicts[_name(strategy)] = trial.judge(strategy, expected)
        if not any(verdict.startswith("refused") for verdict in verdicts.values()):
            trial.check_adjoint()
    return verdicts


def _check_options(strategies: Any, tolerances: dict[str, Any]) -> None:
    """Refuse what is no choice of strategies, and tolerances that nothing, or all, would meet."""
    if not isinstance(strategies, tuple | list):
        raise TypeError(
            f"{API}: strategies must be a tuple of names or strategies, got {strategies!r}. "
            "Write ('reverse',) for the only one."
        )
    if not strategies:
        raise ValueError(
            f"{API}: strategies must name at least one, got none. Leave it out for three."
        )
    for name, value in tolerances.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(
                f"{API}: {name} must be a number, got {type(value).__name__}. Try 1e-5."
            )
        if not 0 <= value < math.inf:
            raise ValueError(f"{API}: {name} must be 0 or more, and finite, got {value}. Try 1e-5.")


@dataclass(frozen=True)
class _Trial:
    """A call at its point, and how closely Jacobians must agree there."""

    call: FlatCall
    operator: JacobianOperator
    rtol: float
    atol: float

    def judge(self, strategy: str | Strategy, expected: Blocks) -> str:
        """``"agrees"``, or why torch refuses the strategy.

        Raises:
            AssertionError: if its blocks differ from the finite differences.
        """
        try:
            blocks = resolve(API, strategy, None).materialize(self.operator)
        except Refused as refusal:
            return f"refused: {refusal}"
        if not isinstance(blocks, tuple | list):
            raise TypeError(
                f"{API}: {_name(strategy)} must return a tuple of rows of blocks, got "
                f"{type(blocks).__name__}. Its materialize is wrong."
            )
        for i, (row, expected_row) in enumerate(zip(blocks, expected, strict=True)):
            for j, (block, reference) in enumerate(zip(row, expected_row, strict=True)):
                self._compare(_name(strategy), block.to(reference.dtype), reference, i, j)
        return "agrees"

    def check_adjoint(self) -> None:
        """Compare ⟨w, J v⟩ with ⟨Jᵀ w, v⟩ for random v and w."""
        tangents = tuple(torch.randn_like(primal) for primal in self.operator.primals)
        cotangents = tuple(torch.randn_like(out) for out in self.operator.outputs)
        pushed = _inner(cotangents, self.operator.pushforward(tangents))
        pulled = _inner(self.operator.pullback(cotangents), tangents)
        if abs(pushed - pulled) > self.atol + self.rtol * max(abs(pushed), abs(pulled), 1.0):
            raise AssertionError(
                f"{API}: pushforward and pullback must be adjoint, got <w, J v> = {pushed:.6g} "
                f"against <Jᵀ w, v> = {pulled:.6g}. One of the two is wrong for this function."
            )

    def _compare(self, name: str, block: Tensor, reference: Tensor, i: int, j: int) -> None:
        if block.shape != reference.shape:
            raise AssertionError(
                f"{API}: {name} must give blocks [*out, *in] of shape {tuple(reference.shape)}, "
                f"got {tuple(block.shape)}. Its materialize is wrong."
            )
        if block.numel() == 0:
            return
        error = (block - reference).abs().nan_to_num(nan=torch.inf)
        allowed = self.atol + self.rtol * reference.abs().max()
        if (error > allowed).any():
            entry = tuple(int(n) for n in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{API}: {name} and finite differences must agree, got {float(block[entry]):.6g} "
                f"against {float(reference[entry]):.6g} at entry {list(entry)} of the block of "
                f"{self.call.output_paths()[i]} by {self.call.input_paths()[j]}. "
                "Is func smooth there, and deterministic? If so, use another strategy."
            )


def _finite_differences(call: FlatCall, operator: JacobianOperator) -> Blocks:
    """Blocks ``[*out_i, *in_j]`` by central differences, column by column."""
    columns: list[list[list[Tensor]]] = [[[] for _ in operator.primals] for _ in operator.outputs]
    for j, primal in enumerate(operator.primals):
        for n in range(primal.numel()):
            above, below = (_shifted(call, operator, j, n, h) for h in (STEP, -STEP))
            for i, (plus, minus) in enumerate(zip(above, below, strict=True)):
                columns[i][j].append((plus - minus).double() / (2 * STEP))
    return tuple(
        tuple(
            torch.stack(columns[i][j], -1).view(out.shape + primal.shape)
            if columns[i][j]
            else out.new_empty(out.shape + primal.shape)
            for j, primal in enumerate(operator.primals)
        )
        for i, out in enumerate(operator.outputs)
    )


def _shifted(call: FlatCall, operator: JacobianOperator, j: int, n: int, step: float) -> Leaves:
    """The outputs with entry n of leaf j moved by a step."""
    primals = [primal.clone(memory_format=torch.contiguous_format) for primal in operator.primals]
    primals[j].view(-1)[n] += step
    operator.rewind_generators()
    outputs, _ = call(*primals)
    return outputs


def _inner(lefts: Leaves, rights: Leaves) -> float:
    return sum(float((a * b).sum()) for a, b in zip(lefts, rights, strict=True))


def _name(strategy: str | Strategy) -> str:
    return strategy if isinstance(strategy, str) else repr(strategy)
