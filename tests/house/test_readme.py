"""The README's code runs, links lead somewhere, and no figure stands there that was not measured.

Figures stand in blocks that ``python -m benchmarks figures`` writes from the committed results; the
blocks here must be what it would write, and outside of them nothing may look like a measured claim.
"""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.report.readme import BLOCK, FIGURES, files, filled, main
from benchmarks.running.records import Run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GALLERY = ROOT / "docs/gallery/README.md"

# written by tests/house/test_coverage.py, which holds every cell of it
GENERATED = {ROOT / "docs/coverage.md"}
TEXTS = pytest.mark.parametrize(
    "path", [path for path in files(ROOT) if path not in GENERATED], ids=lambda path: path.name
)

CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
CLAIM = re.compile(
    r"\d+\.\d+"
    r"|\d[\d,]*(?:\.\d+)?\s*(?:×(?!\s*\d)|%|times\b|[mµn]?s\b|seconds\b|minutes\b|[KMGT]i?B\b)"
    r"|\d[^.;:]{0,40}\b(?:faster|slower|cheaper)\b"
    r"|\b(?:percent|(?:twice|half) (?:as|the time|the memory)\b)"
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")

ALLOWED = {
    "Python 3.11 or newer": "a version",
    "`torch.func` 2.13 gives": "a version",
    "keepachangelog.com": "a name",
}


def claims(text: str) -> list[str]:
    """What looks measured in the prose outside of blocks, with some words around it."""
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    prose = " ".join(CODE.sub(" ", BLOCK.sub("", text)).split())
    return [prose[max(0, found.start() - 30) : found.end() + 20] for found in CLAIM.finditer(prose)]


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch's loop is oneDNN's")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_is_said_of_recurrent_layers_is_so(kind):
    layer, x = getattr(torch.nn, kind)(3, 2, batch_first=True), torch.randn(4, 5, 3)
    params = {name: param.detach() for name, param in layer.named_parameters()}

    def func(params, x):
        return torch.func.functional_call(layer, params, (x[None],))[0]

    per_sample = torch.vmap(torch.func.jacrev(func), (None, 0))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(func, (None, 0))(params, x)
    if kind == "LSTM":
        one = torch.func.jacrev(func)(params, x[1])["weight_hh_l0"]
        torch.testing.assert_close(per_sample(params, x)["weight_hh_l0"][1], one)
    else:
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            per_sample(params, x)


@TEXTS
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_readme_links_to_what_follows():
    assert len(re.findall(r"\]\(([^)#]+)\)", README)) >= 3


@TEXTS
def test_blocks_are_what_the_results_files_give(path):
    text = path.read_text()
    assert filled(text, ROOT) == text, "run: python -m benchmarks figures"
    assert text.count("<!-- figures:") == len(BLOCK.findall(text))


@pytest.mark.parametrize("name", FIGURES)
def test_a_block_names_its_command_and_its_file(name):
    block = FIGURES[name](ROOT)
    assert re.search(r"`python -m benchmarks [a-z]", block)
    named = re.findall(r"`(benchmarks/results/[\w-]+\.json)`", block)
    assert named
    if not block.startswith("Not measured yet"):
        for file in named:
            assert (ROOT / file).exists(), file


def test_every_block_is_in_the_readme():
    assert {found[1] for found in BLOCK.findall(README)} == FIGURES.keys()


@TEXTS
def test_what_looks_measured_stands_in_a_block(path):
    if path != GALLERY:
        assert claims(path.read_text()) == []


@pytest.mark.parametrize(
    "claim",
    [
        "It takes 0.64–0.76 of the time.",
        "It is 3× as fast.",
        "It is 12 times faster than that.",
        "A call takes 40 ms on one thread.",
        "The peak falls by 30 %.",
        "It holds 2 GB at once.",
        "Of 16 outputs it is faster.",
        "It is within a few percent.",
        "It is twice as fast.",
    ],
)
def test_a_measured_claim_would_be_seen(claim):
    assert claims(f"A line before. {claim}")
    assert not claims(f"<!-- figures: regret -->\n{claim}\n<!-- end -->")


def test_the_gallerys_prose_says_what_its_scripts_print():
    """tests/house/test_gallery.py holds the scripts to what is printed in each section."""
    sections = GALLERY.read_text().split("\n## ")[1:]
    assert len(sections) == 11
    for section in sections:
        prose, printed = section.split("```")[:2]
        shown = [float(number) for number in NUMBER.findall(printed)]
        told = re.findall(r"(?<!\d)(\d+\.\d+|\d+(?= %))( %)?", prose)
        assert told
        for number, percent in told:
            digits = len(number.partition(".")[2])
            scale = 100 if percent else 1
            assert any(f"{scale * value:.{digits}f}" == number for value in shown), number


def full_run(*ratios):
    """A case a ratio of ours to the baseline."""
    cases = {
        f"hessians/{number}": {
            "question": "hessians",
            "asks": "How should a Hessian be taken?",
            "case": str(number),
            "ours": "jacfunc",
            "axis": "",
            "baseline": "torch.func",
            "sizes": {},
            "results": [
                {"contestant": name, "family": name, "status": "ok", "seconds": {"1": took}}
                for name, took in (("jacfunc", ratio), ("torch.func", 1.0))
            ],
        }
        for number, ratio in enumerate(ratios)
    }
    return Run("full", {"device_name": "A chip", "threads": 1}, {}, cases)


def test_the_headline_is_of_the_full_run(tmp_path):
    full_run(0.25, 0.5, 2.0).write(tmp_path / "benchmarks/results/full-cpu.json")
    (tmp_path / "README.md").write_text("<!-- figures: headline -->\nold\n<!-- end -->\n")
    assert main(tmp_path) == [tmp_path / "README.md"]
    written = (tmp_path / "README.md").read_text()
    row = "| How should a Hessian be taken? | jacfunc | torch.func | 0.50 | 0.25–2.00 | 2 of 3 |"
    assert row in written
    assert "A chip, 1 thread" in written
    assert "`benchmarks/results/full-cpu.json`" in written
    assert "CUDA: not measured" in written
    assert main(tmp_path) == []
