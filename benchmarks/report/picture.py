"""The picture for the README: times beside the baseline's."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.running.records import Record, Run
from benchmarks.verdicts.intervals import beside

FAMILIES = ("jacfunc", "torch.func", "autograd", "rival", "JAX", "bound")
# panels; cases at most in one; and the samples of those that are shown
PANELS, ROWS, BATCH = 3, 6, 64
# questions with a panel each; where they were not asked, the first ones that were
FIRST = ("params", "ntk", "hessians")
STYLE: Any = {"svg.hashsalt": "jacfunc", "svg.fonttype": "none", "font.size": 8}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9}
STYLE |= {"axes.grid.axis": "x", "grid.alpha": 0.3}


def machine(run: Run) -> str:
    """Processor, threads and torch in a few words, for a title."""
    where = run.environment
    threads = "1 thread" if where.get("threads") == 1 else f"{where.get('threads')} threads"
    return f"{where.get('device_name')}, {threads}, torch {where.get('torch')}"


def draw(run: Run, title: str, path: Path) -> None:
    """Write the picture as SVG."""
    # only here: it takes a second, and is needed for nothing else
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["question"] for record in run.cases.values()))
    shown = [name for name in dict.fromkeys((*FIRST, *names)) if name in names][:PANELS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        figure.suptitle(title, fontsize=10)
        panels = figure.subplots(1, len(shown), squeeze=False).flat
        for panel, name in zip(panels, shown, strict=True):
            _ratios(panel, many(list(run.of(name))))
        figure.savefig(path, format="svg", metadata={"Date": None, "Title": title})


def shapes(records: Iterable[Record]) -> list[Record]:
    """The largest set of cases whose only differences are numbers of inputs and of outputs."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        others = {n: size for n, size in record["sizes"].items() if n not in ("inputs", "outputs")}
        if len(record["sizes"]) == len(others) + 2 and not record["axis"]:
            groups.setdefault((record["dtype"], str(others)), []).append(record)
    largest = max(groups.values(), key=len, default=[])
    is_grid = all(len({r["sizes"][side] for r in largest}) > 1 for side in ("inputs", "outputs"))
    return largest if is_grid and len(largest) > 3 else []


def many(records: Sequence[Record]) -> list[Record]:
    """The cases of many samples, where there are some."""
    large = [record for record in records if record["sizes"].get("batch") == BATCH]
    return (large or list(records))[:ROWS]


def _ratios(panel: Any, records: Sequence[Record]) -> None:
    """A row a case: the fastest of every family, its time in units of the baseline's."""
    rows = [fastest(record) for record in records]
    for n, family in enumerate(FAMILIES):
        points = [(row[family], place) for place, row in enumerate(rows) if family in row]
        if points:
            panel.plot(*zip(*points, strict=True), "osD^vP"[n], color=f"C{n}", label=family)
    panel.axvline(1.0, color="gray", linewidth=0.8)
    panel.set_yticks(range(len(records)), [record["case"] for record in records])
    panel.set(xscale="log", ylim=(len(records) - 0.5, -0.5))
    panel.set_title(f"{records[0]['question']}: time beside {records[0]['baseline']}")
    panel.grid(visible=True)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)


def fastest(record: Record) -> dict[str, float]:
    """The time of the fastest contestant of each family ÷ the baseline's."""
    times: dict[str, float] = {}
    for result in record["results"]:
        if ratio := beside(record, result["contestant"], record["baseline"]):
            family = result["family"]
            times[family] = min(ratio.mid, times.get(family, ratio.mid))
    return times
