"""The report of a made-up run: one page that needs nothing else, and says what the file says."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.report import grouping, older, tables, write_report
from benchmarks.report.pictures import BRIGHT, DARK
from benchmarks.running.records import RESULTS, Run
from benchmarks.verdicts.intervals import beside, number, winners
from benchmarks.verdicts.sentences import sentence
from jacfunc.compare._drawing import LIGHT
from jacfunc.compare._pareto import Point, pareto_svg
from tests.benchmarks.report_sample import FAILURES, JACREV, made_up

NO_END = {"meta", "link", "br", "hr", "img", "input"}
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
STANDS_ALONE = re.compile(r"(?:https?:)?//[^\s\"'<>]+")


class Reader(HTMLParser):
    """Elements that open and close, ids, links, headings, and all text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.text = [], [], [], []
        self.headings, self.unlabelled = [], 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in NO_END:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [value for name, value in attrs if name in ("href", "xlink:href")]
        self.links += re.findall(r"url\((.*?)\)", attributes.get("clip-path", ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "svg":
            self.unlabelled += not attributes.get("aria-label") or attributes.get("role") != "img"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in NO_END:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run():
    return made_up()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run):
    """A report without CUDA."""
    folder = tmp_path_factory.mktemp("results")
    run.write(folder / "full-cpu.json")
    (folder / "budget-cpu.json").write_text(json.dumps(BUDGET))
    written = write_report(folder / "full")
    assert [path.name for path in written] == ["full.html", "full.md", "full.svg"]
    return folder


BUDGET = {
    "environment": {"device_name": "Some <CPU>", "date": "2026-01-02T03:04", "commit": "0123"},
    "target": 1.3,
    "results": [
        {"case": "jacrev", "unchunked": 10240, "budget": 1024, "taken": 1000, "ratio": 0.92},
        {"case": "jacfwd", "unchunked": 10240, "budget": 1024, "taken": 2048, "ratio": 1.08},
    ],
}


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "full.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(html):
    reader = Reader()
    reader.feed(html)
    return reader


@pytest.fixture(scope="module")
def said(reader):
    return " ".join(" ".join(reader.text).split())


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "full.md").read_text(encoding="utf-8")


# --- the page ---


def test_elements_are_balanced(reader):
    assert reader.open == []


def test_the_page_needs_nothing_from_elsewhere(html):
    addresses = {found for found in STANDS_ALONE.findall(html) if found not in NAMESPACES}
    assert addresses == set()
    assert "<script" not in html
    assert "@import" not in html


def test_ids_are_unique_and_links_lead_to_them(reader, folder):
    assert len(reader.ids) == len(set(reader.ids))
    inner = [link[1:] for link in reader.links if link.startswith("#")]
    assert inner
    assert set(inner) <= set(reader.ids)
    outer = {link for link in reader.links if not link.startswith("#")}
    assert outer == {"full-cpu.json", "budget-cpu.json"}
    assert all((folder / link).exists() for link in outer)


def test_headings_go_down_one_step_at_a_time(reader):
    assert reader.headings[0] == 1
    assert reader.headings.count(1) == 1
    steps = zip(reader.headings, reader.headings[1:], strict=False)
    assert all(later - earlier <= 1 for earlier, later in steps)


def test_pictures_are_described(reader, html):
    assert reader.unlabelled == 0
    assert html.count("<svg") > 10


def test_pictures_follow_the_colors_of_the_page(html):
    assert "#0101" not in html.replace("&#", "")
    names = set(re.findall(r"var\((--c\w+)\)", html))
    assert names
    for name in names:
        # in the light and in the dark
        assert len(re.findall(rf"{name}: #", html)) == 2


def test_every_question_has_its_verdict(said, run):
    for question, asks in tables.questions({"CPU": run}).items():
        assert asks in said
        assert said.count(sentence(list(run.of(question)))) == 2


def test_every_failure_has_its_reason(said, html):
    for name, status in FAILURES.items():
        assert name in said
        # in a table of each of the two cases
        cell = f'class="word failed" data-head="status">{escape(status)}</td>'
        assert html.count(cell) == 2
    assert "<above>" not in html


def test_what_was_not_measured_is_said(said, markdown):
    for text in (said, markdown):
        assert text.lower().count("cuda") > 1
        assert "not measured" in text


def test_every_kind_of_picture_is_there(html):
    labels = [unescape(label) for label in re.findall(r'aria-label="([^"]*)"', html)]
    for start in (
        "Winners by inputs and outputs",
        "Whether jacfunc forward or jacfunc reverse",
        "Time against peak memory: mlp 64, 4 → 256",
        "Time against batch",
        "Fastest of every family",
        "Largest error",
        "Forecast against measured time",
        "Forecast against measured peak memory",
    ):
        assert any(label.startswith(start) for label in labels), start


def test_exponents_are_fitted_and_counted(html, run):
    assert "batch^2.50, counted batch^2.00" in html
    assert "TorchJD: batch^1.00" in html


