"""What users keep: pickles of strategies and plans, and winners in cache files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import jacfunc
from jacfunc import Autotune, Forward, Looped, Reverse, Strategy, Structured
from jacfunc._log import trail
from jacfunc._memory import FittedChunks
from jacfunc._planning.auto import Auto
from jacfunc._planning.tuning_cache import Winners

STRATEGIES = (
    *(Reverse(7), Forward(3, "error"), Looped("rows"), Structured(5)),
    *(Autotune(memory="2 GiB"), Auto((Reverse(2), Forward()), 10**9, Structured())),
)

CACHE_KEY = "ba427a3e14c2009a47d1aaca2e08e80e"
"""Of ``torch.cosh`` at seven numbers in float64, before the files of jacfunc became packages."""


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_pickles_of_strategies(strategy: Strategy) -> None:
    loaded = pickle.loads(pickle.dumps(strategy))
    assert loaded == strategy
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    found = jacfunc.module_jacobian(model, per_sample=True, strategy=loaded)
    expected = jacfunc.module_jacobian(model, per_sample=True, strategy="looped")(x)
    for _ in range(2):
        torch.testing.assert_close(found(x), expected)


def test_a_pickle_of_a_plan_within_a_budget() -> None:
    x = torch.zeros(300)

    def func(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(x), torch.tanh(x)  # each output leaf has chunks of its own

    plan = jacfunc.plan(func, x, memory="1 MB")
    assert isinstance(plan.strategy, Reverse)
    assert isinstance(plan.strategy.chunk_size, FittedChunks)
    loaded = pickle.loads(pickle.dumps(plan))
    assert loaded == plan
    found = jacfunc.jacobian(func, strategy=loaded)(x)
    torch.testing.assert_close(found, jacfunc.jacrev(func)(x))


def test_the_winner_of_a_function_in_a_cache_file(tmp_path: Path) -> None:
    cache = tmp_path / "winners.json"
    Winners(cache).put(torch.device("cpu"), "another", Reverse(), 1.0)
    everything = json.loads(cache.read_text())
    (here,) = everything.values()
    here[CACHE_KEY] = {"strategy": "Looped", "options": {"over": "rows"}, "seconds": 1.0}
    cache.write_text(json.dumps(everything))
    jac = jacfunc.jacobian(torch.cosh, strategy=Autotune(cache))
    with trail() as steps:
        jac(torch.zeros(7, dtype=torch.float64))
    assert steps[-1].startswith("Looped(over='rows') ran: it was the fastest when measured")
