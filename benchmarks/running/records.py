"""The file of a run: where it was made, and what came out, case by case; never half written."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 2
"""Of the file; another one is not read."""

Record = dict[str, Any]
"""What :func:`benchmarks.cases.as_record` gives, and how the case was measured."""


@dataclass
class Run:
    """A suite on a device: a record a case, by ``question/case``.

    A record also has ``took`` (seconds of the whole case), ``load`` (when it began) and ``commit``.
    """

    suite: str
    environment: Mapping[str, Any]
    rivals: Mapping[str, str | None]
    cases: dict[str, Record]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The run that a file holds.

        Raises:
            ValueError: it is not such a file.
        """
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
