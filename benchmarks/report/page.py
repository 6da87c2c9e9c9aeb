"""The report of a suite: a page of HTML, and a picture for the README, beside the results files."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape as escaped
from pathlib import Path
from string import Template

from benchmarks import studies
from benchmarks.report import advice, tables
from benchmarks.report.picture import draw, machine, shapes
from benchmarks.report.tables import in_tag, said
from benchmarks.running.records import Record, Run, read, replace
from benchmarks.verdicts.intervals import exponent, find, slope
from benchmarks.verdicts.sentences import sentence

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
NEAR = 2  # a forecast as near as by this factor is a good one
ABOUT = (
    "Ways to take Jacobians and Hessians with PyTorch, compared. Every answer is checked against "
    "float64 before the clock starts. Times are ratios of rounds in turns, on a CPU in a process "
    "for each; memory is counted in a call of its own; whoever fails stays, with the reason."
)
PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def write_report(stem: Path) -> list[Path]:
    """Page and picture of ``STEM-cpu.json`` and ``STEM-cuda.json``; one may be missing."""
    paths = {name: stem.with_name(f"{stem.name}-{device}.json") for device, name in DEVICES.items()}
    runs = {device: Run.read(path) for device, path in paths.items() if path.exists()}
    if not runs:
        raise ValueError(
            f"report: {' or '.join(path.name for path in paths.values())} must be in "
            f"{stem.parent}, got neither. Make one: python -m benchmarks run."
        )
    page, picture = stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.svg")
    links = ", ".join(_link(paths[device]) for device in runs)
    about = [said(ABOUT), *map(_environment, runs.values()), in_tag("p", f"Raw data: {links}.")]
    parts = [
        in_tag("h1", "jacfunc: which strategy, and when?"),
        *_first_screen(runs),
        in_tag("h2", "By question"),
        *(_question(name, runs) for name in asked(runs)),
        *_studies(stem.parent),
        _folded("How it was measured", about),
    ]
    replace(page, PAGE.substitute(suite=stem.name, body="\n".join(parts)))
    device, run = next(iter(runs.items()))
    draw(run, f"{machine(run)} ({device}, suite {stem.name})", picture)
    return [page, picture]


def asked(runs: Mapping[str, Run]) -> dict[str, str]:
    """What each question asks, in the order of the page."""
    cases = [case for run in runs.values() for case in run.cases.values()]
    return {case["question"]: case["asks"] for case in cases}


def _first_screen(runs: Mapping[str, Run]) -> Iterator[str]:
    """Of each device: what to take when, in sentences and a map of shapes."""
    for run in runs.values():
        yield in_tag("small", escaped(machine(run)))
        yield in_tag("ol", "".join(in_tag("li", escaped(x)) for x in advice.sentences(run)))
        yield from map(advice.shape_map, filter(None, [shapes(run.cases.values())]))


def _question(name: str, runs: Mapping[str, Run]) -> str:
    """A question with its verdicts, and all else below them."""
    head, parts = in_tag("b", escaped(asked(runs)[name])), list[str]()
    for device, run in runs.items():
        if records := list(run.of(name)):
            where = f"{device}: " * (len(runs) > 1)
            head += f"<br>{escaped(f'{where}{sentence(records)}{met(records)}')}"
            parts += [in_tag("h3", device)] * (len(runs) > 1) + [*_answered(records)]
    return _folded(head, parts)


def _folded(head: str, parts: Sequence[str]) -> str:
    return in_tag("details", "\n".join([in_tag("summary", head), *parts]))


def _link(path: Path) -> str:
    return f'<a href="{path.name}">{path.name}</a>'


def _environment(run: Run) -> str:
    """Machine, versions and rivals, and under which load the cases were measured."""
    cases = run.cases.values()
    loads = [case.get("load") or 0.0 for case in cases]
    commits = dict.fromkeys(str(case.get("commit")) for case in cases)
    seconds = sum(case.get("took") or 0 for case in cases)
    how = f"{len(cases)} in {seconds:.0f} s, at a load of {min(loads)} to {max(loads)}"
    facts = {**run.environment, **run.rivals, "commit": " ".join(commits), "cases": how}
    return said(", ".join(f"{name} {value or '(none)'}" for name, value in facts.items()) + ".")


def met(records: Sequence[Record]) -> str:
    """How many targets are met, of how many, if there are some."""
    targets = [target["met"] for record in records for target in record["targets"]]
    known = [is_met for is_met in targets if is_met is not None]
    others = f", {len(targets) - len(known)} not decided here" * (len(known) < len(targets))
    return f" Targets met: {sum(known)} of {len(known)}{others}." * bool(targets)


def _answered(records: Sequence[Record]) -> Iterator[str]:
    """Growth and forecasts in words, then tables: ratios, targets, and every case."""
    yield from map(said, [*_growths(records), *_forecasts(records)])
    baselines = ", ".join(dict.fromkeys(record["baseline"] for record in records))
    yield said(f"Time ÷ that of {baselines}. {tables.MARKS}")
    yield tables.as_html(tables.of_ratios(records))
    yield from map(tables.as_html, [tables.of_targets(records)] * bool(met(records)))
    shown = [tables.of_case(record) for record in records]
    parts = [(said(f"{case.title}. {case.caption}"), tables.as_html(case)) for case in shown]
    yield _folded("Every case", [part for pair in parts for part in pair])


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
        where = (str(body["environment"][name]) for name in ("device_name", "date", "commit"))
        parts = [in_tag("p", f"{escaped(', '.join(where))}: {_link(path)}")]
        for shown in studies.STUDIES[body["kind"]].tables(body):
            parts += [said(f"{shown.title}. {shown.caption}"), tables.as_html(shown)]
        yield _folded(in_tag("b", f"Study: {body['kind']}"), parts)
