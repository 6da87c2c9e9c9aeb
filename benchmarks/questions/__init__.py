"""Everything that the suite measures: a file a question, and each is a chapter of the report."""

from importlib import import_module

from benchmarks.cases import Question

FILES = (
    *("crossover", "fields", "hessians", "loops", "params", "inputs", "whole"),
    *("ntk", "norms", "ggn_diagonal", "ggn_product", "hvp", "laplacian", "buffer", "streams"),
    *("growth", "minsr", "compiled", "compiled_hvp", "compiled_ggn"),
)
QUESTIONS: tuple[Question, ...] = tuple(
    import_module(f"{__name__}.{file}").QUESTION for file in FILES
)
