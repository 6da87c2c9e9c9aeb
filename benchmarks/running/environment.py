"""Where a measurement was made: enough to judge it, nothing that names the machine."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

import jacfunc
from jacfunc._memory import free_bytes

LIBRARIES = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""For libraries: one thread, no GPU memory beforehand; looking for a GPU must not touch it."""


def pin(threads: int = 1) -> None:
    """Fix threads and precision, so that runs can be compared.
    On a busy machine a second thread makes small models many times slower. TF32 would make right
    answers wrong by 1e-3.
    """
    os.environ.update(LIBRARIES)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def default_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, threads and load, without host names or paths."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jacfunc": jacfunc.__version__,
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "memory_available": free_bytes(device),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def load_average() -> float:
    """Processes waiting to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, marked where files have been changed since.
    Results do not count: a run writes them while it goes on.
    """
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    files = (":(top)", ":(top,exclude)benchmarks/results")
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"], check=True).stdout.strip()
        changed = git(["git", "diff", "--name-only", "HEAD", "--", *files], check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
