"""The verdict of one question, in one sentence."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.running.records import Record
from benchmarks.verdicts import intervals


def sentence(records: Sequence[Record]) -> str:
    """The verdict of one question, about its ``ours``: how often it wins, by what, who else."""
    ours = records[0]["ours"]
    contested = [record for record in records if intervals.is_contested(record)]
    won = [intervals.winners(record) for record in contested]
    count = sum(ours in names for names in won)
    cases = f"{len(contested)} case{'s' * (len(contested) != 1)}"
    first = f"{ours} is the fastest or ties with it in {count} of {cases}"
    first = first if contested else f"{ours} has no rival here"
    others = Counter(names[0] for names in won if names and ours not in names)
    more = _growth(records, ours), _elsewhere(others), _in_jax(contested)
    parts = first + _beside_other(contested), *more
    return "; ".join(filter(None, parts)) + "."


def _elsewhere(others: Counter[str]) -> str:
    """Who wins where ours does not, and of several how often: the first three."""
    if len(others) < 2:
        return "".join(f"elsewhere {name} wins" for name in others)
    parts = [f"{name} in {count}" for name, count in others.most_common(3)]
    return f"elsewhere the fastest is {', '.join(parts)}"


def _beside_other(records: Sequence[Record]) -> str:
    """Times of ours, and of whom: of one contestant, or of several in one word."""
    other, times = intervals.ratios(records)
    if not times:
        return ""
    middle, low, high = map(intervals.number, (statistics.median(times), min(times), max(times)))
    return f", at {middle} of the time of {other}{f' ({low} to {high})' * (len(times) > 1)}"


def _in_jax(records: Iterable[Record]) -> str:
    """Where a derivative that is written in JAX and compiled beats the fastest in PyTorch."""
    faster = asked = 0
    for record in records:
        names = [r["contestant"] for r in record["results"] if r["family"] == intervals.JAX]
        won = intervals.winners(record)
        ratios = [intervals.beside(record, name, won[0]) for name in names if won]
        faster += any(r is not None and intervals.verdict(r) == "faster" for r in ratios)
        asked += any(ratios)
    return f"compiled by JAX, {faster} of {asked} are faster still" if faster else ""


def _growth(records: Sequence[Record], ours: str) -> str:
    """The power of each axis by which the time of ours grows."""
    axes = dict.fromkeys(record["axis"] for record in records if record["axis"])
    exponents = {axis: intervals.exponent(records, ours, axis) for axis in axes}
    powers = [f"{axis}^{power:.2f}" for axis, power in exponents.items() if power is not None]
    return f"its time grows as {', '.join(powers)}" if powers else ""
