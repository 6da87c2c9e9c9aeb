"""Studies beside the suite: what budgets, first calls, ladders and jacfunc's own Python cost.
Each has ``measure(device)``, which gives the body of its results file, and what is told of that:
``tables(body)``, and a sentence for the README, ``says(body)``.
"""

from pathlib import Path

from benchmarks.studies import budget, first_call, ladder, overhead

STUDIES = {"budget": budget, "overhead": overhead, "first_call": first_call, "ladder": ladder}


def files(folder: Path) -> list[Path]:
    """Results files of studies that are there, the CPU's first."""
    paths = [folder / f"{kind}-{device}.json" for kind in STUDIES for device in ("cpu", "cuda")]
    return [path for path in paths if path.exists()]
