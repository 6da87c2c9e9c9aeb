"""Everything that is measured: a question here is a chapter of the report."""

from __future__ import annotations

from benchmarks.cases import Question
from benchmarks.questions import buffer as buffers
from benchmarks.questions import crossover as functions
from benchmarks.questions import ggn_diagonal as curvature
from benchmarks.questions import growth, loops
from benchmarks.questions import hessians as second_order
from benchmarks.questions import ntk as kernels
from benchmarks.questions import params as samples

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
