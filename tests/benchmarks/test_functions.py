"""The benchmark's questions on functions: who takes part, that they are right, what is claimed.

Cases run for one round each: here nobody is timed, everyone is judged. JAX is not installed where
these tests run, or need not be: its rows are looked at only in what the two worlds share.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

import jacfunc
from benchmarks.contestants.functions import AUTO, BY_HAND, plain
from benchmarks.problems import formulas, functions
from benchmarks.problems.functions import Function, FunctionAtPoints, judging, set_up
from benchmarks.problems.judge import looped, looped_twice
from benchmarks.questions import crossover, fields, hessians, loops
from jacfunc._measuring.results import WrongAnswerError
from tests.benchmarks.once import learnt, measured

QUESTIONS = tuple(file.QUESTION for file in (crossover, fields, hessians, loops))
CASES = {f"{question.name}/{case.name}": case for question in QUESTIONS for case in question.cases}
SOME = (
    "crossover/mlp 64, 16 → 16, float64",
    "fields/heat, 8² → 8²",
    "fields/attention, 4 × 8 → 4 × 8",
    "hessians/rosenbrock, 16",
    "hessians/logistic regression, 64",
)
EXPANDED = "autograd expanded, backward once"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*SOME, *(name for name, case in CASES.items() if case.is_quick)])
def test_everyone_gives_the_right_answer_or_says_why_not(name: str, device: str) -> None:
    for contestant, result in measured(learnt(CASES[name]), device).items():
        if result.family == "JAX":
            assert result.ok or result.status.startswith(("not installed: ", "unsupported: "))
        elif contestant == EXPANDED and "mlp" not in name:
            assert result.status == "unsupported: NotImplementedError: the function takes no batch"
        else:
            assert result.ok, (contestant, result.status)
            assert result.error is not None
            assert result.peak_bytes


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_quick])
def test_a_judge_can_be_sent_to_another_process(name: str) -> None:
    """Answers are judged in a process of its own."""
    problem = CASES[name].setup(CPU)
    judge = pickle.loads(pickle.dumps(CASES[name].check(problem)))
    derive = looped_twice if name.startswith("hessians") else looped
    assert judge(derive(problem.func, problem.x)) < 1e-4


def test_names_are_unique() -> None:
    assert len(CASES) == sum(len(question.cases) for question in QUESTIONS)
    for case in CASES.values():
        names = [contestant.name for contestant in case.contestants]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_each_question_can_be_answered(question) -> None:
    for case in question.cases:
        names = {contestant.name for contestant in case.contestants}
        asked_for = {name for w in case.wanted for name in (w.of, *w.others)}
        assert {question.ours, case.baseline} | asked_for <= names
    assert any(case.is_quick for case in question.cases)


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_the_sizes_that_it_claims(name: str) -> None:
    case = CASES[name]
    problem = case.setup(CPU)
    assert len(problem.points) == case.sizes.get("calls", 1)
    for point in problem.points:
        assert point.numel() == case.sizes["inputs"]
        assert str(point.dtype) == f"torch.{case.dtype}"
        assert problem.func(point).numel() == case.sizes["outputs"]
        assert problem.func(point).dtype == point.dtype


def test_a_case_has_the_same_numbers_every_time() -> None:
    case = CASES["loops/robot arm, 6 → 3"]
    one, two = case.setup(CPU), case.setup(CPU)
    assert all(map(torch.equal, one.points, two.points))
    assert torch.equal(one.func(one.x), two.func(two.x))
    # a loop over one and the same point could be answered from memory
    assert not torch.equal(one.points[0], one.points[1])


def twice(problem: FunctionAtPoints):
    return lambda x: 2 * looped(problem.func, x)


def transposed(problem: FunctionAtPoints):
    return lambda x: looped(problem.func, x).mT


def undefined(problem: FunctionAtPoints):
    return lambda x: looped(problem.func, x) * torch.nan


@pytest.mark.parametrize(
    ("way", "status"),
    [
        (twice, "wrong: relative error 1.0e+00"),
        (transposed, "wrong: derivative has shape (4, 16), not (16, 4)"),
        (undefined, "wrong: relative error nan"),
    ],
)
def test_a_wrong_answer_is_seen(way, status: str) -> None:
    case = CASES["crossover/mlp 64, 4 → 16"]
    cheats = plain("cheats", "rival", way)
    results = measured(replace(case, contestants=(cheats,), baseline="cheats"), "cpu")
    assert results["cheats"].status == status
    assert results["cheats"].time is None


def test_single_precision_is_not_enough_for_a_double_answer() -> None:
    case = CASES["crossover/mlp 64, 16 → 16, float64"]
    problem = case.setup(CPU)
    judge, answer = case.check(problem), looped(problem.func, problem.x)
    assert judge(answer) < 1e-14
    with pytest.raises(WrongAnswerError, match=r"relative error \d\.\de-0[678]"):
        judge(answer.float())


def test_the_judge_knows_a_derivative_in_closed_form() -> None:
    cube = Function(lambda draw: (lambda x: x**3, draw(5)))
    problem = set_up(cube, torch.float32, 1, CPU)
    assert judging(looped, problem)(torch.diag(3 * problem.x**2)) < 1e-6
    quartic = Function(lambda draw: (lambda x: (x**4).sum(), draw(5)))
    problem = set_up(quartic, torch.float32, 1, CPU)
    assert judging(looped_twice, problem)(torch.diag(12 * problem.x**2)) < 1e-6


def test_a_loop_answers_with_its_last_point() -> None:
    case = CASES["loops/mlp 64, 4 → 4"]
    problem = case.setup(CPU)
    judge = case.check(problem)
    assert judge(jacfunc.jacrev(problem.func)(problem.points[-1])) < 1e-5
    with pytest.raises(WrongAnswerError, match="relative error"):
        judge(jacfunc.jacrev(problem.func)(problem.points[0]))


def test_forecasts_stand_beside_what_was_measured() -> None:
    results = measured(CASES["crossover/mlp 64, 16 → 16"], "cpu")
    for name in (*BY_HAND, AUTO):
        result = results[name]
        assert result.forecast_seconds is not None
        assert result.forecast_seconds > 0
        assert result.forecast_bytes == pytest.approx(result.peak_bytes, rel=0.1)


def test_a_batch_gives_what_its_samples_give() -> None:
    function = functions.mlp(5, 3, 64)
    draw = partial(formulas.drawing, torch.float64)
    func, x = function.make(draw())
    points = torch.stack([x, -x])
    expected = torch.stack([func(point) for point in points])
    torch.testing.assert_close(function.batched(draw())(points), expected)


@pytest.mark.parametrize(
    "make",
    [
        partial(formulas.mlp, 6, 3, 8),
        partial(formulas.orbit, 3),
        partial(formulas.energy, 12),
        partial(formulas.curve, 12),
        partial(hessians.rosenbrock, 12),
        loops.arm,
    ],
)
def test_both_worlds_have_the_same_function(make) -> None:
    import numpy as np

    func, x = make(formulas.drawing(torch.float64))
    draw = formulas.drawing(torch.float64)
    # numpy's names and operators are those of jax.numpy
    other, _ = make(lambda *shape: draw(*shape).numpy(), np)
    assert other(x.numpy()) == pytest.approx(func(x).numpy())
