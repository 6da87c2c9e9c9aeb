"""The report of a made-up run: Markdown and a picture that say what the file says."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import studies
from benchmarks.report import page, picture
from benchmarks.report.page import write_report
from benchmarks.report.tables import escaped, markdown, of_case
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
    assert [path.name for path in written] == ["full.md", "full.svg"]
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
    return (folder / "full.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def svg(folder):
    return (folder / "full.svg").read_text(encoding="utf-8")


# --- the page ---


def test_the_page_needs_nothing_but_the_files_beside_it(text, folder):
    assert not ADDRESS.findall(text)
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert links == {"full.svg", "full-cpu.json", "budget-cpu.json"}
    assert all((folder / link).exists() for link in links)


def test_headings_go_down_one_step_at_a_time(text):
    levels = [len(heading) for heading in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_every_question_has_its_verdict(text, run):
    for question, asks in page.asked({"CPU": run}).items():
        assert text.count(escaped(asks)) == 2
        # in the table of all, and in its own chapter
        assert text.count(escaped(sentence(list(run.of(question))))) == 2


def test_every_failure_has_its_reason(text, run):
    for name, status in FAILURES.items():
        # in a row of each of the two cases
        row = rf"^\| (?:cnn|mlp), B=64 \| {re.escape(name)} \| {re.escape(escaped(status))} \|$"
        assert len(re.findall(row, text, re.MULTILINE)) == 2
    assert "<above>" not in text


def test_what_was_not_measured_is_said(text):
    assert text.lower().count("cuda") > 1
    assert "not measured" in text


def test_every_case_is_told_in_full(text, run):
    assert text.count("<details>") == text.count("</details>") == 3
    for record in run.cases.values():
        assert markdown(of_case(record)) in text


def test_exponents_are_fitted_and_counted(text):
    assert r"batch^2.50, counted batch^2.00" in text
    assert "TorchJD: batch^1.00" in text


def test_forecasts_are_held_against_what_was_measured(text, run):
    # those of auto are 1.3 times, those of reverse mode 2.5 times as long as the call took
    assert "Forecasts of seconds: 4 of 8 within a factor of 2 of what was measured." in text
    assert "Forecasts of peak bytes: 12 of 12 within a factor of 2" in text


def test_missed_targets_stand_out(text):
    lines = text.splitlines()
    assert any(line.endswith("| 0 of 3 | not measured | – |") for line in lines)
    assert any(line.endswith("| 4 of 4 | not measured | – |") for line in lines)
    targets = [line for line in lines if line.startswith(("| *NTK", "| *cnn, B", "| *mlp, B"))]
    assert sum("*missed*" in line for line in targets) == 5
    assert not [line for line in lines if "missed" in line and "*missed*" not in line]
    assert sum(line.endswith("| met |") for line in lines) == 4


def test_other_files_are_told_in_short(text):
    assert "Jacobians under a memory budget" in text
    assert re.search(r"^\| \*jacfwd\* \|", text, re.MULTILINE)
    assert re.search(r"^\| jacrev \|", text, re.MULTILINE)


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
    assert b"not measured" not in b"".join(pairs[0])


def test_a_report_needs_a_results_file(tmp_path):
    with pytest.raises(ValueError, match=r"full-cpu.json or full-cuda.json must be in .* neither"):
        write_report(tmp_path / "full")


# --- tables ---


def rows_of(text, question):
    part = text.split(f"\n## {question}\n")[1].split("\n## ")[0].split("<details>")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in reversed(rows)}


def test_tables_have_the_numbers_of_the_file(text, run):
    checked = 0
    for question in ("crossover", "ntk"):
        rows = rows_of(text, question)
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
    (line,) = (
        line
        for line in markdown(of_case(run.cases["crossover/mlp 64, 4 → 256"])).splitlines()
        if line.startswith("| ") and AUTO in line
    )
    _, sign_and_name, ratio, time, rounds, peak, error, forecast, _ = line.split("|")
    assert sign_and_name.strip(" *") == f"★ {AUTO}"
    assert re.fullmatch(r" \*\*0\.\d+ \(0\.\d+–0\.\d+\)\*\* ", ratio)
    assert re.fullmatch(r" \*\*\d+ µs\*\* ", time)
    assert rounds.strip(" *") == "10"
    assert peak.strip(" *") == "9.1 kB"
    assert re.fullmatch(r" \*\*\de-0[78]\*\* ", error)
    assert re.fullmatch(r" \*\*\d+ µs, 9\.1 kB\*\* ", forecast)


def test_nothing_is_taken_for_markup(text):
    assert r"wrong: relative error 3.0e+00 \<above\> 1e-4" in text
    tags = r"</?(?:details|summary)>"
    assert not re.search(r"(?<!\\)<", re.sub(tags, "", text))


def test_rows_have_as_many_cells_as_headings(text):
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


# --- the picture ---


def test_the_picture_names_the_machine_and_what_is_shown(svg):
    texts = re.findall(r">([^<>]*)</text>", svg)
    assert "Some &lt;CPU&gt;, 1 thread, torch 2.13.0 (CPU, suite full)" in texts
    for question in ("params", "ntk"):
        assert f"{question}: time beside {JACREV}" in texts
    assert "the fastest way, and how many times faster" in texts
    assert any(text.startswith("A: ") for text in texts)
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
