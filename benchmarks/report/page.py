"""The report of a suite: Markdown and a picture, beside the results files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import studies
from benchmarks.report import tables
from benchmarks.report.picture import draw, machine
from benchmarks.running.records import Record, Run, read, replace
from benchmarks.verdicts.intervals import exponent, find, slope
from benchmarks.verdicts.sentences import sentence

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
ABSENT = "not measured"
NEAR = 2  # a forecast as near as by this factor is a good one
ABOUT = (
    "Ways to take Jacobians and Hessians with PyTorch, compared. Every answer is checked against "
    "float64 before the clock starts. Times are ratios of rounds in turns, on a CPU in a process "
    "for each; memory is counted in a call of its own; whoever fails stays, with the reason."
)
Runs = Mapping[str, Run | None]  # by device as in headings; None where it was not measured


def write_report(stem: Path) -> list[Path]:
    """Markdown and picture of ``STEM-cpu.json`` and ``STEM-cuda.json``; one may be missing."""
    paths = {name: stem.with_name(f"{stem.name}-{device}.json") for device, name in DEVICES.items()}
    runs = {device: Run.read(path) if path.exists() else None for device, path in paths.items()}
    measured = {device: run for device, run in runs.items() if run is not None}
    if not measured:
        raise ValueError(
            f"report: {' or '.join(path.name for path in paths.values())} must be in "
            f"{stem.parent}, got neither. Make one: python -m benchmarks run."
        )
    page, picture = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.svg")
    data = ", ".join(f"[{paths[device].name}]({paths[device].name})" for device in measured)
    head = [f"# jacfunc: the {stem.name} benchmark", ABOUT, f"![the headline]({picture.name})"]
    parts = [*head, f"Raw data: {data}.", *_parts(runs), *_studies(stem.parent)]
    replace(page, "\n\n".join(parts) + "\n")
    device, run = next(iter(measured.items()))
    draw(run, f"{machine(run)} ({device}, suite {stem.name})", picture)
    return [page, picture]


def asked(runs: Runs) -> dict[str, str]:
    """What each question asks, in the order of the table."""
    cases = [case for run in runs.values() if run is not None for case in run.cases.values()]
    return {case["question"]: case["asks"] for case in cases}


def _parts(runs: Runs) -> Iterator[str]:
    """Environment, a table of all verdicts, and a chapter a question."""
    yield "## Environment and load"
    yield from (f"{device}: {_environment(run)}." for device, run in runs.items())
    yield "## Verdicts"
    heads = [f"{name}: {what}" for name in runs for what in ("verdict", "targets met")]
    verdicts = tables.table("", "", "question", *heads, words=1 + len(heads))
    chapters = []
    for name, asks in asked(runs).items():
        chapters += [f"## {tables.escaped(name)}", tables.escaped(asks)]
        cells = []
        for device, run in runs.items():
            records = [] if run is None else list(run.of(name))
            cells += [sentence(records) if records else ABSENT, met(records)]
            answers = _answered(records) if records else [f"{ABSENT.capitalize()}."]
            chapters += [f"### {device}", *answers]
        tables.add(verdicts, asks, *cells)
    yield tables.markdown(verdicts)
    yield from chapters


def _environment(run: Run | None) -> str:
    """Machine, versions and rivals, and under which load the cases were measured."""
    if run is None:
        return ABSENT
    cases = run.cases.values()
    loads = [case.get("load") or 0.0 for case in cases]
    commits = dict.fromkeys(str(case.get("commit")) for case in cases)
    seconds = sum(case.get("took") or 0 for case in cases)
    how = f"{len(cases)} in {seconds:.0f} s, at a load of {min(loads)} to {max(loads)}"
    facts = {**run.environment, **run.rivals, "commit": " ".join(commits), "cases": how}
    return tables.escaped(", ".join(f"{name} {value or '(none)'}" for name, value in facts.items()))


def met(records: Sequence[Record]) -> str:
    """How many targets are met, of how many."""
    targets = [target["met"] for record in records for target in record["targets"]]
    known = [is_met for is_met in targets if is_met is not None]
    others = f", {len(targets) - len(known)} not decided here" * (len(known) < len(targets))
    return f"{sum(known)} of {len(known)}{others}" if targets else tables.NOTHING


def _answered(records: Sequence[Record]) -> Iterator[str]:
    """Verdict, growth and forecasts in words, then tables: ratios, failures, targets, cases."""
    yield tables.escaped(sentence(records))
    yield from map(tables.escaped, [*_growths(records), *_forecasts(records)])
    baselines = ", ".join(dict.fromkeys(record["baseline"] for record in records))
    yield tables.escaped(f"Time ÷ that of {baselines}. {tables.MARKS}")
    yield tables.markdown(tables.of_ratios(records))
    failures = tables.table("", "", "case", "who failed", "why", words=3)
    for record in records:
        for result in record["results"]:
            if result["status"] != "ok":
                tables.add(failures, record["case"], result["contestant"], result["status"])
    both = failures, tables.of_targets(records)
    yield from (tables.markdown(shown) for shown in both if shown.row_count)
    yield "<details><summary>Every case</summary>"
    for record in records:
        yield tables.escaped(record["case"])
        yield tables.markdown(tables.of_case(record))
    yield "</details>"


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
    times = [(r["time"] or {}).get("median") for r in results]
    for what, values in ("seconds", times), ("peak_bytes", [r["peak_bytes"] for r in results]):
        pairs = zip([(r["forecast"] or {}).get(what) for r in results], values, strict=True)
        if shares := [forecast / value for forecast, value in pairs if forecast and value]:
            near = sum(1 / NEAR <= share <= NEAR for share in shares)
            of = f"{near} of {len(shares)} within a factor of {NEAR}"
            yield f"Forecasts of {what.replace('_', ' ')}: {of} of what was measured."


def _studies(folder: Path) -> Iterator[str]:
    """What the studies beside the suite found: the tables of each file that is there."""
    for path in studies.files(folder):
        body = read(path)
        yield f"## {body['kind']}"
        where = [body["environment"][name] for name in ("device_name", "date", "commit")]
        yield f"{tables.escaped(', '.join(where))}: [{path.name}]({path.name})"
        for shown in studies.STUDIES[body["kind"]].tables(body):
            yield tables.escaped(f"{shown.title}. {shown.caption}")
            yield tables.markdown(shown)
