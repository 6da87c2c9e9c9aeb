"""``jacfunc compare``: every strategy on a user's own problem, judged before it is timed.

What is right is told by the oracles of the tests. No time is asserted: statistics are tested on
numbers that are made up.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc._measuring.results import Result, Spread, WrongAnswerError
from jacfunc._trees.tree import flatten
from jacfunc.compare import compare
from jacfunc.compare._advice import best, front
from jacfunc.compare._command import load, main, with_options
from jacfunc.compare._contestants import STRATEGIES, Sizes, contestants, strategies_for
from jacfunc.compare._forecasts import foretell
from jacfunc.compare._judge import Judge, precision_of
from jacfunc.compare._problem import Problem
from jacfunc.compare._reference import reference_of
from jacfunc.compare._table import Comparison
from jacfunc.strategies._reverse import Reverse
from tests.compare import users_problem as compare_problem
from tests.truth.oracles import float_leaves, looped_jacobian

QUICK = {"seconds": 0.001}
FEW = ("auto", "reverse", "looped")
A = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 0.25]])


class Recurrent(nn.Module):
    """No vmap runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0][:, -1]


class Columns(nn.Module):
    """Samples are columns, and share their scales."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(A.clone())

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.weight @ x).mT * scale


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 9))


def two_arguments(x: torch.Tensor, other: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"a": torch.tanh(A @ x) * other["scale"], "b": (x * x).sum() + other["scale"].sum()}


def distances(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, x.flip(0))


def problems() -> dict[str, Problem]:
    torch.manual_seed(0)
    images = torch.randn(4, 3)
    return {
        "module": Problem(perceptron(), (images,)),
        "inputs": Problem(perceptron(), (images,), wrt="inputs"),
        "whole": Problem(perceptron(), (images,), per_sample=False),
        "whole inputs": Problem(perceptron(), (images,), wrt="inputs", per_sample=False),
        "function": Problem(two_arguments, (torch.randn(3), {"scale": torch.ones(2)})),
        "arguments": Problem(
            two_arguments, (torch.randn(3), {"scale": torch.ones(2)}), argnums=(1, 0)
        ),
        "keywords": Problem(torch.nn.functional.softplus, (torch.randn(4),), {"beta": 2.0}),
        "forward is refused": Problem(distances, (torch.randn(4, 2),)),
        "vmap is refused": Problem(Recurrent(), (torch.randn(3, 4, 2),)),
        "batch in the middle": Problem(
            Columns(), (torch.randn(3, 5), torch.ones(2)), in_dims=(1, None)
        ),
        "masks": Problem(
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), (images,), randomness="same"
        ),
    }


def expected(problem: Problem) -> list[torch.Tensor]:
    """Blocks by the oracles, in float64; of samples one by one."""
    exact = problem.to("cpu", torch.float64)
    if exact.module is None:
        func = problem.target
        return float_leaves(looped_jacobian(func, problem.args, problem.argnums, problem.kwargs))
    params = dict(exact.module.named_parameters())
    dims = exact.in_dims if isinstance(exact.in_dims, tuple) else (0,) * len(exact.args)
    pairs = list(zip(exact.args, dims, strict=True))
    if not exact.per_sample:
        return _blocks(exact, params, exact.args, [None] * len(pairs))
    size = next(x.shape[d] for x, d in pairs if d is not None)
    singles = [tuple(x if d is None else x.select(d, n) for x, d in pairs) for n in range(size)]
    found = [_blocks(exact, params, inputs, dims) for inputs in singles]
    return [torch.stack(blocks) for blocks in zip(*found, strict=True)]


def _blocks(exact, params, inputs, dims):
    def call(params, inputs):
        batch = tuple(x if d is None else x.unsqueeze(d) for x, d in zip(inputs, dims, strict=True))
        output = torch.func.functional_call(exact.module, params, batch)
        return output.squeeze(0) if exact.per_sample else output

    argnums = 0 if exact.wrt == "params" else 1
    return float_leaves(looped_jacobian(call, (params, inputs), argnums))


NAMES = list(problems())


# --- every row ---


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_right_or_says_why(name):
    problem = problems()[name]
    found = compare(problem, **QUICK)
    rows = {result.contestant: result for result in found.results}
    assert next(iter(rows)) == found.baseline
    assert {"auto", "autotune", "reverse", "forward", "looped"} <= set(rows)
    assert ("structured" in rows) == problem.by_params
    for result in rows.values():
        if result.ok:
            assert result.error < 1e-4
            assert result.time.low <= result.time.median <= result.time.high
            assert result.peak_bytes > 0
        else:
            assert re.match("wrong: |unsupported: ", result.status), result.status
    assert rows["auto"].ok
    assert rows["autotune"].ok
    assert rows["looped"].ok
    assert found.best.ok


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"masks"}))
def test_the_answers_of_ok_rows_are_the_oracles(name):
    problem = problems()[name]
    reference = reference_of(problem)
    judge = Judge(reference, precision_of(problem))
    sizes = Sizes.of(problem, reference)
    chosen = strategies_for(problem, sizes, STRATEGIES)
    entrants = contestants(problem, chosen, None, False)
    results = [Result(entrant.name, entrant.family) for entrant in entrants]
    foretell(problem, chosen, results)
    assert all(result.ok for result in results)
    right, wanted = 0, expected(problem)
    assert judge(wanted) < 1e-6
    for entrant in entrants:
        try:
            answer = entrant.prepare(problem)()
            judge(answer)
        except (RuntimeError, WrongAnswerError):
            continue
        right += 1
        blocks = [leaf for leaf in flatten(answer)[0] if isinstance(leaf, torch.Tensor)]
        for block, oracle in zip(blocks, wanted, strict=True):
            torch.testing.assert_close(
                block.detach().double(), oracle.double(), rtol=1e-4, atol=1e-5
            )
    assert right >= 4


def test_a_refusal_stays_as_a_row():
    rows = {
        r.contestant: r.status for r in compare(problems()["forward is refused"], **QUICK).results
    }
    assert re.search("unsupported: Refused: .*torch has no forward mode", rows["forward"])
    # torch.func.jacrev of cdist is silently wrong, which the baseline is not spared
    assert re.match(r"wrong: relative error \d", rows["torch.func.jacrev"])
    rows = {r.contestant: r.status for r in compare(problems()["vmap is refused"], **QUICK).results}
    assert rows["reverse"] == rows["structured"] == "ok"


def test_a_wrong_strategy_is_reported_wrong():
    class Doubled:
        def materialize(self, operator):
            return tuple(tuple(2 * b for b in row) for row in Reverse().materialize(operator))

        def __repr__(self):
            return "Doubled()"

    class Crooked(Doubled):
        def materialize(self, operator):
            blocks = [list(row) for row in Reverse().materialize(operator)]
            blocks[0][0][0, 0] += 1e-2
            return blocks

        def __repr__(self):
            return "Crooked()"

    found = compare(
        (lambda x: A @ x, torch.ones(3)), strategies=["auto", Doubled(), Crooked()], **QUICK
    )
    baseline, auto, doubled, crooked = found.results
    assert baseline.ok
    assert auto.ok
    assert doubled.status == "wrong: relative error 1.0e+00"
    assert crooked.status == "wrong: relative error 5.0e-03"
    assert not doubled.seconds
    assert found.best.contestant == "auto"


def test_a_strategy_that_crashes_does_not_stop_the_others():
    class Crashing:
        def materialize(self, operator):
            raise KeyError("a rule that is missing")

        def __repr__(self):
            return "Crashing()"

    found = compare((torch.sin, torch.ones(3)), strategies=[Crashing(), "reverse"], **QUICK)
    assert [r.status for r in found.results] == [
        "ok",
        "unsupported: KeyError: 'a rule that is missing'",
        "ok",
    ]


# --- the judge ---


def test_the_judge_looks_at_every_block_shape_and_number():
    problem = problems()["module"]
    judge = Judge(reference_of(problem), precision_of(problem))
    right = dict(problem.jacobian("reverse")())
    assert judge(right) < 1e-5
    assert (
        judge.says
        == "all 36 rows compared with a loop of torch.autograd.grad in float64 on the CPU"
    )
    with pytest.raises(WrongAnswerError, match="3 blocks instead of 4"):
        judge(list(right.values())[:3])
    with pytest.raises(
        WrongAnswerError, match=re.escape("a block (4, 9, 3, 12) instead of (4, 9, 12, 3)")
    ):
        judge({**right, "0.weight": right["0.weight"].mT})
    for value in (1.0, float("nan")):
        spoiled = right["2.bias"].clone()
        spoiled[3, 8, 0] = value
        with pytest.raises(WrongAnswerError, match="relative error"):
            judge({**right, "2.bias": spoiled})


def test_rows_that_there_is_no_time_for_are_left():
    problem = problems()["module"]
    judge = Judge(reference_of(problem), precision_of(problem), patience=0.0)
    assert judge.says.startswith("1 of 36 rows compared")
    assert judge(problem.jacobian("reverse")()) < 1e-5


def test_a_block_that_is_zero_but_for_rounding_is_right():
    """Scores of attention do not depend on the bias of keys; float32 says 1e-9."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bias = nn.Linear(3, 5), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (self.first(x) + self.bias).softmax(-1)

    found = compare((Shifted(), torch.randn(4, 3)), strategies=FEW, **QUICK)
    assert [result.status for result in found.results] == ["ok"] * 4


