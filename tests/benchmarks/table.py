"""Questions of which every contestant has another fate, for the tests of the runner."""

from __future__ import annotations

import importlib
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import Case, Question, Wanted
from jacfunc._measuring.results import WrongAnswerError
from jacfunc._measuring.rounds import Contestant, Effort
from jacfunc._memory.available import free_bytes

TRACE = "JACFUNC_TEST_TRACE"
"""Names the file where every case that is set up leaves a line, its name and its process, and in
which a contestant that is held waits for the line ``go``."""

EFFORT = Effort(rounds=5, seconds=0.05, fewest=5)


def square(x):
    return lambda: x * x


def dying(by):
    def prepare(x):
        return lambda: os.kill(os.getpid(), by)

    return prepare


def leaving(x):
    return lambda: os._exit(3)


def sleeping(x):
    return lambda: time.sleep(600)


def hoarding(x):
    """More than a case may have, and less than there is."""
    return lambda: torch.empty(int(0.9 * free_bytes(x.device)), dtype=torch.uint8).fill_(1)


def raising(x):
    raise NotImplementedError("not for squares")


def absent(x):
    return importlib.import_module("no_such_rival").square(x)


def late(x):
    """Right when it is checked, dead when it is timed."""
    calls = []

    def run():
        calls.append(None)
        if len(calls) > 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return x * x

    return run


def check(x):
    return partial(error, x * x)


def error(expected, answer):
    found = float((answer - expected).abs().max())
    if found:
        raise WrongAnswerError(f"off by {found:.2g}")
    return found


def set_up(name, device):
    if path := os.environ.get(TRACE):
        with Path(path).open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
    return torch.arange(1.0, 5.0, device=device)


def refusing(device):
    raise RuntimeError("nothing to be had")


GOOD = (
    Contestant("jacfunc", "jacfunc", square),
    Contestant("by hand", "autograd", square),
)
BAD = (
    Contestant("segfault", "rival", dying(signal.SIGSEGV)),
    Contestant("killed", "rival", dying(signal.SIGKILL)),
    Contestant("leaves", "rival", leaving),
    Contestant("sleeps", "rival", sleeping),
    Contestant("hoards", "rival", hoarding),
    Contestant("raises", "rival", raising),
    Contestant("absent", "rival", absent),
    Contestant("wrong", "rival", lambda x: lambda: x),
    Contestant("late", "rival", late),
)


def case(name, contestants=GOOD, **options):
    options = {"setup": partial(set_up, name), "check": check, "is_quick": True, **options}
    return Case(name, contestants=contestants, baseline="by hand", effort=EFFORT, **options)


def asking(name, *cases):
    return Question(name, "How fast is a square?", "jacfunc", cases)


WANTED = Wanted("jacfunc", "times faster than", 0.001, ("segfault", "by hand"))

FATES = (
    asking("fates", case("all", (GOOD[0], *BAD, GOOD[1]), wanted=(WANTED,))),
    asking("setups", case("none", setup=refusing), case("after it")),
    asking("full only", case("not quick", is_quick=False)),
)


def held(x):
    """Does not come to an end while the test has not seen it."""

    def run():
        while (path := os.environ.get(TRACE)) and "go" not in Path(path).read_text():
            time.sleep(0.05)
        return x * x

    return run


HELD = (
    asking("first", case("one"), case("two")),
    asking("second", case("held", (*GOOD, Contestant("held", "rival", held))), case("last")),
)
WHERE = tuple(replace(contestant, prepare=lambda x: os.getpid) for contestant in GOOD)
PLACES = ("of the contestant", "of its judgement", "where the judge was made")


def judging(which, x):
    return partial(number_of, which, os.getpid())


def number_of(which, made_in, answered_in):
    return float((answered_in, os.getpid(), made_in)[which])


APART = (
    asking(
        "apart",
        *(case(name, WHERE, check=partial(judging, which)) for which, name in enumerate(PLACES)),
    ),
)
"""The error that is found is the number of a process, which the name of the case says."""

TWICE = (asking("same", case("name"), case("name")),)
PLAIN = (asking("plain", case("one")),)