def test_missed_targets_stand_out(html):
    assert re.search(r'<td class="word missed"[^>]*>0 of 3</td>', html)
    assert re.search(r'<td class="word"[^>]*>4 of 4</td>', html)


def test_other_files_are_told_in_short(html, said):
    assert "Jacobians under a memory budget" in said
    assert re.search(r'<th class="word missed"[^>]*>jacfwd</th>', html)
    assert re.search(r'<th class="word"[^>]*>jacrev</th>', html)


def test_the_committed_files_can_be_told():
    found = {summary.path.name: summary for summary in older.summaries(RESULTS)}
    assert {"regret-cpu.json", "budget-cpu.json", "overhead-cpu.json"} <= found.keys()
    assert all(summary.table.rows for summary in found.values())


# --- the same in, the same out ---


def test_the_same_file_gives_the_same_bytes(folder, tmp_path):
    small = Run.read(folder / "full-cpu.json")
    small.cases = {key: small.cases[key] for key in ("ntk/NTK, mlp, B=8", "ntk/NTK, mlp, B=64")}
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        small.write(tmp_path / name / "full-cpu.json")
        small.write(tmp_path / name / "full-cuda.json")
        found.append([path.read_bytes() for path in write_report(tmp_path / name / "full")])
    assert found[0] == found[1]
    # both devices are there
    assert b"not measured" not in b"".join(found[0])


def test_a_report_needs_a_results_file(tmp_path):
    with pytest.raises(ValueError, match=r"full-cpu.json or full-cuda.json must be in .* neither"):
        write_report(tmp_path / "full")


# --- Markdown ---


def rows_of(markdown, question):
    part = markdown.split(f"\n## {question}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_markdown_has_the_numbers_of_the_file(markdown, run):
    checked = 0
    for question in ("crossover", "ntk"):
        rows = rows_of(markdown, question)
        names = rows["case"]
        for record in run.of(question):
            won = winners(record)
            for name, shown in zip(names, rows[record["case"]], strict=True):
                expected = number(beside(record, name, JACREV).mid)
                if name in won:
                    expected = f"= {expected}" if name != won[0] else f"**★ {expected}**"
                assert shown == expected
                checked += 1
    assert checked > 40


def test_markdown_names_failures_and_files(markdown):
    for link in ("(full.html)", "(full.svg)", "(full-cpu.json)", "(budget-cpu.json)"):
        assert link in markdown
    assert r"wrong: relative error 3.0e+00 \<above\> 1e-4" in markdown
    assert not re.search(r"(?<!\\)<", markdown)


def test_rows_have_as_many_cells_as_headings(markdown):
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


# --- the headline ---


def test_the_headline_names_the_machine(folder):
    svg = (folder / "full.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg ")
    assert "Some &lt;CPU&gt;, 1 thread, torch 2.13.0" in svg
    assert {"params: time beside", "ntk: time beside"} <= {
        text.split(" torch")[0] for text in re.findall(r">([^<>]*)</text>", svg)
    }
    assert "var(" not in svg


# --- parts ---


def test_cases_are_grouped_by_all_but_what_varies(run):
    (grid,) = grouping.crossovers(run.cases.values())
    assert grouping.sides(grid) == ([4, 256], [4, 256])
    assert grouping.titled(grid) == "mlp 64"
    (along,) = grouping.growths(run.cases.values())
    assert [record["sizes"]["batch"] for record in along] == [8, 16, 64]


def test_a_few_cases_of_every_kind_come_first():
    records = [{"case": f"mlp, B={n}"} for n in range(20)] + [{"case": "gru"}]
    first, rest = grouping.shown_first(records)
    assert len(first) == grouping.SHOWN
    assert {"mlp, B=0", "mlp, B=19", "gru"} <= {record["case"] for record in first}
    assert sorted(r["case"] for r in first + rest) == sorted(r["case"] for r in records)


@pytest.mark.parametrize("count", [1, 3, 15])
def test_every_point_is_named(count):
    points = [
        Point(f"contestant {n} & co.", "rival", 0.01 * 1.01**n, 0.01, 0.02, 2**20 + n)
        for n in range(count)
    ]
    svg = pareto_svg("a title", points)
    # numbers beside the points, and names in a key, where the names alone would not fit
    names = [text.split("contestant")[0] for text in re.findall(r">([^<>]*)</text>", svg)]
    assert [names.count(str(n + 1)) for n in range(count)] == [int(count == 15)] * count
    for point in points:
        assert len(re.findall(f"{point.label.replace('&', '&amp;')}</text>", svg)) == 1
    assert svg == pareto_svg("a title", points)


def luminance(color):
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [BRIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_what_is_behind_it(theme):
    ink, grid, paper = (theme[f"#01010{n}"] for n in (1, 3, 4))
    pairs = [(color, paper) for name, color in theme.items() if name in LIGHT]
    pairs = [pair for pair in pairs if pair[0] not in (grid, paper)]
    pairs += [(ink, color) for name, color in theme.items() if name.startswith("#01012")]
    for text, behind in pairs:
        dark, light = sorted((luminance(text), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, behind)
