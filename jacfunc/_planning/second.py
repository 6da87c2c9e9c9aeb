"""In which order of modes a product with a Hessian is taken: measured, where it may matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.compiler import is_compiling

from jacfunc._linear_map import JacobianOperator
from jacfunc._planning.plan import Plan, ResultT, attempt
from jacfunc._planning.recall import by_memory
from jacfunc._torch import is_outermost
from jacfunc.strategies import Forward, Reverse, ReverseOverForward

WORTH = 2e-3
"""Seconds of a product from which it is worthwhile to look for a faster order."""

HESSIAN_PRODUCT = Plan(
    Reverse(),
    "reverse over reverse mode was the fastest of most networks",
    otherwise=(Forward(), ReverseOverForward()),
)
"""In which orders products are tried, where one graph serves all of them."""

_PULLED_PUSH = Plan(
    ReverseOverForward(),
    "torch's second backward pass of a convolution may be slow",
    WORTH,
    otherwise=(Reverse(), Forward()),
)


@dataclass(frozen=True)
class HessianProducts:
    """Plans products with Hessians, each with an evaluation of its own."""

    memory: None = None

    def plan(self, operator: JacobianOperator) -> Plan:
        """Reverse over reverse mode, with the order that may be faster where that takes long."""
        first = HESSIAN_PRODUCT
        if not all(primal.is_cpu for primal in operator.primals):
            return first  # an accelerator goes on after the clock has been read
        return Plan(first.strategy, first.reason, 0.0, first.otherwise, second=_PULLED_PUSH)

    def run(self, operator: JacobianOperator, run: Callable[[Plan], ResultT]) -> ResultT:
        """What ``run`` returns for the order that was the fastest for calls of this kind."""
        if is_compiling():
            return run(HESSIAN_PRODUCT)
        if not is_outermost():
            return attempt(HESSIAN_PRODUCT, run)[1]
        return by_memory(
            self,
            operator.call_kind,
            lambda: (self.plan(operator), None),
            lambda plan, _: run(plan),
            # a busy machine does not tell on the processor's time, but threads that wait do
            time.process_time if torch.get_num_threads() == 1 else time.perf_counter,
            warms_up=True,
        )


HESSIAN_PRODUCTS = HessianProducts()
"""The one planner: plans are looked up faster for an object that stays."""
