"""Blocks of a Jacobian that come one after the other, beside the whole at once."""

from functools import partial
from typing import Any

from torch import Tensor, cat

import jacfunc
from benchmarks.cases import BEST, Question, Wanted
from benchmarks.problems.judge import Answer, reference
from benchmarks.problems.networks import HIGH, case, parts
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

WHOLE, WAYS = "jacfunc, the whole J", ("rows", "params", "samples")
EVERY = 97  # of so many entries one is kept: to read all would take as long as to write them


def some(block: Tensor) -> Tensor:
    return block.flatten(2)[..., ::EVERY].clone()


def whole(problem: Problem) -> Run:
    model, images = parts(problem)
    derive = jacfunc.module_jacobian(model, per_sample=True)
    return lambda: {name: some(block) for name, block in derive(images).items()}


def streamed(by: Any, problem: Problem) -> Run:
    model, images = parts(problem)
    stream = jacfunc.stream_jacobian(model, by, per_sample=True)

    def run() -> Answer:
        kept: dict[str, list[Tensor]] = {}
        for at, block in stream(images):
            for name, part in [(at, block)] if by == "params" else block.items():
                kept.setdefault(name, []).append(some(part))
        return {name: cat(pieces, int(by == "rows")) for name, pieces in kept.items()}

    return run


def expected(problem: Problem) -> Answer:
    return {name: some(block) for name, block in reference(problem).items()}


CONTESTANTS: tuple[Contestant[Problem], ...] = (
    Contestant(WHOLE, "jacfunc", whole),
    *(Contestant(f"jacfunc, by {by}", "jacfunc", partial(streamed, by)) for by in WAYS),
)
WANTED = tuple(Wanted(f"jacfunc, by {by}", BEST, 1.5, (WHOLE,)) for by in WAYS)
QUESTION = Question(
    "streams",
    "What does it take to stream a Jacobian block by block, beside the whole at once?",
    "jacfunc, by params",
    (case(HIGH, 8, CONTESTANTS, expected, baseline=WHOLE, wanted=WANTED),),
)
