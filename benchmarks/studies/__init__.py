"""Studies beside the suite: what jacfunc's choices, budgets and Python cost; is compare right?

Each is a file with ``measure(device, ...)``, which gives the body of its results file, and with
what is told of such a body: ``tables(body)``, and a sentence for the README, ``says(body)``.
"""

from pathlib import Path

from benchmarks.studies import budget, overhead, regret, trust

STUDIES = {"regret": regret, "budget": budget, "overhead": overhead, "trust": trust}


def files(folder: Path) -> list[Path]:
    """Results files of studies that are there, the CPU's first."""
    paths = [folder / f"{kind}-{device}.json" for kind in STUDIES for device in ("cpu", "cuda")]
    return [path for path in paths if path.exists()]
