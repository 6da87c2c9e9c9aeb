"""The figures in the README and the docs, written from the committed results files.

A figure stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``, and nowhere else; the
function of that name writes what is there, with the command and the file that it comes from.
"""

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.report import advice
from benchmarks.running.records import Record, Run, read
from benchmarks.studies import STUDIES
from benchmarks.verdicts.intervals import is_contested, number, ratios, span, winners

BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RESULTS = "benchmarks/results"
WIDTH, UNBROKEN = 100, "\N{NO-BREAK SPACE}"


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
    """The text with its blocks as the results files have them."""
    return BLOCK.sub(lambda block: f"{block[1]}{FIGURES[block[2]](root)}\n{block[4]}", text)


def headline(root: Path) -> str:
    """A row a question: our time beside the baseline's, and how often we are the fastest."""
    name = f"{RESULTS}/full-cpu.json"
    if not (root / name).exists():
        return f"Not measured yet: `python -m benchmarks run --suite full` writes `{name}`."
    run = Run.read(root / name)
    questions = dict.fromkeys(record["question"] for record in run.cases.values())
    rows = [row for name in questions if (row := _row([*filter(is_contested, run.of(name))]))]
    head = ("question", "time of", "÷ that of", "median", "range", "fastest or tied")
    lines = [_line(head), _line("---" for _ in head), *map(_line, rows)]
    threads = run.environment["threads"]
    where = f"{run.environment['device_name']}, {threads} thread{'s' * (threads != 1)}"
    cuda = f"{RESULTS}/full-cuda.json"
    other = f"on CUDA in `{cuda}`." if (root / cuda).exists() else "on CUDA: not measured."
    end = _wrapped(f"{where}; `python -m benchmarks run --suite full`, `{name}`; {other}")
    picture = f"{RESULTS}/full.svg"
    first = [f"![who is the fastest, where]({picture})"] if (root / picture).exists() else []
    return "\n\n".join([*first, "\n".join(lines), end])


def _row(records: Sequence[Record]) -> tuple[str, ...] | None:
    beside, times = ratios(records)
    if not times:
        return None
    won = sum(record["ours"] in winners(record) for record in records)
    middle, counts = number(statistics.median(times)), f"{won} of {len(records)}"
    return records[0]["asks"], records[0]["ours"], beside, middle, span(times), counts


def regret(root: Path) -> str:
    """How near auto and autotune come to the best strategy that is picked by hand."""
    name, parts = f"{RESULTS}/full-cpu.json", []
    if not (root / name).exists():
        return headline(root)
    cases = Run.read(root / name).cases.values()
    for chooser, bound in (("auto", 1.10), ("autotune", 1.05)):
        found = [ratio for case in cases if (ratio := advice.regret(case, f"jacfunc {chooser}"))]
        share = f"{bound:.2f} times that in {sum(r <= bound for r in found)} of {len(found)} cases"
        ends = f"median {number(statistics.median(found))}, worst {number(max(found))}"
        parts.append(f'of `"{chooser}"` is at most {share} ({ends})')
    said = f"Beside the best strategy picked by hand, the time {'; '.join(parts)}"
    return _wrapped(f"{said} (`python -m benchmarks run --suite full`, `{name}`).")


def study(kind: str, root: Path) -> str:
    """What a study says in a sentence, from its file."""
    name = f"{RESULTS}/{kind}-cpu.json"
    if not (root / name).exists():
        return f"Not measured yet: `python -m benchmarks {kind}` writes `{name}`."
    says = STUDIES[kind].says(read(root / name))
    return _wrapped(says.replace("{source}", f"`python -m benchmarks {kind}`, `{name}`"))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrapped(text: str) -> str:
    # a command stays in one line, as readers copy it
    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", UNBROKEN), text)
    filled = textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
    return filled.replace(UNBROKEN, " ")


FIGURES: dict[str, Callable[[Path], str]] = {"headline": headline, "regret": regret}
FIGURES |= {kind: partial(study, kind) for kind in STUDIES}
