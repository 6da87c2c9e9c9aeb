"""Everything that is measured: a question here is a chapter of the report."""

from __future__ import annotations

from benchmarks import buffers, curvature, functions, growth, kernels, loops, samples, second_order
from benchmarks.cases import Question

QUESTIONS: tuple[Question, ...] = (
    *functions.QUESTIONS,
    second_order.QUESTION,
    loops.QUESTION,
    *samples.QUESTIONS,
    kernels.QUESTION,
    *curvature.QUESTIONS,
    buffers.QUESTION,
    growth.QUESTION,
)
