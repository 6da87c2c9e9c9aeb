"""The figures in the README and the docs, written from the committed results files.

A figure stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``, and nowhere else; the
function of that name below writes what is there, with the command and the file it comes from.
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.running.records import Record, Run
from benchmarks.verdicts.intervals import is_contested, number, ratios, winners

BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RESULTS = "benchmarks/results"
WIDTH = 100


def main(root: Path) -> list[Path]:
    """Write the blocks anew in every file that has some; the files that changed."""
    changed = []
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        if (written := filled(text, root)) != text:
            path.write_text(written, encoding="utf-8")
            changed.append(path)
    return changed


def files(root: Path) -> list[Path]:
    """Where figures may stand."""
    return [*sorted(root.glob("*.md")), *sorted(root.glob("docs/**/*.md"))]


def filled(text: str, root: Path) -> str:
    """The text with its blocks as the results files have them.

    Raises:
        KeyError: a block has a name that no function here has.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{FIGURES[found[2]](root)}\n{found[4]}", text)


def headline(root: Path) -> str:
    """A row a question: our time beside the baseline's, and how often we are the fastest."""
    path = root / RESULTS / "full-cpu.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks run --suite full` writes `{_name(path)}`."
    run = Run.read(path)
    questions = dict.fromkeys(record["question"] for record in run.cases.values())
    rows = [row for name in questions if (row := _row([*filter(is_contested, run.of(name))]))]
    head = ("question", "time of", "÷ that of", "median", "range", "fastest or tied")
    table = [_line(head), _line("---" for _ in head), *map(_line, rows)]
    where = f"{run.environment['device_name']}, {_threads(run.environment['threads'])}"
    source = _source("run --suite full", path)
    cuda = path.with_name("full-cuda.json")
    other = f"; on CUDA in `{_name(cuda)}`." if cuda.exists() else "; on CUDA: not measured."
    parts = ["\n".join(table), _wrapped(f"{where}; {source}{other}")]
    picture = path.with_name("full.svg")
    if picture.exists():
        parts.insert(0, f"![who is the fastest, where]({_name(picture)})")
    return "\n\n".join(parts)


def _row(records: Sequence[Record]) -> tuple[str, ...] | None:
    if not (found := ratios(records)):
        return None
    others = dict.fromkeys(name for name, _ in found)
    times = [ratio for _, ratio in found]
    won = sum(record["ours"] in winners(record) for record in records)
    middle, *ends = map(number, (statistics.median(times), min(times), max(times)))
    beside = next(iter(others)) if len(others) == 1 else "the fastest other"
    counted = f"{won} of {len(records)}"
    return records[0]["asks"], records[0]["ours"], beside, middle, _range(*ends), counted


def overhead(root: Path) -> str:
    """What `jacrev` of small functions takes beside torch.func's, at both levels."""
    path = root / RESULTS / "overhead-cpu.json"
    found = _read(path)
    cases = found["results"]
    ratios = {
        level: [case["ratio"]["median"] for case in cases if case["level"] == level]
        for level in ("top level", "vmap")
    }
    spans = {level: _range(f"{min(r):.2f}", f"{max(r):.2f}") for level, r in ratios.items()}
    sizes = [case["inputs"] for case in cases]
    return _wrapped(
        "On small functions `jacfunc.jacrev` drives plain autograd instead of functorch: on MLPs "
        f"of width {found['width']} with {min(sizes)} to {max(sizes)} inputs and outputs it takes "
        f"{spans['top level']} of the time of `torch.func.jacrev` at the top level and "
        f"{spans['vmap']} under vmap ({_source('overhead', path)}, medians of {found['rounds']} "
        "rounds)."
    )


def regret(root: Path) -> str:
    """How near `auto` and `autotune` come to the best strategy picked by hand."""
    path = root / RESULTS / "regret-cpu.json"
    found = _read(path)
    cases = len(found["results"])
    told = {
        name: f"{part['target']:.2f}{{}} in {round(part['within'] * cases)} of {cases} cases "
        f"(median {part['median']:.2f}, worst {part['worst']:.2f})"
        for name, part in found["summary"].items()
    }
    by_hand = " times that of the best strategy picked by hand"
    return _wrapped(
        f'The time that `"auto"` takes is at most {told["auto"].format(by_hand)}; that of '
        f'`"autotune"` is at most {told["autotune"].format("")} ({_source("regret", path)}).'
    )


def budget(root: Path) -> str:
    """What it costs to keep to a tenth of the memory."""
    path = root / RESULTS / "budget-cpu.json"
    cases = _read(path)["results"]
    ratios = [case["ratio"] for case in cases]
    kept = sum(case["taken"] <= case["budget"] for case in cases)
    share = round(statistics.median(case["unchunked"] / case["budget"] for case in cases))
    return _wrapped(
        f"Held to 1/{share} of the memory that they take without chunks, {kept} of {len(cases)} "
        f"Jacobians keep to it, and take {_range(number(min(ratios)), number(max(ratios)))} of the "
        f"time of the best chunk picked by hand ({_source('budget', path)})."
    )


def trust(root: Path) -> str:
    """What a comparison of two runs finds."""
    path = root / RESULTS / "trust-cpu.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks trust` writes `{_name(path)}`."
    same, slower = _read(path)["shares"]

    def told(share: Mapping[str, Any]) -> str:
        return f"{share['verdicts'].get(share['wanted'], 0)} of {share['pairs']} pairs"

    return _wrapped(
        "`python -m benchmarks compare A.json B.json` says what became slower between two runs. Of "
        f"two runs of the same code it calls {told(same)} {same['wanted']}; of code that was made "
        f"{slower['what']}, it finds {told(slower)} {slower['wanted']} "
        f"({_source('trust', path)})."
    )


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low}–{high}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _source(command: str, path: Path) -> str:
    """Where the numbers of a block come from, and how to get them again."""
    return f"`python -m benchmarks {command}`, `{_name(path)}`"


def _name(path: Path) -> str:
    return f"{RESULTS}/{path.name}"


def _read(path: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


FIGURES: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "overhead": overhead,
    "regret": regret,
    "budget": budget,
    "trust": trust,
}
