"""What to take when: a few sentences and a map of shapes, from the results of a run."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.report.tables import in_tag
from benchmarks.running.records import Record, Run
from benchmarks.verdicts.intervals import beside, number, ratios, rounds_of, time_of, verdict

WAYS = ("reverse", "forward", "looped", "structured")
AUTO, NEAR = "jacfunc auto", 1.10
TAKE = {
    "hessians": "For a Hessian take hessian",
    "params": "For Jacobians of every sample take module_jacobian(…, per_sample=True)",
    "ntk": "For a neural tangent kernel take ntk, which makes no Jacobian",
}


def sentences(run: Run) -> Iterator[str]:
    """When to take what, as far as it was asked: auto or a strategy by name, and which door."""
    if regrets := [ratio for case in run.cases.values() if (ratio := regret(case, AUTO))]:
        near = f"{sum(ratio <= NEAR for ratio in regrets)} of {len(regrets)} cases"
        most = f"its time is at most {NEAR:.2f} times that of the best strategy picked by hand"
        yield f'Leave strategy="auto", the default: {most} in {near}.'
    yield from _directions(run.of("crossover"))
    for name, take in TAKE.items():
        other, times = ratios(run.of(name))
        if times:
            yield f"{take}: {number(statistics.median(times))} of the time of {other}."


def _directions(records: Iterable[Record]) -> Iterator[str]:
    """Where forward mode is faster than reverse mode."""
    pairs = [(r["sizes"], beside(r, "jacfunc forward", "jacfunc reverse")) for r in records]
    judged = [(size["outputs"] / size["inputs"], verdict(i)) for size, i in pairs if i]
    if faster := [share for share, said in judged if said == "faster"]:
        where = f"{len(faster)} of {len(judged)} shapes, from {min(faster):g} outputs an input on"
        yield f'By hand, take "reverse", or "forward" where it is faster: in {where}.'


def regret(record: Record, chooser: str) -> float | None:
    """Time of a chooser ÷ that of the best of the strategies that are named."""
    ratio = beside(record, chooser, by_hand(record))
    return ratio.mid if ratio else None


def by_hand(record: Record) -> str:
    """The fastest of the strategies that are named, or nothing."""
    named = tuple(f"jacfunc {way}" for way in WAYS)
    names = [r["contestant"] for r in record["results"] if r["contestant"].startswith(named)]
    times = {name: time_of(record, name) for name in names if rounds_of(record, name)}
    return min(times, key=times.__getitem__, default="")


def shape_map(records: Sequence[Record]) -> str:
    """A map as HTML: for each number of inputs and outputs the fastest strategy, and its time."""
    sides = {(r["sizes"]["inputs"], r["sizes"]["outputs"]): r for r in records}
    inputs, outputs = (sorted({size[side] for size in sides}) for side in (0, 1))
    heads = "".join(in_tag("th", f"{size:,}") for size in inputs)
    rows = [in_tag("tr", f"<th>out ↑<br>in →</th>{heads}")]
    for size in reversed(outputs):
        cells = (_cell(sides.get((width, size))) for width in inputs)
        rows.append(in_tag("tr", in_tag("th", f"{size:,}") + "".join(cells)))
    about = f"The fastest strategy, and its time ÷ that of {records[0]['baseline']}."
    return in_tag("figure", in_tag("table", "".join(rows), "map") + in_tag("figcaption", about))


def _cell(record: Record | None) -> str:
    if record is None or not (name := by_hand(record)):
        return in_tag("td", "–")
    return in_tag("td", f"{name.split()[1]}<br>{number(time_of(record, name))}", name.split()[1])
