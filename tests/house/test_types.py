"""A user's script has typed results: mypy finds in it what is written there, and it runs."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
SCRIPT = Path(__file__).parents[1] / "kinds/users_types.py"


def test_results_have_the_types_that_the_script_says(tmp_path):
    # not with the options of this repository: users have their own
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    command = [sys.executable, "-m", "mypy", *options, SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs():
    runpy.run_path(str(SCRIPT))
