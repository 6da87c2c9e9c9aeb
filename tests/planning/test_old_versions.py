"""What older versions have written is read: pickles of strategies and plans, and cache files.

The bytes are those of commit a106e42, before the files of jacfunc became packages.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import jacfunc
from jacfunc import Autotune, Forward, Looped, Plan, Reverse, Structured
from jacfunc._log import trail
from jacfunc._memory import FittedChunks
from jacfunc._planning.auto import Auto
from jacfunc._planning.tuning_cache import Winners

PICKLES: dict[str, tuple[Any, bytes]] = {
    "reverse": (
        Reverse(7),
        b"\x80\x04\x95A\x00\x00\x00\x00\x00\x00\x00\x8c\x1bjacfunc.str"
        b"ategies._reverse\x94\x8c\x07Rever"
        b"se\x94\x93\x94)\x81\x94}\x94\x8c\nchunk_size\x94K"
        b"\x07sb.",
    ),
    "forward": (
        Forward(3, "error"),
        b"\x80\x04\x95W\x00\x00\x00\x00\x00\x00\x00\x8c\x1bjacfunc.str"
        b"ategies._forward\x94\x8c\x07Forwa"
        b"rd\x94\x93\x94)\x81\x94}\x94(\x8c\nchunk_size\x94"
        b"K\x03\x8c\nrandomness\x94\x8c\x05error\x94u"
        b"b.",
    ),
    "looped": (
        Looped("rows"),
        b"\x80\x04\x95>\x00\x00\x00\x00\x00\x00\x00\x8c\x1ajacfunc.str"
        b"ategies._looped\x94\x8c\x06Looped"
        b"\x94\x93\x94)\x81\x94}\x94\x8c\x04over\x94\x8c\x04rows\x94sb"
        b".",
    ),
    "structured": (
        Structured(5),
        b"\x80\x04\x95R\x00\x00\x00\x00\x00\x00\x00\x8c\x1ejacfunc.str"
        b"ategies._structured\x94\x8c\nSt"
        b"ructured\x94\x93\x94)\x81\x94}\x94(\x8c\nchunk"
        b"_size\x94K\x05\x8c\x05known\x94}\x94ub.",
    ),
    "autotune": (
        Autotune("winners.json", "2 GiB"),
        b"\x80\x04\x95\\\x00\x00\x00\x00\x00\x00\x00\x8c\x11jacfunc._au"
        b"totune\x94\x8c\x08Autotune\x94\x93\x94)\x81\x94}"
        b"\x94(\x8c\x05cache\x94\x8c\x0cwinners.json"
        b"\x94\x8c\x06memory\x94\x8c\x052 GiB\x94\x8c\x05know"
        b"n\x94}\x94ub.",
    ),
    "auto": (
        Auto((Reverse(2), Forward()), 10**9, Structured()),
        b"\x80\x04\x95 \x01\x00\x00\x00\x00\x00\x00\x8c\x10jacfunc._pl"
        b"anner\x94\x8c\x04Auto\x94\x93\x94)\x81\x94}\x94(\x8c\nd"
        b"irections\x94\x8c\x1bjacfunc.stra"
        b"tegies._reverse\x94\x8c\x07Revers"
        b"e\x94\x93\x94)\x81\x94}\x94\x8c\nchunk_size\x94K\x02"
        b"sb\x8c\x1bjacfunc.strategies._"
        b"forward\x94\x8c\x07Forward\x94\x93\x94)\x81\x94}"
        b"\x94(h\x0bN\x8c\nrandomness\x94\x8c\x04same"
        b"\x94ub\x86\x94\x8c\x06memory\x94J\x00\xca\x9a;\x8c\tby_"
        b"layers\x94\x8c\x1ejacfunc.strateg"
        b"ies._structured\x94\x8c\nStruct"
        b"ured\x94\x93\x94)\x81\x94}\x94(h\x0bN\x8c\x05known\x94"
        b"}\x94ubh\x1b}\x94ub.",
    ),
}

PLAN = (
    b"\x80\x04\x95Y\x02\x00\x00\x00\x00\x00\x00\x8c\x0ejacfunc._pl"
    b"ans\x94\x8c\x04Plan\x94\x93\x94)\x81\x94}\x94(\x8c\x08str"
    b"ategy\x94\x8c\x1bjacfunc.strategi"
    b"es._reverse\x94\x8c\x07Reverse\x94\x93\x94"
    b")\x81\x94}\x94\x8c\nchunk_size\x94\x8c\x0fjacf"
    b"unc._chunks\x94\x8c\x06Within\x94\x93\x94)"
    b"\x81\x94}\x94(\x8c\x04room\x94JP\xbf\t\x00\x8c\x07at_mo"
    b"st\x94N\x8c\x07settled\x94]\x94K\xb0aubsb\x8c"
    b"\x06reason\x94\x8cx300 outputs, 3"
    b"00 inputs: forecast 671 "
    b"\xc2\xb5s, 807 \xc2\xb5s by Forward("
    b"chunk_size=None, randomn"
    b"ess='same'); chunks with"
    b"in 977 KiB\x94\x8c\x07seconds\x94G?E"
    b"\xf9f\x10yJ\xd0\x8c\totherwise\x94\x8c\x1bjacf"
    b"unc.strategies._forward\x94"
    b"\x8c\x07Forward\x94\x93\x94)\x81\x94}\x94(h\x0bN\x8c\nr"
    b"andomness\x94\x8c\x04same\x94ub\x85\x94\x8c\x08f"
    b"orecast\x94\x8c\x11jacfunc._forec"
    b"ast\x94\x8c\x08Forecast\x94\x93\x94)\x81\x94}\x94(h"
    b"\x05h\t\x8c\x0bevaluations\x94K\x01\x8c\x06swe"
    b"eps\x94K\x03\x8c\x05flops\x94J\x80\xf97\x03\x8c\x0cres"
    b"ult_bytes\x94J@~\x05\x00\x8c\npeak_by"
    b"tes\x94J\xf0-\x0f\x00h\x15\x8c\x1e3 of 3 swee"
    b"ps counted on fakes\x94h\x17G?"
    b"G<\x03\xb5yJ\xd0ubub."
)

CACHE_KEY = "ba427a3e14c2009a47d1aaca2e08e80e"
"""Of ``torch.cosh`` at seven numbers in float64."""


@pytest.mark.parametrize("name", PICKLES)
def test_strategies(name: str) -> None:
    strategy, pickled = PICKLES[name]
    loaded = pickle.loads(pickled)
    assert loaded == strategy
    assert type(loaded) is type(strategy)
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    if isinstance(loaded, Autotune):
        loaded = Autotune(memory=loaded.memory)
    if not isinstance(loaded, Structured | Auto):
        torch.testing.assert_close(
            jacfunc.jacobian(torch.sin, strategy=loaded)(x[0]), jacfunc.jacrev(torch.sin)(x[0])
        )
    found = jacfunc.module_jacobian(model, per_sample=True, strategy=loaded)
    expected = jacfunc.module_jacobian(model, per_sample=True, strategy="looped")(x)
    for _ in range(2):
        torch.testing.assert_close(found(x), expected)


def test_a_plan_within_a_budget() -> None:
    plan = pickle.loads(PLAN)
    assert isinstance(plan, Plan)
    assert plan.forecast is not None
    assert plan.forecast.result_bytes == 360_000
    assert plan.strategy == Reverse(FittedChunks(638_800))
    x = torch.zeros(300)

    def func(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(x), torch.tanh(x)  # each output leaf has chunks of its own

    found = jacfunc.jacobian(func, strategy=plan)(x)
    torch.testing.assert_close(found, jacfunc.jacrev(func)(x))
    assert pickle.loads(pickle.dumps(plan)) == plan


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