def test_a_module_that_cannot_be_copied_is_checked_in_its_dtype_and_left_as_it_was():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module.lock = threading.Lock()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = compare(
        Problem(module, (torch.randn(5, 3),), per_sample=False), strategies=FEW, **QUICK
    )
    assert found.checked.endswith("in the dtype and on the device given")
    assert [result.status for result in found.results[1:]] == ["ok"] * 3
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in module.parameters())


def test_gradients_may_be_switched_off_outside():
    for name in ("module", "function"):
        with torch.no_grad():
            comparison = compare(problems()[name], strategies=FEW, **QUICK)
        assert [result.status for result in comparison.results] == ["ok"] * 4


def test_the_random_state_is_left_as_it_was():
    problem = problems()["masks"]
    before = torch.get_rng_state()
    assert compare(problem, strategies=FEW, **QUICK).results[0].ok
    assert torch.equal(before, torch.get_rng_state())


# --- who need not try ---


def test_what_would_not_fit_or_end_is_not_tried():
    """Forward mode in a million parameters would take terabytes: a process killed has no table."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))
    found = compare((model, torch.ones(2, 1000)), strategies=("reverse", "forward"), **QUICK)
    forward = found.results[2]
    assert re.fullmatch(r"out of memory: forecast .* at least, .* free", forward.status)
    assert forward.forecast_seconds > 1
    assert found.best is not forward


def test_a_jacobian_that_would_not_fit_is_refused():
    W = torch.zeros(1, 1).expand(3_000_000, 3_000_000)
    with pytest.raises(
        ValueError,
        match=r"compare: the Jacobian must fit in memory, got 32\.7 TiB where .* are free\. .*"
        "stream_jacobian.*memory=",
    ):
        compare((lambda x: x * W[0, 0], torch.ones(3_000_000)), **QUICK)


# --- what to take ---


def row(name: str, times: float, peak: int, family: str = "jacfunc", wide: float = 0.0) -> Result:
    spread = Spread(times, times - wide, times + wide)
    return Result(name, family, time=spread, ratio=spread, peak_bytes=peak)


BASE = row("torch.func.jacrev", 1.0, 4096, "torch.func")


@pytest.mark.parametrize(
    ("rows", "memory", "sentence"),
    [
        pytest.param(
            [row("auto", 0.5, 4096), row("looped", 3.0, 1024)],
            None,
            'Take strategy="auto": 0.50 (0.50–0.50) of the time of torch.func.jacrev, 4 KiB at its '
            'peak; under a memory of 4 KiB take strategy="looped": 3.00 (3.00–3.00) of the time of '
            "torch.func.jacrev, 1 KiB at its peak.",
            id="two to choose from",
        ),
        pytest.param(
            [row("auto", 0.52, 4096), row("Reverse(chunk_size=8)", 0.5, 4000)],
            None,
            'Take strategy="auto": 0.52 (0.52–0.52) of the time of torch.func.jacrev, 4 KiB at its '
            "peak (as fast: Reverse(chunk_size=8)).",
            id="a tie goes to the first",
        ),
        pytest.param(
            [row("auto", 0.8, 4096), row("Reverse(chunk_size=8)", 0.5, 4096)],
            None,
            "Take strategy=Reverse(chunk_size=8): 0.50 (0.50–0.50) of the time of "
            "torch.func.jacrev, 4 KiB at its peak.",
            id="an object",
        ),
        pytest.param(
            [row("auto", 2.0, 2048)],
            None,
            "Take torch.func.jacrev itself: no strategy is as fast here; under a memory of 4 KiB "
            'take strategy="auto": 2.00 (2.00–2.00) of the time of torch.func.jacrev, 2 KiB at its '
            "peak.",
            id="the baseline wins",
        ),
        pytest.param(
            [row("reverse", 0.5, 4096), row("auto", 0.9, 2000)],
            "2 KiB",
            'Take strategy="reverse": 0.50 (0.50–0.50) of the time of torch.func.jacrev, 4 KiB at '
            'its peak; under a memory of 2 KiB take strategy="auto", memory="2 KiB": 0.90 '
            "(0.90–0.90) of the time of torch.func.jacrev, 1.95 KiB at its peak.",
            id="a budget",
        ),
        pytest.param(
            [row("auto", 0.5, 1000)],
            1024,
            'Take strategy="auto", memory=1024: 0.50 (0.50–0.50) of the time of torch.func.jacrev, '
            "1000 B at its peak; it keeps to a memory of 1024.",
            id="the fastest keeps to the budget",
        ),
        pytest.param(
            [row("reverse", 0.5, 4096)],
            "1 KiB",
            'Take strategy="reverse": 0.50 (0.50–0.50) of the time of torch.func.jacrev, 4 KiB at '
            "its peak; nothing keeps to a memory of 1 KiB, for which there are "
            "jacfunc.stream_jacobian or products (jacfunc.jvp, vjp, ntk, ggn).",
            id="nothing keeps to the budget",
        ),
    ],
)
def test_the_sentence_says_what_to_take(rows, memory, sentence):
    assert repr(Comparison("", (BASE, *rows), "torch.func.jacrev", "", memory)) == sentence


def test_what_was_faster_in_a_quarter_of_the_rounds_ties():
    rows = [BASE, row("auto", 1.3, 4096, wide=0.4)]
    assert best(rows) is rows[1]
    rows = [BASE, row("auto", 1.3, 4096, wide=0.2)]
    assert best(rows) is BASE


def test_failures_are_never_taken_and_are_grouped_by_reason():
    failed = [Result(name, "jacfunc", "unsupported: E: no rule") for name in ("auto", "reverse")]
    found = Comparison("", (*failed, Result("b", "torch.func", "out of memory")), "b", "")
    assert found.best is None
    assert repr(found) == (
        "No strategy gave a right answer: auto, reverse: unsupported: E: no rule; b: out of memory."
    )


def test_where_no_strategy_is_right_the_baseline_is_not_praised():
    found = Comparison("", (BASE, Result("auto", "jacfunc", "out of memory")), "b", "")
    assert repr(found) == "Only torch.func.jacrev itself gave a right answer: auto: out of memory."


def test_the_front_is_what_nobody_beats_at_both():
    rows = [row("a", 2.0, 50), row("b", 1.0, 100), row("c", 3.0, 50), row("d", 4.0, 10)]
    assert [r.contestant for r in front(rows)] == ["b", "a", "d"]


def test_a_little_memory_is_not_worth_much_time():
    rows = [row("a", 1.0, 100), row("b", 59.0, 97), row("c", 60.0, 81), row("d", 61.0, 79)]
    assert [r.contestant for r in front(rows)] == ["a", "d"]


def test_coupled_samples_are_refused_with_the_way_to_compare_the_batch():
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    whole = r"For the batch as a whole: --whole, or Problem\(\.\.\., per_sample=False\)\.$"
    with pytest.raises(ValueError, match=rf"^compare: .* Call module\.eval\(\).* {whole}"):
        compare((norm, torch.randn(4, 3)), **QUICK)
    assert compare(Problem(norm, (torch.randn(4, 3),), per_sample=False), **QUICK).best


# --- what is shown ---


def test_the_table_and_the_picture_hold_every_row(tmp_path):
    from rich.console import Console

    found = compare(problems()["forward is refused"], strategies=("auto", "forward"), **QUICK)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "Jacobian of distances in argnums=0; 16 × 8" in text
    assert re.search(r"★ auto +│ +- │ [\d.]+ \(", text)
    assert re.search(r"  forward +│ +unsupported │", text)
    assert "forward: unsupported: Refused" in text
    found.picture(tmp_path / "deep" / "picture.svg")
    root = ElementTree.parse(tmp_path / "deep" / "picture.svg").getroot()
    drawn = "".join(root.itertext())
    assert "auto" in drawn
    assert "forward" not in drawn


@pytest.mark.parametrize("count", [0, 1, 3, 15])
def test_every_point_has_a_number_and_a_name_in_the_key(tmp_path, count):
    rows = tuple(row(f"way {n} & co.", 0.01 * 1.01**n, 2**20 + n) for n in range(count))
    failed = Result("failed", "jacfunc", "out of memory")
    comparison = Comparison("a title", (*rows, failed), "torch.func.jacrev", "")
    for name in ("once.svg", "again.svg"):
        comparison.picture(tmp_path / name)
    assert (tmp_path / "once.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    root = ElementTree.parse(tmp_path / "once.svg").getroot()
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for n, result in enumerate(rows):
        assert texts.count(str(n + 1)) == 1
        assert texts.count(f"{n + 1}  {result.contestant}") == 1
    assert not any("failed" in text for text in texts)


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([nn.Linear(3, 2)], r"a problem must be \(module, \*inputs\), .* got list\. Return"),
        ((1, 2), r"a problem must be .* got \(int, int\)\."),
        (None, r"a problem must be .* got NoneType\."),
        ((torch.sin,), r"args must be a tuple of what sin is called with, got \(\)\."),
        ((nn.Linear(3, 2), torch.tensor(1.0)), "with per_sample .* the batch in its dimension 0"),
        ((lambda x: x.long(), torch.ones(3)), "func must return at least one floating"),
        ((lambda x: x @ x @ x, torch.ones(3)), "the problem must run .*, got RuntimeError: "),
        ((nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.ones(2, 3)), "a module that draws"),
    ],
)
def test_what_is_no_problem_is_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=f"^compare: {message}"):
        compare(given, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": [torch.ones(3)]}, "args must be a tuple"),
        ({"argnums": 1}, "argnums must be positions"),
        ({"randomness": "different"}, "randomness must be 'error' or 'same', got 'different'"),
        ({"target": "sin"}, "target must be an nn.Module or a function, got str"),
        ({"target": nn.Linear(3, 2), "wrt": "weights"}, "wrt must be 'params', 'inputs'"),
        ({"target": nn.Linear(3, 2), "in_dims": (0, 0)}, "in_dims must have one entry for each"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^compare: {message}"):
        Problem(**{"target": torch.sin, "args": (torch.ones(3),), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"memory": "much"}, "memory must be a positive number of bytes, got 'much'"),
        ({"strategies": ["fast"]}, "strategy must be one of .* got 'fast'"),
        ({"device": "meta"}, "device must be one that this machine has, got 'meta'"),
    ],
)
def test_options_of_the_measuring_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^compare: {message}"):
        compare((torch.sin, torch.ones(3)), **options)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"got no rich\. Run pip install 'jacfunc\[bench\]'"
    ):
        compare((torch.sin, torch.ones(3)))


def test_importing_jacfunc_imports_nothing_of_the_extra():
    code = (
        "import sys, jacfunc; assert 'jacfunc.compare' not in sys.modules; import jacfunc.compare; "
    )
    code += "assert not {'rich', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_picture_is_svg(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be a file that ends in \.svg, got '.*picture\.png'"
    ):
        Comparison("", (BASE,), "torch.func.jacrev", "").picture(tmp_path / "picture.png")


# --- the command ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's own, with ``my_module.py`` in it."""
    shutil.copy(compare_problem.__file__, tmp_path / "my_module.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_module", None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_module", "the problem must be named as module:function, got 'my_module'"),
        ("my_module:", "the problem must be named as module:function, got 'my_module:'"),
        ("no_module:make", r"the module must be one that Python finds from .*, got 'no_module'"),
        ("my_module.sub:make", r"the module must be one .* Run the command where my_module\.py is"),
        (
            "my_module:make_nothing",
            "my_module must have a function make_nothing.* It has .*make_model",
        ),
        ("my_module:WEIGHT", "my_module must have a function WEIGHT"),
        ("my_module:make_list", "a problem must be .* got list"),
        ("my_module:make_function --whole", "--wrt and --whole must come with an nn.Module"),
        ("my_module:make_model --memory much", "memory must be a positive number of bytes"),
        ("my_module:make_model --seconds -1", r"seconds must be positive, got -1\.0"),
        ("my_module:make_model --output x.png", r"the picture must be a file that ends in \.svg"),
    ],
)
def test_what_cannot_be_asked_is_said_without_a_traceback(folder, capsys, spec, message):
    assert main(["compare", *spec.split()]) == 2
    said = capsys.readouterr()
    assert re.match(f"compare: {message}", said.err), said.err
    assert said.err.count("\n") == 1
    assert not said.out
    assert not list(folder.glob("*.svg"))


