"""The runner of the benchmark: a row for every fate, nothing lost, nothing run twice.

Cases run in real child processes, which really crash, hang and run out of memory.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.__main__ import STOPPED, main
from benchmarks.cases import Question, as_record, best
from benchmarks.report import tables
from benchmarks.report.progress import Watch
from benchmarks.running import processes, suite, worker
from benchmarks.running.processes import DEVICE_LOST
from benchmarks.running.records import Order, Run
from benchmarks.running.suite import CannotRunError
from jacfunc._measuring.results import Result, WrongAnswerError, pooled, summarize
from jacfunc._measuring.rounds import Contestant, Effort
from tests.benchmarks import table as benchmark_table
from tests.benchmarks.table import TRACE, error

ROOT = Path(__file__).parents[2]
PATIENCE = 60
"""Seconds after which a test no longer waits for what must come."""


class Seen:
    """A watch that remembers."""

    def __init__(self):
        self.expected, self.cases, self.turns = {}, [], set()

    def begin(self, expected):
        self.expected = dict(expected)

    def case(self, key):
        self.cases.append(key)

    def contestant(self, name):
        self.turns.add(name)

    def finished(self, key, record):
        assert self.cases[-1] == key == f"{record['question']}/{record['case']}"


def order(directory, name="HELD", **options):
    table = f"tests.benchmarks.table:{name}"
    return Order("quick", "cpu", directory, table=table, **options)


def run(directory, name="HELD", **options):
    seen = Seen()
    return suite.run_suite(order(directory, name, **options), seen), seen


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- every fate is a row ---


@pytest.fixture(scope="module")
def fates(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fates")
    return directory, *run(directory, "FATES", limit=2)


@pytest.fixture(scope="module")
def rows(fates):
    return {row["contestant"]: row for row in fates[1].cases["fates/all"]["results"]}


@pytest.mark.parametrize(
    ("contestant", "status"),
    [
        ("jacfunc", "ok"),
        ("segfault", "crashed: SIGSEGV"),
        ("killed", "crashed: SIGKILL, probably for lack of memory"),
        ("leaves", "crashed: exit code 3"),
        ("sleeps", "out of time"),
        ("hoards", "out of memory"),
        ("raises", "unsupported: NotImplementedError: not for squares"),
        ("absent", "not installed: No module named 'no_such_rival'"),
        ("wrong", "wrong: off by 12"),
        ("late", "crashed: SIGSEGV"),
        ("by hand", "ok"),
    ],
)
def test_every_fate_is_a_row(rows, contestant, status):
    assert rows[contestant]["status"] == status


def test_nobody_is_missing_and_the_order_is_that_of_the_table(rows):
    (case,) = benchmark_table.FATES[0].cases
    assert list(rows) == [contestant.name for contestant in case.contestants]


def test_the_others_are_measured_nevertheless(fates, rows):
    for name in ("jacfunc", "by hand"):
        assert len(rows[name]["seconds"]) >= 5
        assert rows[name]["error"] == 0
        assert rows[name]["peak_bytes"] == 4 * 4
    (target,) = fates[1].cases["fates/all"]["targets"]
    assert target["what"] == "times faster than by hand"
    assert target["met"]


def test_a_setup_that_fails_is_a_row_for_everyone_and_the_next_case_is_run(fates):
    none, after = (fates[1].cases[f"setups/{name}"]["results"] for name in ("none", "after it"))
    reason = "unsupported: setup: RuntimeError: nothing to be had"
    assert [row["status"] for row in none] == [reason, reason]
    assert [row["status"] for row in after] == ["ok", "ok"]


def test_the_quick_suite_has_the_quick_cases(fates, tmp_path):
    assert list(fates[1].cases) == ["fates/all", "setups/none", "setups/after it"]
    full = Order("full", "cpu", tmp_path, table="tests.benchmarks.table:FATES").chosen()
    assert list(full) == [*fates[1].cases, "full only/not quick"]


def test_the_watch_is_told_the_case_and_whose_turn_it_is(fates):
    seen = fates[2]
    assert seen.cases == list(seen.expected) == list(fates[1].cases)
    assert "sleeps" in seen.turns


def test_the_file_is_what_was_measured_and_does_not_name_the_machine(fates):
    directory, run, _ = fates
    path = directory / "quick-cpu.json"
    assert Run.read(path).cases == json.loads(json.dumps(run.cases))
    assert not list(directory.glob("*.partly"))
    text = path.read_text()
    for private in (socket.gethostname(), str(ROOT), str(Path.home())):
        assert f"{private}" not in text
    assert run.environment["threads"] == 1
    assert run.environment["memory_available"] > 0
    for case in run.cases.values():
        assert case["commit"] == run.environment["commit"]
        assert case["took"] >= 0
        assert case["load"] >= 0


def test_the_table_marks_winners_and_says_why_the_others_failed(fates):
    shown = Console(file=io.StringIO(), width=tables.LOG_WIDTH)
    shown.print(tables.of_case(fates[1].cases["fates/all"]))
    text = shown.file.getvalue()
    assert text.count("★") == 1
    assert "segfault: crashed: SIGSEGV" in text
    assert "by hand (baseline)" in text
    assert "jacfunc times faster than by hand: wanted ≥ 0.001, found" in text
    assert text.rstrip().endswith("met")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (0, "crashed: exit code 0"),
        (-signal.SIGABRT, "crashed: SIGABRT"),
        (DEVICE_LOST, "crashed: the GPU takes no more work"),
    ],
)
def test_why_a_child_ended(code, cause):
    assert processes.cause(code) == cause


# --- stopped and gone on with ---


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Two runs that stand in the middle of their third case, by the signal that ends them."""
    started = {}
    for number in (signal.SIGKILL, signal.SIGTERM):
        directory = tmp_path_factory.mktemp(number.name)
        trace = directory / "trace"
        trace.touch()
        command = [sys.executable, "-m", "benchmarks", "run", "--device", "cpu"]
        command += ["--table", "tests.benchmarks.table:HELD", "--output", str(directory)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, TRACE: str(trace)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started[number] = process, directory, trace
    yield started
    for process, _, _ in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_loses_the_case_in_flight_alone(held, number):
    process, directory, trace = held[number]
    wait_until(lambda: "held" in trace.read_text())
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    if number == signal.SIGTERM:
        assert process.returncode == STOPPED, output
        assert "Go on with --resume" in output
    else:
        assert process.returncode == -number, output

    names, pids = zip(*(line.split() for line in trace.read_text().splitlines()), strict=True)
    assert names == ("one", "two", "held")
    wait_until(lambda: not alive(int(pids[-1])))
    before = Run.read(directory / "quick-cpu.json").cases
    assert list(before) == ["first/one", "first/two"]

    after, seen = run(directory, resume=True)
    assert seen.cases == ["second/held", "second/last"]
    assert list(after.cases) == ["first/one", "first/two", "second/held", "second/last"]
    assert {key: after.cases[key] for key in before} == before
    assert Run.read(directory / "quick-cpu.json").cases.keys() == after.cases.keys()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)[0]


