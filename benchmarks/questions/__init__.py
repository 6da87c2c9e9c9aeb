"""Everything that the suite measures: a file a question, and each is a chapter of the report."""

from benchmarks.cases import Question
from benchmarks.questions import (
    buffer,
    crossover,
    fields,
    ggn_diagonal,
    ggn_product,
    growth,
    hessians,
    inputs,
    loops,
    ntk,
    params,
    whole,
)  # fmt: skip

QUESTIONS: tuple[Question, ...] = tuple(
    file.QUESTION
    for file in (
        *(crossover, fields, hessians, loops, params, inputs, whole),
        *(ntk, ggn_diagonal, ggn_product, buffer, growth),
    )
)
