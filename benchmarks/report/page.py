"""The report as one page that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path

from benchmarks.report import grids, pictures, tables
from benchmarks.report.grouping import crossovers, growths, kind, shown_first
from benchmarks.report.older import Summary
from benchmarks.report.pictures import BRIGHT, DARK, NAMES, PAGE
from benchmarks.report.tables import Runs, Table
from benchmarks.verdicts.intervals import Record
from benchmarks.verdicts.sentences import sentence

STYLE = Path(__file__).with_name("style.css")
ABOUT = (
    "Ways to take Jacobians, Hessians and products of them with PyTorch, compared: the strategies "
    "of jacfunc, torch.func, torch.autograd by hand, and other libraries. Every answer is checked "
    "against float64 before the clock starts. Times are ratios of interleaved rounds, on a CPU in "
    "a process for each; memory is counted in a call of its own; whoever fails stays in the table "
    "with the reason. Differences within 5 %, or that cannot be told from none, are ties."
)
MANY_TARGETS = 8
Links = Mapping[str, Path]
"""The raw data, by device."""


def as_html(suite: str, runs: Runs, raw: Links, older: Sequence[Summary]) -> str:
    """The whole file."""
    title = f"jacfunc: the {suite} benchmark"
    ids = count()
    sections = [_environment(runs, raw), _verdicts(runs)]
    sections += [_question(name, asks, runs, ids) for name, asks in tables.questions(runs).items()]
    sections += [_forecasts(runs, ids), _older(older)]
    head = tag("h1", escape(title)) + tag("p", escape(ABOUT), cls="about")
    body = tag("header", head + _navigation(runs, older)) + tag("main", "".join(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_css()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _css() -> str:
    """The sheet, behind the colors that it and the pictures share."""
    light, dark = (
        "".join(f"{NAMES[color]}: {value}; " for color, value in theme.items())
        for theme in (BRIGHT, DARK)
    )
    colors = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    return colors + STYLE.read_text(encoding="utf-8")


def tag(name: str, inside: str = "", cls: str = "", **attributes: str) -> str:
    """An element; ``inside`` is markup already."""
    named = {"class": cls} if cls else {}
    told = "".join(f' {key}="{escape(value)}"' for key, value in {**named, **attributes}.items())
    return f"<{name}{told}>{inside}</{name}>\n"


def slug(name: str) -> str:
    return "q-" + re.sub(r"\W+", "-", name)


def _navigation(runs: Runs, older: Sequence[Summary]) -> str:
    links = [("environment", "Environment"), ("verdicts", "Verdicts")]
    links += [(slug(name), name) for name in tables.questions(runs)]
    links += [("forecasts", "Forecasts")] + ([("older", "More")] if older else [])
    items = "".join(tag("li", tag("a", escape(text), href=f"#{to}")) for to, text in links)
    return tag("nav", tag("ul", items), **{"aria-label": "Sections"})


def _section(name: str, heading: str, inside: str) -> str:
    return tag("section", tag("h2", escape(heading)) + inside, id=name)


def _environment(runs: Runs, raw: Links) -> str:
    links = ", ".join(tag("a", escape(path.name), href=path.name).strip() for path in raw.values())
    shown = table(tables.environment(runs), cls="prose") + tag("p", f"Raw data: {links}.")
    return _section("environment", "Environment and load", shown)


def _verdicts(runs: Runs) -> str:
    return _section("verdicts", "Verdicts", table(tables.verdicts(runs), cls="prose"))


def _older(older: Sequence[Summary]) -> str:
    parts = [
        tag("h3", escape(found.title))
        + tag("p", f"{escape(found.says)} {tag('a', found.path.name, href=found.path.name)}")
        + table(found.table)
        for found in older
    ]
    return _section("older", "Measured by commands of their own", "".join(parts)) if parts else ""


# --- a question ---


def _question(name: str, asks: str, runs: Runs, ids: Iterator[int]) -> str:
    parts = [tag("p", escape(asks), cls="asks")]
    for device, run in runs.items():
        records = tables.of(run, name)
        heading = tag("h3", escape(device)) if len(runs) > 1 else ""
        if records:
            parts.append(heading + _answered(records, ids))
        else:
            parts.append(tag("p", f"{escape(device)}: {tables.ABSENT}."))
    return _section(slug(name), name, "".join(parts))


def _answered(records: Sequence[Record], ids: Iterator[int]) -> str:
    """Verdict, pictures, tables."""
    parts = [tag("p", tag("strong", escape(sentence(records))))]
    pairs = [(title, list(drawn)) for title, drawn in _pictures(records)]
    for title, drawn in pairs:
        if figures := "".join(_figure(svg, note, ids) for svg, note in drawn if svg):
            parts.append(tag("h4", title) + tag("div", figures, cls="panels"))
    _, rest = shown_first(records)
    if folded := "".join(_figure(pictures.pareto(r, PAGE), _uncounted(r), ids) for r in rest):
        summary = f"Time against memory in the other {len(rest)} cases"
        parts.append(_folded(summary, tag("div", folded, cls="panels")))
    baselines = ", ".join(dict.fromkeys(record["baseline"] for record in records))
    parts.append(tag("h4", escape(f"Time ÷ that of {baselines}")) + table(tables.ratios(records)))
    parts.append(tag("p", tables.MARKS, cls="note"))
    parts.append(_targets(records))
    parts += [_folded(f"All of {record['case']}", table(tables.case(record))) for record in records]
    return "".join(parts)


def _targets(records: Sequence[Record]) -> str:
    """Folded where there are many: the table of verdicts counts them."""
    shown = tables.targets(records)
    if len(shown.rows) <= MANY_TARGETS:
        return tag("h4", "Targets") + table(shown) if shown.rows else ""
    return _folded(f"Targets: {tables.met(records).text} met", table(shown))


Drawn = Iterable[tuple[str, str]]


def _pictures(records: Sequence[Record]) -> Iterator[tuple[str, Drawn]]:
    """Headings, and below each the pictures with a note."""
    for group in crossovers(records):
        note = (
            "Color and letter: the fastest in PyTorch; below, how many times faster than "
            f"{group[0]['baseline']}, or tie where it ties with it; +2: two others tie."
        )
        way = "Forward or reverse mode, and how many times faster than the other."
        maps = [(grids.crossover(group, PAGE), note), (grids.directions(group, PAGE), way)]
        yield "Who wins at which shape", maps
    first, _ = shown_first(records)
    yield "Time against memory", ((pictures.pareto(r, PAGE), _uncounted(r)) for r in first)
    dotted = "Exponents from three sizes on; dotted: the counted work, through the largest size."
    lines = [(pictures.scaling(_kind(group), group, PAGE), dotted) for group in growths(records)]
    yield "Growth", lines
    yield (
        "Beside the baseline, and the error",
        [
            (grids.overview("", records, PAGE), "The fastest of every family."),
            (pictures.errors(records, PAGE), "Against float64; hollow: computed in float64."),
        ],
    )
    yield "Estimate against measured", _foretold("", records)


def _kind(group: Sequence[Record]) -> str:
    return kind(group[0]).replace("#", "…")


def _uncounted(record: Record) -> str:
    """Who is not in the picture, though it has a time."""
    names = (r["contestant"] for r in record["results"] if r["time"] and not r["peak_bytes"])
    missing = ", ".join(names)
    return f"Not drawn, for want of a count of memory: {missing}." if missing else ""


def _foretold(title: str, records: Sequence[Record]) -> Drawn:
    note = "On the line the forecast is exact; the band is a factor of two."
    return [
        (pictures.forecasts(title, records, of, PAGE), note) for of in ("seconds", "peak_bytes")
    ]


def _forecasts(runs: Runs, ids: Iterator[int]) -> str:
    parts = []
    for device, run in runs.items():
        records = [] if run is None else list(run.cases.values())
        drawn = "".join(
            _figure(svg, note, ids) for svg, note in _foretold(f"{device}: ", records) if svg
        )
        missing = tables.ABSENT if run is None else "no forecasts"
        told = tag("p", f"{escape(device)}: {missing}.")
        parts.append(tag("div", drawn, cls="panels") if drawn else told)
    return _section("forecasts", "Estimate against measured, all questions", "".join(parts))


# --- elements ---


def _figure(svg: str, note: str, ids: Iterator[int]) -> str:
    """A picture whose ids no other picture on the page has."""
    if not svg:
        return ""
    mine = f"p{next(ids)}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mine}", svg)
    return tag("figure", svg + (tag("figcaption", escape(note)) if note else ""))


def _folded(summary: str, inside: str) -> str:
    return tag("details", tag("summary", escape(summary)) + inside)


def table(shown: Table, cls: str = "") -> str:
    """In a box of its own, which scrolls where the screen is narrow."""
    heads = "".join(
        tag("th", escape(text), cls="word" if n in shown.words else "", scope="col")
        for n, text in enumerate(shown.head)
    )
    rows = "".join(tag("tr", _cells(shown, row)) for row in shown.rows)
    whole = tag("thead", tag("tr", heads)) + tag("tbody", rows)
    scrolls = {"tabindex": "0", "role": "region", "aria-label": f"Table: {shown.head[0] or 'all'}"}
    return tag("div", tag("table", whole), cls=f"scroll {cls}".strip(), **scrolls)


SIGNS = {"wins": "★ ", "ties": "= "}


def _cells(shown: Table, row: Sequence[tables.Cell]) -> str:
    cells = []
    for n, cell in enumerate(row):
        text = escape(SIGNS.get(cell.mark, "") * (n == 0 or len(row[0].mark) == 0) + cell.text)
        cls = f"{'word' if n in shown.words else ''} {cell.mark}".strip()
        # where rows are stacked on a narrow screen, each cell says what it is
        told = {"data-head": shown.head[n]} if n else {"scope": "row"}
        cells.append(tag("td" if n else "th", text, cls=cls, **told))
    return "".join(cells)