def test_what_the_file_has_is_run_again_only_where_that_is_said(whole):
    directory, first = whole
    assert run(directory, resume=True)[1].cases == []
    again, seen = run(directory, resume=True, again="first/two")
    assert seen.cases == ["first/two"]
    assert list(again.cases) == list(first.cases)


def test_a_part_does_not_replace_the_whole(whole):
    directory, first = whole
    part, _ = run(directory, only="one")
    assert list(part.cases) == ["first/one"]
    assert list(Run.read(directory / "quick-cpu-part.json").cases) == ["first/one"]
    assert Run.read(directory / "quick-cpu.json").cases.keys() == first.cases.keys()


def test_a_part_can_add_to_the_whole(tmp_path):
    run(tmp_path, only="second/last", resume=True)
    both, _ = run(tmp_path, only="first/one", resume=True)
    assert list(both.cases) == ["first/one", "second/last"]


def test_a_new_run_begins_a_new_file_at_once(whole, tmp_path):
    path = tmp_path / "quick-cpu.json"
    path.write_bytes((whole[0] / "quick-cpu.json").read_bytes())
    suite.begun(order(tmp_path), whole[1].environment)
    assert Run.read(path).cases == {}


@pytest.mark.parametrize("what", [what for what in suite.SAME if what != "rivals"])
def test_a_run_is_not_gone_on_with_elsewhere(whole, what):
    elsewhere = {**whole[1].environment, what: "another"}
    with pytest.raises(CannotRunError, match=rf"begun, got {what} .*, here 'another'\. Begin a"):
        suite.begun(order(whole[0], resume=True), elsewhere)


