"""Can ``compare`` be trusted? The same code against itself, and against itself made slower."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.report.progress import watching
from benchmarks.report.tables import add, table
from benchmarks.running.records import Order
from benchmarks.running.suite import run_suite
from benchmarks.verdicts.comparing import SOUGHT, Change, compare

ONLY = "mlp 64, 16 →"  # cases of a few hundred microseconds to some ten milliseconds
PROCESSES, WANTED = 7, 0.95


def measure(device: torch.device) -> dict[str, Any]:
    """Three runs, one after the other; in the last jacfunc is slower by what must be found."""
    with tempfile.TemporaryDirectory() as directory, watching() as watch:
        order = Order("full", device.type, Path(directory), only=ONLY, processes=PROCESSES)
        first, again = run_suite(order, watch), run_suite(order, watch)
        slowed = run_suite(replace(order, planted=1.0 + SOUGHT), watch)
    rows = ((key, row) for key, case in first.cases.items() for row in case["results"])
    ours = {(key, row["contestant"]) for key, row in rows if row["family"] == "jacfunc"}
    planted = [c for c in compare(first, slowed).changes if (c.case, c.contestant) in ours]
    same = share("the same code", "equivalent", compare(first, again).changes)
    slower = share(f"{SOUGHT:.0%} slower", "regressed", planted)
    shares = [same, slower]
    return {"wanted": WANTED, "cases": ONLY, "processes": PROCESSES, "shares": shares}


def share(what: str, wanted: str, changes: Iterable[Change]) -> dict[str, Any]:
    """How many pairs of results there are by verdict, and the verdict that is wanted of all.
    Who has no answer, or is what others are compared with, is no pair.
    """
    verdicts = Counter(c.verdict for c in changes if c.verdict not in ("fails", "baseline"))
    pairs = verdicts.total()
    return {"what": what, "wanted": wanted, "verdicts": dict(verdicts), "pairs": pairs}


def right(share: Mapping[str, Any]) -> int:
    """The number of pairs of which a comparison says what it should."""
    return int(share["verdicts"].get(share["wanted"], 0))


def is_met(share: Mapping[str, Any]) -> bool:
    """Does a comparison say what it should of as many pairs as is wanted?"""
    return right(share) >= WANTED * int(share["pairs"])


def tables(body: Mapping[str, Any]) -> list[Table]:
    """A row each for what should be found."""
    heads = ("the second run is", "wanted", "all verdicts", "pairs", "found")
    caption = f"Wanted: {body['wanted']:.0%} or more"
    shown = table("What compare says of two runs", caption, *heads, words=3)
    for each in body["shares"]:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(each["verdicts"].items()))
        cells = each["what"], each["wanted"], counts, str(each["pairs"])
        found_share = f"{right(each) / each['pairs']:.1%}"
        add(shown, *cells, found_share, style="green" if is_met(each) else "red")
    return [shown]


def says(body: Mapping[str, Any]) -> str:
    """What a comparison of two runs finds."""
    same, slower = body["shares"]
    return (
        "`python -m benchmarks compare A.json B.json` says what became slower between two runs. Of "
        f"two runs of the same code it calls {right(same)} of {same['pairs']} pairs "
        f"{same['wanted']}; of code that was made {slower['what']}, it finds {right(slower)} of "
        f"{slower['pairs']} pairs {slower['wanted']} ({{source}})."
    )
