"""Which cases belong into one picture, and which of many are shown at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import ANSWER
from benchmarks.verdicts.intervals import Record

SHOWN = 6
"""Panels of a kind that stand on the page at once; the rest are folded away."""
LEAST_CELLS = 4


def kind(record: Record) -> str:
    """The name of a case without its numbers: ``mlp, B=8`` and ``mlp, B=64`` are alike."""
    return re.sub(r"\d+(?:[.,]\d+)*[kM²]?", "#", record["case"])


def grouped(records: Iterable[Record], *, but: Sequence[str]) -> list[list[Record]]:
    """Records that differ in the sizes named ``but`` alone, and in numbers of their names."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        fixed = {name: n for name, n in record["sizes"].items() if name not in (*but, ANSWER)}
        fixed = {} if record["axis"] else fixed
        groups.setdefault((kind(record), record["dtype"], str(fixed)), []).append(record)
    return list(groups.values())


def shown_first(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """A few of every kind, the last of each being the largest; and all the others."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(kind(record), []).append(record)
    chosen: list[str] = []
    for turn in range(len(records)):
        chosen += [alike[p]["case"] for alike in kinds.values() if (p := _turn(turn, alike)) >= 0]
    few = set(chosen[:SHOWN])
    first = [record for record in records if record["case"] in few]
    return first, [record for record in records if record["case"] not in few]


def _turn(number: int, alike: Sequence[Record]) -> int:
    """Last, first, middle, then in order; below zero when all had their turn."""
    count = len(alike)
    order = list(dict.fromkeys([count - 1, 0, count // 2, *range(count)]))
    return order[number] if number < count else -1


def crossovers(records: Iterable[Record]) -> list[list[Record]]:
    """Cases that fill a grid of inputs and outputs."""
    sized = [r for r in records if {"inputs", "outputs"} <= r["sizes"].keys() and not r["axis"]]
    return [
        group
        for group in grouped(sized, but=("inputs", "outputs"))
        if len(group) >= LEAST_CELLS and all(len(side) > 1 for side in sides(group))
    ]


def sides(records: Iterable[Record]) -> tuple[list[int], list[int]]:
    """Numbers of inputs and of outputs, the smallest first."""
    sizes = [record["sizes"] for record in records]
    inputs, outputs = ({size[name] for size in sizes} for name in ("inputs", "outputs"))
    return sorted(inputs), sorted(outputs)


def growths(records: Iterable[Record]) -> list[list[Record]]:
    """Cases along one axis, smallest first; networks apart where each has sizes enough."""
    by_axis: dict[str, list[Record]] = {}
    for record in records:
        if record["axis"] in record["sizes"]:
            by_axis.setdefault(record["axis"], []).append(record)
    found = []
    for axis, along in by_axis.items():
        apart = [group for group in grouped(along, but=(axis,)) if _grows(group, axis)]
        whole = [along] if _grows(along, axis) else []
        groups = apart or whole
        found += [sorted(group, key=lambda record: record["sizes"][axis]) for group in groups]
    return found


def _grows(records: Sequence[Record], axis: str) -> bool:
    return len({record["sizes"][axis] for record in records}) > 1


def titled(records: Sequence[Record]) -> str:
    """What the names of a group have in common."""
    names = [record["case"] for record in records]
    whole = names[0]
    while not all(name.startswith(whole) for name in names):
        whole = whole[:-1]
    # half a number would be a wrong one
    return re.sub(r"[\d.]+$", "", whole).rstrip(" ,=→×(") or records[0]["question"]