def test_a_run_is_not_gone_on_with_beside_other_rivals(whole, tmp_path):
    other = Run("quick", whole[1].environment, {"jax": "another"}, {})
    other.write(tmp_path / "quick-cpu.json")
    with pytest.raises(CannotRunError, match=r"begun, got rivals \{'jax': 'another'\}, here"):
        suite.begun(order(tmp_path, resume=True), whole[1].environment)


def test_another_file_is_not_gone_on_with(whole, tmp_path):
    (tmp_path / "quick-cpu.json").write_text("{}")
    with pytest.raises(CannotRunError, match="it must be a run of the suite in format"):
        suite.begun(order(tmp_path, resume=True), whole[1].environment)


def test_two_cases_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names of cases must differ, got 'same/name' twice"):
        order(tmp_path, "TWICE").chosen()


# --- how long, and by which clock ---


def test_less_effort_means_fewer_rounds_but_not_too_few():
    effort = worker.scaled(Effort(rounds=40, seconds=1.0, fewest=5, patience=20.0), 0.5)
    assert effort == Effort(rounds=20, seconds=0.5, fewest=5, patience=10.0)
    assert worker.scaled(effort, 0.01).rounds == effort.fewest


@pytest.mark.parametrize(("threads", "ratio"), [(1, 2.0), (2, 5.0)])
def test_beside_the_best_the_processor_counts_where_it_has_one_thread(threads, ratio):
    """What other processes take is not charged to anyone; of two threads it would be the sum."""
    wanted = best("jacfunc", 8, "by hand", "absent")
    names = ("jacfunc", "by hand", "absent")
    case = benchmark_table.case(
        "one", tuple(Contestant(n, n, None) for n in names), wanted=(wanted,), threads=threads
    )
    results = [
        Result("jacfunc", "jacfunc", seconds={0: 9.0, 1: 5.0}, busy={1: 2.0}),
        Result("by hand", "autograd", seconds={0: 9.0, 1: 1.0}, busy={1: 1.0}),
        Result("absent", "rival", "not installed: absent"),
    ]
    summarize({result.contestant: result for result in results}, "by hand")
    (target,) = as_record(Question("a", "?", "jacfunc", (case,)), case, results)["targets"]
    assert (target["found"], target["met"]) == (ratio, False)
    assert target["what"] == "time ÷ best by hand"


def test_the_suite_by_hand_has_those_alone_who_are_compared(tmp_path):
    case = benchmark_table.case("one", wanted=(best("jacfunc", 1, "by hand"),))
    others = (*case.contestants, Contestant("slow", "rival", None))
    cases = replace(case, contestants=others), benchmark_table.case("without")
    assert [c.by_hand and [x.name for x in c.by_hand.contestants] for c in cases] == [
        ["jacfunc", "by hand"],
        None,
    ]
    chosen = Order("hand", "cpu", tmp_path).chosen()
    of_derivatives = "inputs", "params", "whole", "ntk", "norms", "streams"
    assert {*of_derivatives, "ggn-diagonal", "ggn-product"} == {
        key.partition("/")[0] for key in chosen
    }


def test_time_left_follows_what_finished_cases_took():
    now, case = [100.0], table_of_nothing()
    bar = Progress(
        console=Console(file=io.StringIO()),
        get_time=lambda: now[0],
        speed_estimate_period=float("inf"),
        auto_refresh=False,
    )
    watch = Watch(bar)
    watch.begin({"a": 10.0, "b": 20.0, "c": 5.0})
    (task,) = bar.tasks
    assert (task.total, task.completed) == (35.0, 0.0)
    watch.case("a")
    now[0] = 120.0
    watch.finished("a", case)
    # twice as long as was expected
    assert task.time_remaining == 2 * (20 + 5)
    watch.case("b")
    watch.contestant("jacfunc")
    assert (task.description, task.fields["turn"]) == ("b", "jacfunc")
    now[0] = 140.0
    watch.finished("b", case)
    watch.finished("c", case)
    assert task.finished


