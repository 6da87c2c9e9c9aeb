"""What is to be run, and the file of what came out; it is never half written."""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks.cases import Case, Question, by_key

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_json = partial(json.dumps, ensure_ascii=False)
FORMAT = 2  # of the file; another one is not read
Record = dict[str, Any]
"""What :func:`benchmarks.cases.as_record` gives, with ``took`` in seconds, ``load``, ``commit``."""


@dataclass
class Run:
    """A suite on a device: a record a case, by ``question/case``."""

    suite: str
    environment: Mapping[str, Any]
    rivals: Mapping[str, str | None]
    cases: dict[str, Record]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The run that a file holds."""
        body = read(path)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(
                f"{path}: it must be a run of the suite in format {FORMAT}, got another file. "
                "Make one: python -m benchmarks run."
            )
        return cls(body["suite"], body["environment"], body["rivals"], body["cases"])

    def write(self, path: Path) -> None:
        """Write the file at once: a run that is killed meanwhile leaves the file that was there."""
        head: Record = {"format": FORMAT, "suite": self.suite}
        head |= {"environment": self.environment, "rivals": self.rivals}
        lines = [f" {_json(name)}: {_json(value)}" for name, value in head.items()]
        # a line a case: a diff shows which were measured anew
        cases = ",\n".join(f"  {_json(key)}: {_json(case)}" for key, case in self.cases.items())
        replace(path, "{\n" + ",\n".join([*lines, f' "cases": {{\n{cases}\n }}\n}}\n']))

    def of(self, question: str) -> Iterator[Record]:
        """The cases of a question, in the order of the table."""
        return (case for case in self.cases.values() if case["question"] == question)


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def replace(path: Path, text: str) -> None:
    """Write a text beside the file first, then put it in the file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partly")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


TABLE = "benchmarks.questions:QUESTIONS"


@dataclass(frozen=True)
class Suite:
    """Which cases are run, or which part of them, and how."""

    of: Callable[[Case], Case | None]
    effort: float = 1.0  # by which the effort of a case is multiplied
    is_apart: bool = True  # a process for each contestant


SUITES = {
    "quick": Suite(lambda case: case if case.is_quick else None, effort=0.5),
    "full": Suite(lambda case: case),
    "hand": Suite(lambda case: case.by_hand, is_apart=False),
}
LIMIT = 300.0
"""Seconds of one step of one contestant: it prepares and answers twice, or makes a round."""


@dataclass(frozen=True)
class Order:
    """What is to be run, and where it is written."""

    suite: str
    device: str
    output: Path
    only: str = ""  # part of the names of cases
    resume: bool = False  # what the file has is not run again
    again: str = ""  # part of the names of cases that are, nevertheless
    processes: int = 1  # measure each case in turn: a layout of memory is one process's
    limit: float = LIMIT  # seconds of one step of one contestant
    table: str = TABLE  # where the questions are, ``module:NAME``

    @property
    def path(self) -> Path:
        """The results file: a part has one of its own, unless it adds to the whole."""
        part = "-part" if self.only and not self.resume else ""
        return self.output / f"{self.suite}-{self.device}{part}.json"

    def chosen(self) -> dict[str, tuple[Question, Case]]:
        """The suite's cases in the order of the table."""
        cases, of = by_key(questions(self.table)).items(), SUITES[self.suite].of
        return {key: (question, some) for key, (question, case) in cases if (some := of(case))}

    def wants(self, key: str, run: Run) -> bool:
        """Is a case to be run, beside what the file has?"""
        is_missing = key not in run.cases or (bool(self.again) and self.again in key)
        return is_missing and self.only in key


def questions(table: str) -> tuple[Question, ...]:
    """The questions at ``module:NAME``."""
    module, _, name = table.partition(":")
    return tuple(getattr(importlib.import_module(module), name))
