"""What a run is asked to do: which cases, how, and where it is written."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case, Question, by_key
from benchmarks.running.records import Run

TABLE = "benchmarks.questions:QUESTIONS"

SUITES = {"quick": 0.5, "full": 1.0}
"""By which the effort of a case is multiplied."""

LIMIT = 300.0
"""Seconds of one step of one contestant: it prepares and answers twice, or makes a round."""


@dataclass(frozen=True)
class Order:
    """What is to be run, and where it is written.

    Args:
        only: part of the names of cases.
        resume: what the file has is not run again.
        again: part of the names of cases that are, nevertheless.
        processes: how many measure each case in turn; a layout of memory is one process's.
        planted: the factor by which jacfunc is made slower than it is.
        limit: seconds of one step of one contestant.
        table: where the questions are, ``module:NAME``.
    """

    suite: str
    device: str
    output: Path
    only: str = ""
    resume: bool = False
    again: str = ""
    processes: int = 1
    planted: float = 1.0
    limit: float = LIMIT
    table: str = TABLE

    @property
    def effort(self) -> float:
        """By which rounds and seconds are multiplied."""
        return SUITES[self.suite]

    @property
    def path(self) -> Path:
        """The results file: a part has one of its own, unless it adds to the whole."""
        part = "-part" if self.only and not self.resume else ""
        return self.output / f"{self.suite}-{self.device}{part}.json"

    def chosen(self) -> dict[str, tuple[Question, Case]]:
        """The suite's cases in the order of the table.

        Raises:
            ValueError: two cases have one name.
        """
        cases = by_key(questions(self.table))
        return {k: qc for k, qc in cases.items() if self.suite == "full" or qc[1].is_quick}

    def wants(self, key: str, run: Run) -> bool:
        """Is a case to be run, beside what the file has?"""
        is_missing = key not in run.cases or (bool(self.again) and self.again in key)
        return is_missing and self.only in key


def questions(table: str) -> tuple[Question, ...]:
    """The questions at ``module:NAME``."""
    module, _, name = table.partition(":")
    table_of_questions: tuple[Question, ...] = getattr(importlib.import_module(module), name)
    return table_of_questions
