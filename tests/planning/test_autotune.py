"""What is measured once is remembered: in the process, and in a file where one is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc import Autotune, Forward, Looped, Reverse, Structured
from jacfunc._calls.fingerprint import fingerprint
from jacfunc._log import trail
from jacfunc._memory.counting import PeakBytes
from jacfunc._planning.autotune import medians
from jacfunc._planning.recall import shared_plans
from jacfunc._planning.tuning_cache import Winners, winners

MATRIX = torch.linspace(-1, 1, 600).view(300, 2)


def widening(x: Tensor) -> Tensor:
    return torch.tanh(MATRIX.to(x) @ x)


def measured(steps: list[str]) -> int:
    return sum(step.startswith("measured: ") for step in steps)


def test_the_first_call_measures_and_later_ones_do_not(device: str) -> None:
    x = torch.ones(2, device=device)
    jac = jacfunc.jacobian(lambda x: torch.tanh(MATRIX.to(x) @ x), strategy="autotune")
    with trail() as steps:
        first = jac(x)
        assert measured(steps) == 1
        torch.testing.assert_close(jac(x), first)
        assert measured(steps) == 1
        jac(torch.ones(2, device=device, dtype=torch.float64))
        assert measured(steps) == 2
    torch.testing.assert_close(first, jacfunc.jacrev(widening)(x))


def test_the_process_remembers_across_transforms(device: str) -> None:
    def jacobian() -> Callable[..., Any]:
        return jacfunc.jacobian(lambda x: torch.sin(MATRIX.to(x) @ x), strategy="autotune")

    x = torch.ones(2, device=device)
    with trail() as steps:
        jacobian()(x), jacobian()(x)
    assert measured(steps) == 1


def test_every_candidate_that_may_win_is_measured(device: str) -> None:
    with trail() as steps:
        jacfunc.jacobian(lambda x: (MATRIX.to(x) @ x).cos().repeat(100), strategy="autotune")(
            torch.ones(2, device=device)
        )
    (told,) = [step for step in steps if step.startswith("measured: ")]
    assert "Forward(chunk_size=None" in told or "Looped(over='columns')" in told
    assert "µs" in told or "ms" in told


@pytest.mark.parametrize("beginning", [[0.25], [0.25, 0.01, 0.01]])
def test_what_is_set_up_in_first_calls_is_nobodys_cost(beginning: list[float]) -> None:
    """The first forward sweep of a process takes 0.2 seconds, whatever the next one takes.

    Two more may take new memory, or learn what later ones know.
    """
    forward: list[float] = [0.001] * 100 + beginning[::-1]

    def scripted(run: Any, device: torch.device) -> float:
        return forward.pop() if isinstance(run(), Forward) else 0.003

    times = medians((Reverse(), Forward()), lambda s: s, torch.device("cpu"), clock=scripted)
    assert times == {Forward(): 0.001}


def test_a_file_outlives_the_process(tmp_path: Path) -> None:
    cache, x = tmp_path / "deep" / "winners.json", torch.ones(2)
    jac = jacfunc.jacobian(widening, strategy=Autotune(cache))
    with trail() as steps:
        jac(x)
    assert measured(steps) == 1
    ((where, kept),) = json.loads(cache.read_text()).items()
    assert f"torch {torch.__version__}" in where
    assert len(kept) == 1
    winners.cache_clear(), shared_plans.cache_clear()  # as a new process would start
    with trail() as steps:
        torch.testing.assert_close(
            jacfunc.jacobian(widening, strategy=Autotune(cache))(x), jacfunc.jacrev(widening)(x)
        )
    assert measured(steps) == 0
    assert any("it was the fastest when measured" in step for step in steps)


def test_a_file_keeps_what_others_wrote(tmp_path: Path) -> None:
    cache, cpu = tmp_path / "winners.json", torch.device("cpu")
    one, other = Winners(cache), Winners(cache)
    one.put(cpu, "a", Reverse(128), 1.0)
    other.put(cpu, "b", Looped("columns"), 2.0)
    fresh = Winners(cache)
    assert fresh.get(cpu, "a") == Reverse(128)
    assert fresh.get(cpu, "b") == Looped("columns")
    assert fresh.get(cpu, "c") is None
    fresh.put(cpu, "a", Forward(randomness="same"), 0.5)
    assert Winners(cache).get(cpu, "a") == Forward()
    fresh.put(cpu, "d", Structured(7), 0.5)
    assert Winners(cache).get(cpu, "d") == Structured(7)
    assert list(tmp_path.iterdir()) == [cache]


def test_another_machine_or_version_measures_for_itself(tmp_path: Path) -> None:
    cache, cpu = tmp_path / "winners.json", torch.device("cpu")
    Winners(cache).put(cpu, "a", Reverse(), 1.0)
    cache.write_text(cache.read_text().replace(f"torch {torch.__version__}", "torch 1.0"))
    assert Winners(cache).get(cpu, "a") is None


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    cache = tmp_path / "notes.txt"
    cache.write_text("not JSON")
    jac = jacfunc.jacobian(widening, strategy=Autotune(cache))
    with pytest.raises(
        ValueError, match="Autotune: cache must be a file that Autotune has written"
    ):
        jac(torch.ones(2))


def test_modules_per_sample(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    x = torch.ones(5, 4, device=device)
    for wrt in ("params", "inputs"):
        tuned = jacfunc.module_jacobian(model, wrt, per_sample=True, strategy="autotune")
        with trail() as steps:
            found = tuned(x)
            tuned(x)
        assert measured(steps) == 1
        expected = jacfunc.module_jacobian(model, wrt, per_sample=True, strategy="looped")(x)
        torch.testing.assert_close(found, expected)


def test_a_budget_holds(device: str) -> None:
    x = torch.ones(200, device=device)
    matrix = torch.ones(300, 200, device=device)
    jac = jacfunc.jacobian(lambda x: torch.tanh(matrix @ x), strategy="autotune", memory="600 kB")
    with PeakBytes() as counter:
        jac(x)
    assert counter.peak > 600_000  # candidates are measured without it
    with PeakBytes() as counter:
        jac(x)
    assert counter.peak <= 600_000


def test_tuning_draws_nothing(device: str) -> None:
    def func(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    x = torch.ones(30, device=device)
    torch.manual_seed(3)
    expected, after = jacfunc.jacrev(func)(x), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(jacfunc.jacobian(func, strategy="autotune")(x), expected)
    assert torch.equal(torch.rand(1), after)


def test_what_torch_refuses_is_not_measured() -> None:
    def func(x: Tensor) -> Tensor:
        return torch.cholesky_inverse(x).flatten().repeat(40)

    x = torch.eye(2, dtype=torch.float64) * 2
    with trail() as steps:
        jac = jacfunc.jacobian(func, strategy="autotune")(x)
    torch.testing.assert_close(jac, jacfunc.jacrev(func)(x))
    assert any("was refused: torch's forward mode" in step for step in steps)


def test_a_chunk_is_not_given() -> None:
    with pytest.raises(ValueError, match="jacobian: strategy 'autotune' must have no chunk_size"):
        jacfunc.jacobian(widening, strategy="autotune", chunk_size=3)
    with pytest.raises(TypeError, match="Autotune: memory must be a number of bytes"):
        Autotune(memory=1.5)  # type: ignore[arg-type]


# --- fingerprints ---


def power(n: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x**n


def scaled_by(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: matrix * x


class Raw(nn.Module):
    """Its ``repr`` says nothing of its parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_fingerprints_tell_code_and_closures_apart() -> None:
    different = [
        power(2),
        power(3),
        scaled_by(torch.ones(2)),
        scaled_by(torch.ones(3)),
        scaled_by(torch.ones(3).double()),
        nn.Linear(2, 3),
        nn.Linear(3, 2),
        nn.Dropout(0.1),
        nn.Dropout(0.2),
        nn.Dropout(0.1).eval(),
        torch.sin,
        torch.cos,
        nn.ParameterList([torch.ones(2)]),
        nn.ParameterList([torch.ones(3)]),
        Raw(torch.ones(2)),
        Raw(torch.ones(3)),
    ]
    assert len(set(map(fingerprint, different))) == len(different)
    assert fingerprint(scaled_by(torch.ones(2))) == fingerprint(scaled_by(torch.zeros(2)))
    assert fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(2, 3))


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from tests.planning.test_autotune import *; "
        "print(fingerprint(power(2)), fingerprint(nn.Linear(2, 3)), fingerprint(torch.sin))"
    )
    run = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    told = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert told == [fingerprint(power(2)), fingerprint(nn.Linear(2, 3)), fingerprint(torch.sin)]


def test_a_function_that_closes_over_itself_has_a_fingerprint() -> None:
    def recursive(x: Tensor, depth: int = 3) -> Tensor:
        return recursive(x, depth - 1).sin() if depth else x

    assert fingerprint(recursive) == fingerprint(recursive)
