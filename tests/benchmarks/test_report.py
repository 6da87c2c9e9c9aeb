"""The report of a made-up run: a page and a picture that say what the file says."""

from __future__ import annotations

import json
import re
from html import escape as escaped
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import studies
from benchmarks.report import advice, page, picture
from benchmarks.report.page import write_report
from benchmarks.report.tables import as_html, of_case
from benchmarks.running.records import RESULTS, Run, read
from benchmarks.verdicts.intervals import beside, number, winners
from benchmarks.verdicts.sentences import sentence
from tests.benchmarks.report_sample import AUTO, FAILURES, JACREV, made_up

ADDRESS = re.compile(r"(?:https?:)?//[^\s\"'<>]+")


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
    assert [path.name for path in written] == ["full.html", "full.svg"]
    return folder


BUDGET = {
    "kind": "budget",
    "environment": {"device_name": "Some <CPU>", "date": "2026-01-02T03:04", "commit": "0123"},
    "target": 1.3,
    "results": [
        {"case": name, "unchunked": 10240, "budget": 1024, "taken": taken, "ratio": ratio}
        | {"best_chunk": 8, "seconds": 0.1}
        for name, taken, ratio in (("jacrev", 1000, 0.92), ("jacfwd", 2048, 1.08))
    ],
}


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "full.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def svg(folder):
    return (folder / "full.svg").read_text(encoding="utf-8")


# --- the page ---


def test_the_page_needs_nothing_but_the_files_beside_it(text, folder):
    assert not ADDRESS.findall(text)
    links = set(re.findall(r'(?:href|src)="([^"]+)"', text))
    assert links == {"full-cpu.json", "budget-cpu.json"}
    assert all((folder / link).exists() for link in links)


