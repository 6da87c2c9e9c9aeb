"""The README's code runs, and its numbers are those of the committed results."""

import json
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_overhead_claim_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks/results/overhead-cpu.json").read_text())
    claims = re.search(
        r"takes (\d\.\d\d)–(\d\.\d\d) of the time of `torch.func.jacrev` at the top level and "
        r"(\d\.\d\d)–(\d\.\d\d) under vmap",
        " ".join(README.split()),
    )
    assert claims is not None
    for (low, high), level in zip(
        (claims.group(1, 2), claims.group(3, 4)), ("top level", "vmap"), strict=True
    ):
        cases = [case for case in results["results"] if case["level"] == level]
        ratios = [case["ratio"]["median"] for case in cases]
        assert len(ratios) == 16
        assert f"{min(ratios):.2f}" == low
        assert f"{max(ratios):.2f}" == high
