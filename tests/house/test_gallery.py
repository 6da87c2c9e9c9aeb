"""The gallery's scripts run, their numbers hold, and its text shows what they print."""

from __future__ import annotations

import re
import runpy
from itertools import pairwise
from math import log10
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


def test_exponents_of_lorenz_are_those_that_are_published(capsys):
    found = result_of("lyapunov", capsys)
    assert found["1"] == pytest.approx(0.9056, rel=0.02)
    assert abs(found["2"]) < 0.02
    assert found["3"] == pytest.approx(-14.5723, rel=0.02)
    assert found["sum"] == pytest.approx(-41 / 3, rel=1e-3)


def test_the_integral_of_divergences_is_the_log_determinant(capsys):
    found = result_of("continuous_flow", capsys)
    assert found["40"] < -6
    for coarse, fine in (("10", "20"), ("20", "40")):  # an error of fourth order: 16 times less
        assert found[coarse] - found[fine] == pytest.approx(log10(16), abs=0.3)
    assert found["all vectors"] < 1.5 * found["standard error"]
    assert found["plane"] == pytest.approx(1, abs=1e-2)


def test_a_network_solves_an_equation_by_gauss_newton_steps(capsys):
    found = result_of("pinn", capsys)
    assert found["Gauss-Newton"][-1] < 1e-6
    assert found["Adam"][-1] > 1e-3
    assert len(found["Adam"]) > 5 * len(found["Gauss-Newton"])


def test_patients_left_out_are_told_without_fitting_again(capsys):
    found = result_of("leave_one_out", capsys)
    assert 0.99 < found["first order"] < found["with leverage"] < found["at new weights"]
    assert found["at new weights"] > 0.999
    assert found["told"] == pytest.approx(found["refits"], rel=2e-3)
    assert found["refits"] > 1.05 * found["training"]


def test_vibrations_are_those_of_the_closed_form(capsys):
    found = result_of("vibrations", capsys)
    assert found["energy"] == pytest.approx(-97.348815, abs=1e-6)  # Wales and Doye 1997
    assert found["zero modes"] == 6
    assert found["lowest"] > 1
    assert found["asymmetry"] < 1e-12
    assert found["error"] < 1e-12


def test_natural_gradients_come_to_the_ground_state(capsys):
    found = result_of("monte_carlo", capsys)
    assert found["last"] == pytest.approx(found["ground state"], rel=1e-3)
    assert found["first"] > 1.2 * found["ground state"]


def test_laplace_torch_takes_jacobians_from_here(capsys):
    reason = "laplace-torch is not installed; benchmarks/rivals.txt pins it: pip install it to run"
    pytest.importorskip("laplace", reason=reason)
    found = result_of("laplace_backend", capsys)
    for name in ("Jacobians", "gradients", "chances", "variances"):
        assert found[name] < 1e-5


def test_the_gallery_shows_every_script():
    assert SHOWN.keys() == {path.stem for path in GALLERY.glob("*.py")}
