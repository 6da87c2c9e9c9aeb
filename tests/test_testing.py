"""The check that users run must find what is wrong, and say where."""

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc.testing import check_jacobian
from tests.kinds.problems import PROBLEMS

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


class WrongBackward(torch.autograd.Function):
    """x³, whose backward forgets the second entry."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad * torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype)


class WrongForward(torch.autograd.Function):
    """2 x, whose jvp says 3."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


def test_a_wrong_backward_is_named_by_leaf_and_entry():
    def func(tree):
        return {"cube": WrongBackward.apply(tree["x"]), "fine": tree["x"]}

    with pytest.raises(
        AssertionError,
        match=r"reverse and finite differences must agree, got 0 against 1\.47 at entry \[1, 1\] "
        r"of the block of output\['cube'\] by args\[0\]\['x'\]",
    ):
        check_jacobian(func, {"x": X})


def test_a_wrong_forward_rule_is_found():
    with pytest.raises(AssertionError, match="forward and finite differences must agree"):
        check_jacobian(WrongForward.apply, X)
    with pytest.raises(AssertionError, match="pushforward and pullback must be adjoint"):
        check_jacobian(WrongForward.apply, X, strategies=["reverse"])


def test_refusals_are_reported():
    verdicts = check_jacobian(lambda x: torch.cdist(x[None], torch.zeros_like(x)[None]), X)
    assert verdicts["reverse"] == verdicts["looped"] == "agrees"
    assert verdicts["forward"].startswith("refused: torch has no forward mode")


def test_a_strategy_of_ones_own_is_checked():
    class Transposed:
        def materialize(self, operator):
            blocks = jacfunc.Reverse().materialize(operator)
            return tuple(tuple(block.mT for block in row) for row in blocks)

        def __repr__(self):
            return "Transposed()"

    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    check_jacobian(lambda x: matrix @ x, X[:2], strategies=[jacfunc.Reverse(chunk_size=1)])
    with pytest.raises(AssertionError, match=r"Transposed\(\) and finite differences"):
        check_jacobian(lambda x: matrix @ x, X[:2], strategies=[Transposed()])
    with pytest.raises(AssertionError, match=r"must give blocks \[\*out, \*in\] of shape \(1, 2\)"):
        check_jacobian(lambda x: matrix[:1] @ x, X[:2], strategies=[Transposed()])


def test_dropout_is_checked_with_one_mask():
    torch.manual_seed(0)
    verdicts = check_jacobian(lambda x: nn.functional.dropout(x, 0.5) * x, X)
    assert set(verdicts.values()) == {"agrees"}


def test_the_point_must_be_in_float64():
    with pytest.raises(TypeError, match=r"the point must be in float64, got torch.float32"):
        check_jacobian(torch.sin, X.float())


@pytest.mark.parametrize(
    "name",
    [
        "tanh_matrix",
        "matrix_square",
        "softmax",
        "conv2d_input",
        "solve",
        "cdist",
        "dictionary",
        "empty_input",
    ],
)
def test_problems_agree(name):
    problems = {problem.name: problem for problem in PROBLEMS}
    problem = problems[name]
    args = problem.make_args("cpu", torch.float64)
    check_jacobian(problem.func, *args, argnums=problem.argnums)
