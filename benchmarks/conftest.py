"""Makes ``pytest benchmarks`` time, where the project's tests skip what is timed."""

import pytest

from benchmarks.running.environment import default_device

collect_ignore = ["contestants/neural_tangents.py"]
"""It imports JAX, which need not be there; whoever uses it imports it when it is needed."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # this file is read before the options are used only if benchmarks/ was asked for by name
    config.option.benchmark_skip = False
    if default_device().type == "cuda":
        config.option.benchmark_timer = "benchmarks.running.environment.synchronised"
