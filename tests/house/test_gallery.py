"""The gallery's scripts run, their numbers hold, and its text shows what they print."""

from __future__ import annotations

import re
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

GALLERY = Path(__file__).parents[2] / "docs/gallery"
SHOWN = dict(
    re.findall(
        r"\]\((\w+)\.py\).*?```\n(.*?)```", (GALLERY / "README.md").read_text(), flags=re.DOTALL
    )
)
NUMBER = re.compile(r"\d+\.\d+")


def result_of(name: str, capsys: pytest.CaptureFixture[str]) -> Any:
    result = runpy.run_path(str(GALLERY / f"{name}.py"))["main"]()
    printed, shown = capsys.readouterr().out, SHOWN[name]
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split()
    # another processor rounds otherwise, and training carries that on
    expected = pytest.approx([float(number) for number in NUMBER.findall(shown)], rel=0.1, abs=0.02)
    assert [float(number) for number in NUMBER.findall(printed)] == expected
    return result


def test_a_wide_network_does_what_kernel_regression_does(capsys):
    found = result_of("ntk_regression", capsys)
    differences = [agreement.difference for agreement in found.values()]
    widest = found[max(found)]
    # four times the width: half the difference in theory, less than all of it in any case
    assert all(wider < 0.8 * narrower for narrower, wider in pairwise(differences))
    assert widest.difference < 0.08
    assert widest.same_class > 0.95
    assert widest.network_accuracy > 0.8
    assert abs(widest.network_accuracy - widest.kernel_accuracy) < 0.03


def test_laplace_is_less_sure_of_what_is_turned(capsys):
    found = result_of("laplace", capsys)
    for name in ("last layer", "diagonal"):
        for angle in (30, 45):
            (loss, error), (loss_before, error_before) = found[name, angle], found["network", angle]
            assert loss < 0.8 * loss_before
            assert error < error_before - 0.05
            assert loss < 1.1 * found["temperature", angle][0]
        assert found[name, 0][0] < found["network", 0][0] + 0.1
    assert found["network", 0][0] < 0.25


def test_planted_images_are_found_by_projected_gradients(capsys):
    found = result_of("influence", capsys)
    assert found["relative influence"] > 0.9
    assert found["relative influence"] > found["cosine"] > found["influence"]


def test_no_loss_grows_by_jacobian_descent(capsys):
    found = result_of("jacobian_descent", capsys)
    by_images, by_jacobian = found["mean over images"], found["Jacobian descent"]
    assert by_jacobian.worsened == 0
    assert by_images.worsened > 0.04
    assert by_jacobian.rare > by_images.rare + 0.4
    assert by_jacobian.common > 0.85


def test_the_gallery_shows_every_script():
    assert SHOWN.keys() == {path.stem for path in GALLERY.glob("*.py")}
