"""The same derivative again and again: what is left once Python is out of the way."""

from functools import partial

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.compiled import (
    COMPILED,
    EAGER,
    JAX,
    contestants,
    each,
    in_turn,
    one,
)
from benchmarks.contestants.functions import case
from benchmarks.problems import formulas
from benchmarks.problems.functions import mlp, portable

BESIDE_JAX = Wanted(COMPILED, "time ÷", 1.25, (JAX,))
SIDES = ((4, 4), (64, 64), (256, 256), (4, 256), (256, 4))


def perceptron(inputs: int, outputs: int) -> Case:
    wanted = (BESIDE_JAX, Wanted(COMPILED, "time ÷", 0.12, (EAGER,)))
    return case(
        f"mlp 64, {inputs} → {outputs}",
        mlp(inputs, outputs, 64),
        {"inputs": inputs, "outputs": outputs, "width": 64},
        contestants=contestants(one("jacobian"), one("jacrev" if outputs <= inputs else "jacfwd")),
        baseline=EAGER,
        wanted=wanted if inputs == outputs else wanted[:1],
        is_quick=(inputs, outputs) == (64, 64),
    )


def samples(name: str, make: object, size: tuple[int, int], count: int) -> Case:
    return case(
        f"{name}, {count} samples",
        portable(partial(formulas.each, count, make)),
        {"inputs": size[0], "outputs": size[1], "batch": count},
        contestants=contestants(each("jacfwd")),
        baseline=EAGER,
        derivative=in_turn,
        is_quick=(name, count) == ("arm of seven joints", 4096),
        wanted=(Wanted(COMPILED, "time ÷", 1.3, (JAX,)),),
    )


QUESTION = Question(
    "compiled",
    "The same derivative again and again: what does a compiler save?",
    COMPILED,
    (
        *(perceptron(*sides) for sides in SIDES),
        *(samples("arm of seven joints", formulas.arm, (7, 6), count) for count in (1, 4096)),
        *(samples("three bodies", formulas.bodies, (18, 18), count) for count in (1, 4096)),
    ),
)