def test_headings_go_down_one_step_at_a_time(text):
    levels = [int(level) for level in re.findall(r"<h(\d)>", text)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_every_question_has_its_verdict(text, run):
    for question, asks in page.asked({"CPU": run}).items():
        said = escaped(sentence(list(run.of(question))))
        assert text.count(f"<summary><b>{escaped(asks)}</b><br>{said}") == 1


def test_every_failure_has_its_reason(text, run):
    for name, status in FAILURES.items():
        # before the table of each of the two cases
        assert text.count(escaped(f"{name}: {status}")) == 2
    assert "<above>" not in text


def test_what_was_not_measured_has_no_place(text):
    assert "cuda" not in text.lower()
    assert "not measured" not in text


def test_every_case_is_told_in_full(text, run):
    # a fold for each question with one for its cases, for the study, and for how it was measured
    assert text.count("<details>") == text.count("</details>") == 3 * 2 + 1 + 1
    for record in run.cases.values():
        assert as_html(of_case(record)) in text


def test_exponents_are_fitted_and_counted(text):
    assert "batch^2.50, counted batch^2.00" in text
    assert "TorchJD: batch^1.00" in text


def test_forecasts_are_held_against_what_was_measured(text, run):
    # those of auto are 1.3 times, those of reverse mode 2.5 times as long as the call took
    assert "Forecasts of seconds: 4 of 8 within a factor of 2 of what was measured." in text
    assert "Forecasts of peak bytes: 12 of 12 within a factor of 2" in text


def test_missed_targets_stand_out(text):
    assert " Targets met: 0 of 3." in text
    assert " Targets met: 4 of 4." in text
    rows = [line for line in text.splitlines() if line.startswith("<tr")]
    missed = [row for row in rows if "<td>missed</td>" in row]
    assert len(missed) == 5
    assert all(row.startswith("<tr class=bad><td>") for row in missed)
    assert sum("<td>met</td>" in row for row in rows) == 4


def test_other_files_are_told_in_short(text):
    assert "Jacobians under a memory budget" in text
    assert "<tr class=bad><td>jacfwd</td>" in text
    assert "<tr><td>jacrev</td>" in text


def test_the_committed_files_can_be_told():
    bodies = {path.name: read(path) for path in studies.files(RESULTS)}
    assert {"budget-cpu.json", "overhead-cpu.json"} <= bodies.keys()
    for body in bodies.values():
        assert all(table.row_count for table in studies.STUDIES[body["kind"]].tables(body))


# --- the same in, the same out ---


def test_the_same_file_gives_the_same_bytes(folder, tmp_path):
    small = Run.read(folder / "full-cpu.json")
    small.cases = {key: small.cases[key] for key in ("ntk/NTK, mlp, B=8", "ntk/NTK, mlp, B=64")}
    pairs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        small.write(tmp_path / name / "full-cpu.json")
        small.write(tmp_path / name / "full-cuda.json")
        pairs.append([path.read_bytes() for path in write_report(tmp_path / name / "full")])
    assert pairs[0] == pairs[1]
    # both devices are there
    assert pairs[0][0].count(b"<h3>CUDA</h3>") == pairs[0][0].count(b"<h3>CPU</h3>") == 1


def test_a_report_needs_a_results_file(tmp_path):
    with pytest.raises(ValueError, match=r"full-cpu.json or full-cuda.json must be in .* neither"):
        write_report(tmp_path / "full")


# --- tables ---


def cells_of(row):
    return [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]


def rows_of(text, asks):
    part = text.split(f"<b>{escaped(asks)}</b>")[1].split("</table>")[0]
    rows = [cells_of(row) for row in re.findall(r"<tr.*?</tr>", part)]
    return {row[0]: row[1:] for row in rows}


def test_tables_have_the_numbers_of_the_file(text, run):
    checked = 0
    for question in ("crossover", "ntk"):
        rows = rows_of(text, page.asked({"CPU": run})[question])
        names = rows["case"]
        for record in run.of(question):
            won = winners(record)
            cells = rows[record["case"]]
            for name, shown in zip(names, cells, strict=True):
                expected = number(beside(record, name, JACREV).mid)
                if name in won:
                    expected = f"= {expected}" if name != won[0] else f"★ {expected}"
                assert shown == expected
                checked += 1
    assert checked > 40


def test_the_table_of_a_case_has_what_was_measured(run):
    page = as_html(of_case(run.cases["crossover/mlp 64, 4 → 256"]))
    (line,) = (line for line in page.splitlines() if f"★ {AUTO}" in line)
    assert line.startswith("<tr class=best>")
    name, ratio, time, rounds, peak, error, forecast = cells_of(line)
    assert name == f"★ {AUTO}"
    assert re.fullmatch(r"0\.\d+ \(0\.\d+–0\.\d+\)", ratio)
    assert re.fullmatch(r"\d+ µs", time)
    assert rounds == "10"
    assert peak == "8.88 KiB"
    assert re.fullmatch(r"\de-0[78]", error)
    assert re.fullmatch(r"\d+ µs, 8\.88 KiB", forecast)


class Tags(HTMLParser):
    """Refuses a tag that is closed where it was not opened, and keeps the names of all."""

    def __init__(self):
        super().__init__()
        self.open, self.every = [], set()

    def handle_starttag(self, tag, attrs):
        self.every.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_is_taken_for_markup(text):
    assert "wrong: relative error 3.0e+00 &lt;above&gt; 1e-4" in text
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "above" not in tags.every
    assert "script" not in tags.every


def test_rows_have_as_many_cells_as_headings(text):
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        assert len({len(cells_of(row)) for row in re.findall(r"<tr.*?</tr>", table)}) == 1


# --- the first screen ---


def test_the_first_screen_says_what_to_take_when(text, run):
    first = text.split("<h2>")[0]
    items = [unescape(item) for item in re.findall("<li>(.*?)</li>", first)]
    assert items == list(advice.sentences(run))
    assert items[0] == (
        'Leave strategy="auto", the default: its time is at most 1.10 times that of the best '
        "strategy picked by hand in 4 of 4 cases."
    )
    assert items[1] == (
        'By hand, take "reverse", or "forward" where it is faster: in 1 of 4 shapes, from 64 '
        "outputs an input on."
    )
    assert any(item.startswith("For a neural tangent kernel take ntk") for item in items)


def test_the_map_has_the_fastest_strategy_of_each_shape(text):
    (shown,) = re.findall(r'<table class="?map"?>(.*?)</table>', text, re.DOTALL)
    rows = [cells_of(row) for row in re.findall(r"<tr.*?</tr>", shown)]
    assert rows[0][1:] == ["4", "256"]
    # the most outputs are above
    assert [row[0] for row in rows[1:]] == ["256", "4"]
    ways = [[cell.partition("<br>")[0] for cell in row[1:]] for row in rows[1:]]
    assert ways == [["forward", "reverse"], ["reverse", "reverse"]]


def test_wide_tables_scroll_by_themselves(text):
    tables = text.count("<table>")
    assert tables == text.count("<div class=wide><table>")
    assert ".wide { max-width: 100%; overflow-x: auto;" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


# --- the picture ---


def test_the_picture_names_the_machine_and_what_is_shown(svg):
    texts = re.findall(r">([^<>]*)</text>", svg)
    assert "Some &lt;CPU&gt;, 1 thread, torch 2.13.0 (CPU, suite full)" in texts
    for question in ("params", "ntk"):
        assert f"{question}: time beside {JACREV}" in texts
    assert {"NTK, mlp, B=64", "cnn, B=64", "jacfunc", "rival"} <= set(texts)


def test_the_picture_needs_nothing_from_elsewhere(svg):
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)", svg)
    assert links
    assert all("".join(link).startswith("#") for link in links)
    assert "<script" not in svg
    assert "@import" not in svg


# --- parts ---


def test_cases_that_fill_a_grid_are_one_panel(run):
    grid = picture.shapes(run.cases.values())
    assert len(grid) == 4
    assert {record["sizes"]["inputs"] for record in grid} == {4, 256}
    assert {record["sizes"]["outputs"] for record in grid} == {4, 256}
    assert picture.shapes(run.of("ntk")) == []


def test_cases_of_many_samples_are_shown(run):
    assert [record["case"] for record in picture.many(list(run.of("ntk")))] == ["NTK, mlp, B=64"]
    assert len(picture.many(list(run.of("crossover")))) == 4