def table_of_nothing():
    keys = ("question", "case", "baseline")
    return {**dict.fromkeys(keys, "a"), "results": [], "targets": []}


# --- several processes ---


def test_contestants_and_judgements_have_processes_of_their_own(tmp_path):
    """What one leaves in its heap nobody else finds."""
    cases = run(tmp_path, "APART")[0].cases.values()
    rows = [row for case in cases for row in case["results"]]
    assert {row["status"] for row in rows} == {"ok"}
    # in each case two contestants, two judgements, or one judge
    assert len({row["error"] for row in rows}) == 2 + 2 + 1


def test_what_is_made_aside_comes_as_it_was():
    made = torch.arange(5.0)
    found, number = processes.aside(lambda: (made * 2, os.getpid()))
    assert torch.equal(found, made * 2)
    assert number != os.getpid()
    with pytest.raises(WrongAnswerError, match="off by 3"):
        processes.aside(lambda: error(made, made + 3))


def test_whoever_is_ended_aside_ends_who_asked():
    """As a crash of a contestant is told to the runner, whoever took it there."""
    ended = "import os; from benchmarks.running import processes as p; "
    ended += "p.aside(lambda: os.kill(os.getpid(), 11))"
    assert subprocess.run([sys.executable, "-c", ended], cwd=ROOT).returncode == -signal.SIGSEGV


def test_rounds_of_several_processes_are_pooled(tmp_path):
    once, _ = run(tmp_path / "once", "PLAIN")
    twice, _ = run(tmp_path / "twice", "PLAIN", processes=2)
    (before,), (after,) = once.cases.values(), twice.cases.values()
    for first, both in zip(before["results"], after["results"], strict=True):
        counted = [n for n in both["seconds"] if int(n) > 0]
        assert len(counted) == 2 * len([n for n in first["seconds"] if int(n) > 0])
        assert len(both["busy"]) == len(counted)
        assert both["ratio"]["low"] <= both["ratio"]["median"] <= both["ratio"]["high"]


def test_who_fails_in_one_process_has_failed():
    good, bad = Result("a", "rival"), Result("a", "rival", "out of memory")
    good.seconds, bad.seconds = {0: 1.0, 1: 2.0}, {0: 1.0}
    (found,) = pooled([[good], [bad]], "a")
    assert found.status == "out of memory"
    (kept,) = pooled([[Result("a", "rival", seconds={1: 2.0})], [good]], "a")
    assert kept.seconds == {1: 2.0, 2: 2.0}


def test_whoever_has_rounds_is_compared_with_a_baseline_that_has_none_by_the_warm_up():
    base, fast = Result("base", "", seconds={0: 1.0}), Result("fast", "", seconds={0: 0.5, 1: 0.4})
    summarize({"base": base, "fast": fast}, "base")
    assert fast.ratio.median == 0.5
    assert fast.time.median == 0.4


# --- the command line ---


def test_the_list_names_questions_cases_and_contestants(capsys):
    assert main(["list", "--table", "tests.benchmarks.table:FATES"]) == 0
    printed = capsys.readouterr().out
    assert "fates: How fast is a square?" in printed
    assert "after it (quick)" in printed
    assert "contestants: jacfunc · segfault" in " ".join(printed.split())


def test_a_comparison_fails_where_something_became_slower(whole, tmp_path):
    def file(name, factor):
        copy = json.loads((whole[0] / "quick-cpu.json").read_text())
        for case in copy["cases"].values():
            for row in case["results"]:
                slower = factor if row["family"] == "jacfunc" else 1.0
                rounds = {str(n): slower * (1e-3 + 1e-6 * (n % 3)) for n in range(1, 21)}
                row["seconds"] = row["busy"] = rounds
                row["time"] = dict.fromkeys(("median", "low", "high"), slower * 1e-3)
                row["ratio"] = dict.fromkeys(("median", "low", "high"), slower)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(copy))
        return str(path)

    before, same, slower = file("before", 1.0), file("same", 1.0), file("slower", 1.5)
    assert main(["compare", before, same]) == 0
    assert main(["compare", before, slower]) == 1
    assert main(["compare", slower, before]) == 0