def test_a_fault_of_the_users_own_keeps_its_traceback(folder):
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        main(["compare", "my_module:make_crash"])
    (folder / "other.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        main(["compare", "other:make"])


def test_the_command_line_overrides_what_the_problem_says(folder):
    problem = load("my_module:make_problem")
    assert (problem.wrt, problem.per_sample) == ("inputs", True)
    assert with_options(problem, None, False) == problem
    changed = with_options(problem, "params", True)
    assert (changed.wrt, changed.per_sample) == ("params", False)


def test_samples_that_depend_on_each_other_are_refused(folder, capsys):
    code = "import torch\nclass Odd(torch.nn.Linear):\n    def forward(self, x):\n"
    code += "        return super().forward(x - x.mean(0))\n"
    code += "def make():\n    return Odd(3, 2), torch.randn(4, 3)\n"
    (folder / "coupled.py").write_text(code)
    assert main(["compare", "coupled:make"]) == 2
    assert "compare: per_sample needs samples that do not depend" in capsys.readouterr().err
    assert main(["compare", "coupled:make", "--whole", "--seconds", "0.001"]) == 0


def test_the_command_as_a_process(folder):
    command = [sys.executable, "-m", "jacfunc", "compare", "my_module:make_model"]
    options = ["--wrt", "inputs", "--seconds", "0.01", "--memory", "1 MiB", "--output", "out.svg"]
    environment = {**os.environ, "PYTHONPATH": str(Path(jacfunc.__file__).parent.parent)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    for strategy in ("vmap(torch.func.jacrev) (baseline)", "auto", "reverse", "forward", "looped"):
        assert any(strategy in line and "│" in line for line in lines), strategy
    assert "Per-sample Jacobian of Sequential in its inputs, 5 samples; each 2 × 3" in done.stdout
    assert re.search("^Take .* of the time of|^Take .* itself", done.stdout, re.MULTILINE)
    assert ElementTree.parse(folder / "out.svg").getroot().tag.endswith("svg")
