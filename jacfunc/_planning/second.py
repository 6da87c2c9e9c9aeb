"""In which order of modes a product with a Hessian is taken: measured, where it may matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jacfunc._linear_map import JacobianOperator
from jacfunc._planning.plan import Plan, ResultT
from jacfunc._planning.recall import by_memory
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
        return Plan(first.strategy, first.reason, 0.0, first.otherwise, second=_PULLED_PUSH)

    def run(self, operator: JacobianOperator, run: Callable[[Plan], ResultT]) -> ResultT:
        """What ``run`` returns for the order that was the fastest for calls of this kind."""
        return by_memory(
            self,
            operator.call_kind,
            lambda: (self.plan(operator), None),
            lambda plan, _: run(plan),
            time.process_time,
            warms_up=True,
        )


HESSIAN_PRODUCTS = HessianProducts()
"""The one planner: plans are looked up faster for an object that stays."""
