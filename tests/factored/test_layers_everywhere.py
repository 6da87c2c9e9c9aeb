"""Every function of the coverage battery, layer by layer: right, or refused where that is known."""

from __future__ import annotations

import pytest
import torch

import jacfunc
from jacfunc._errors import Refused
from jacfunc._trees.tree import flatten
from tests.house.test_coverage import FUNCTIONS, bound, copied, first_point, reseed, seeded

REFUSED = {
    *("torch_cond", "torch_while_loop", "torch_scan"),
    *("inner_autograd_grad", "inner_autograd_grad_of_copy"),
    *("inner_vjp", "inner_autograd_functional"),
}
"""Control flow that no mode may watch, and derivatives that the function takes itself."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_right_or_refused(name: str) -> None:
    kind = FUNCTIONS[name]
    func, args = seeded(bound(kind)), first_point(kind)
    reseed()
    try:
        expected = jacfunc.jacobian(func, kind.argnums, strategy="looped")(*copied(args))
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        pytest.skip("nothing to compare with: a loop of backward passes is refused, too")
    reseed()
    if name in REFUSED:
        with pytest.raises(Refused):
            jacfunc.jacobian(func, kind.argnums, strategy="structured")(*copied(args))
        return
    found = jacfunc.jacobian(func, kind.argnums, strategy="structured")(*copied(args))
    for mine, theirs in zip(flatten(found)[0], flatten(expected)[0], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8, equal_nan=True)
