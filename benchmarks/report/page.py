"""The report of a suite: Markdown and a picture, beside the results files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import studies
from benchmarks.report.picture import draw, machine
from benchmarks.report.tables import (
    MARKS,
    NOTHING,
    add,
    escaped,
    markdown,
    of_case,
    of_ratios,
    of_target,
    table,
)
from benchmarks.running.records import Record, Run, read, replace
from benchmarks.verdicts.intervals import exponent, find, slope
from benchmarks.verdicts.sentences import sentence

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
ABSENT = "not measured"
NEAR = 2
"""A forecast as near as by this factor is a good one."""

ABOUT = (
    "Ways to take Jacobians, Hessians and products of them with PyTorch, compared: the strategies "
    "of jacfunc, torch.func, torch.autograd by hand, and other libraries. Every answer is checked "
    "against float64 before the clock starts. Times are ratios of interleaved rounds, on a CPU in "
    "a process for each; memory is counted in a call of its own; whoever fails stays in the table "
    "with the reason. Differences within 5 %, or that cannot be told from none, are ties."
)
Runs = Mapping[str, Run | None]
"""By device as it is written in headings; None where it was not measured."""


def write_report(stem: Path) -> list[Path]:
    """Markdown and picture of ``STEM-cpu.json`` and ``STEM-cuda.json``; one may be missing.

    Raises:
        ValueError: both are missing, or one is no results file.
    """
    paths = {DEVICES[device]: stem.with_name(f"{stem.name}-{device}.json") for device in DEVICES}
    runs = {device: Run.read(path) if path.exists() else None for device, path in paths.items()}
    measured = {device: run for device, run in runs.items() if run is not None}
    if not measured:
        raise ValueError(
            f"report: {' or '.join(path.name for path in paths.values())} must be in "
            f"{stem.parent}, got neither. Make one: python -m benchmarks run."
        )
    page, picture = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.svg")
    data = [path.name for device, path in paths.items() if device in measured]
    replace(page, "\n\n".join([*_head(stem.name, data, runs), *_questions(runs), *_rest(stem)]))
    device, run = next(iter(measured.items()))
    draw(run, f"{machine(run)} ({device}, suite {stem.name})", picture)
    return [page, picture]


def _head(suite: str, data: Sequence[str], runs: Runs) -> Iterator[str]:
    yield f"# jacfunc: the {suite} benchmark"
    yield ABOUT
    yield f"![the headline]({suite}.svg)"
    yield f"Raw data: {', '.join(f'[{name}]({name})' for name in data)}."
    yield "## Environment and load"
    yield markdown(_environment(runs))
    yield "## Verdicts"
    yield markdown(_verdicts(runs))


def _rest(stem: Path) -> Iterator[str]:
    """What the studies beside the suite found: the tables of each file that is there."""
    for path in studies.files(stem.parent):
        body = read(path)
        where = body["environment"]
        yield f"## {body['kind']}"
        at = f"{where['device_name']}, {where['date'][:10]}, commit {where['commit']}"
        yield f"{escaped(at)}: [{path.name}]({path.name})"
        for shown in studies.STUDIES[body["kind"]].tables(body):
            yield escaped(f"{shown.title}. {shown.caption}")
            yield markdown(shown)
    yield ""


def asked(runs: Runs) -> dict[str, str]:
    """What each question asks, in the order of the table."""
    cases = [case for run in runs.values() if run is not None for case in run.cases.values()]
    return {case["question"]: case["asks"] for case in cases}


def _of(run: Run | None, question: str) -> list[Record]:
    return [] if run is None else list(run.of(question))


def _environment(runs: Runs) -> Table:
    """Machine, versions and load, a column a device."""
    columns = [{} if run is None else _where(run) for run in runs.values()]
    shown = table("", "", "", *runs, words=1 + len(runs))
    for name in dict.fromkeys(name for column in columns for name in column):
        add(shown, name.replace("_", " "), *(str(column.get(name, ABSENT)) for column in columns))
    return shown


def _where(run: Run) -> dict[str, Any]:
    """The environment of a run, and what its cases say of commits and load."""
    cases = list(run.cases.values())
    loads = [case["load"] for case in cases if case.get("load") is not None]
    return {
        **run.environment,
        "commit": ", ".join(dict.fromkeys(str(case.get("commit")) for case in cases)),
        "load_as_cases_began": f"{min(loads):.2f} to {max(loads):.2f}" if loads else NOTHING,
        "measured": f"{len(cases)} cases in {sum(case.get('took') or 0 for case in cases):.0f} s",
        "rivals": ", ".join(f"{name} {v}" for name, v in run.rivals.items() if v) or "none",
        "rivals_not_installed": ", ".join(n for n, v in run.rivals.items() if not v) or "none",
    }


def _verdicts(runs: Runs) -> Table:
    """A sentence a question and device, and how many targets are met."""
    heads = [f"{name}: {what}" for name in runs for what in ("verdict", "targets met")]
    shown = table("", "", "question", *heads, words=1 + len(heads))
    for question, asks in asked(runs).items():
        records = [_of(run, question) for run in runs.values()]
        cells = [(sentence(cases) if cases else ABSENT, met(cases)) for cases in records]
        add(shown, asks, *(cell for pair in cells for cell in pair))
    return shown


def met(records: Sequence[Record]) -> str:
    """How many targets are met, of how many."""
    targets = [target["met"] for record in records for target in record["targets"]]
    known = [is_met for is_met in targets if is_met is not None]
    open_ones = f", {len(targets) - len(known)} not decided here"
    counts = f"{sum(known)} of {len(known)}{open_ones if len(known) < len(targets) else ''}"
    return counts if targets else NOTHING


def _questions(runs: Runs) -> Iterator[str]:
    for name, asks in asked(runs).items():
        yield f"## {escaped(name)}"
        yield escaped(asks)
        for device, run in runs.items():
            yield f"### {device}"
            records = _of(run, name)
            yield from _answered(records) if records else [f"{ABSENT.capitalize()}."]


def _answered(records: Sequence[Record]) -> Iterator[str]:
    """Verdict, growth and forecasts in words, then tables: ratios, failures, targets, cases."""
    yield escaped(sentence(records))
    yield from map(escaped, [*_growths(records), *_forecasts(records)])
    baselines = ", ".join(dict.fromkeys(record["baseline"] for record in records))
    yield escaped(f"Time ÷ that of {baselines}. {MARKS}")
    yield markdown(of_ratios(records))
    failures = table("", "", "case", "who failed", "why", words=3)
    targets = table("", "", "case", "target", "wanted", "found", "", words=5)
    for record in records:
        for result in record["results"]:
            if result["status"] != "ok":
                add(failures, record["case"], result["contestant"], result["status"])
        for target in record["targets"]:
            style = "red" if target["met"] is False else ""
            add(targets, record["case"], *of_target(target), style=style)
    yield from (markdown(shown) for shown in (failures, targets) if shown.row_count)
    cases = "\n\n".join(f"{escaped(r['case'])}\n\n{markdown(of_case(r))}" for r in records)
    yield f"<details><summary>Every case</summary>\n\n{cases}\n\n</details>"


def _growths(records: Sequence[Record]) -> Iterator[str]:
    """Exponents of everyone along each axis, and those of the work that theory counts."""
    for axis in dict.fromkeys(record["axis"] for record in records if record["axis"]):
        along = [record for record in records if record["axis"] == axis]
        powers = []
        for name in dict.fromkeys(r["contestant"] for record in along for r in record["results"]):
            work = {r["sizes"][axis]: w for r in along if (w := (find(r, name) or {}).get("work"))}
            counted = f", counted {axis}^{slope([*work], [*work.values()]):.2f}" if work else ""
            power = exponent(along, name, axis)
            powers += [] if power is None else [f"{name}: {axis}^{power:.2f}{counted}"]
        yield f"Fitted exponents: {'; '.join(powers)}."


def _forecasts(records: Sequence[Record]) -> Iterator[str]:
    """How many forecasts are near what was measured."""
    results = [r for record in records for r in record["results"] if r["status"] == "ok"]
    for what in ("seconds", "peak_bytes"):
        values = [
            r["peak_bytes"] if what != "seconds" else (r["time"] or {}).get("median")
            for r in results
        ]
        forecasts = [(r["forecast"] or {}).get(what) for r in results]
        pairs = zip(forecasts, values, strict=True)
        shares = [forecast / value for forecast, value in pairs if forecast and value]
        if shares:
            near = sum(1 / NEAR <= share <= NEAR for share in shares)
            of = f"{near} of {len(shares)} within a factor of {NEAR}"
            yield f"Forecasts of {what.replace('_', ' ')}: {of} of what was measured."
