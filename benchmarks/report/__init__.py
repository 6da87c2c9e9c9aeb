"""The report of a suite: one page, Markdown and a picture, beside the results files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.headline import as_picture
from benchmarks.report.markdown import as_markdown
from benchmarks.report.older import summaries
from benchmarks.report.page import as_html
from benchmarks.running.records import Run, replace

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


def write_report(stem: Path) -> list[Path]:
    """From ``STEM-cpu.json`` and ``STEM-cuda.json``; one may be missing.

    Raises:
        ValueError: both are missing, or one is no results file.
    """
    paths = {DEVICES[device]: stem.with_name(f"{stem.name}-{device}.json") for device in DEVICES}
    raw = {device: path for device, path in paths.items() if path.exists()}
    if not raw:
        raise ValueError(
            f"report: {' or '.join(path.name for path in paths.values())} must be in "
            f"{stem.parent}, got neither. Make one: python -m benchmarks run."
        )
    runs = {device: Run.read(path) if device in raw else None for device, path in paths.items()}
    found = list(summaries(stem.parent))
    device, first = next((device, run) for device, run in runs.items() if run is not None)
    texts = {
        "html": as_html(stem.name, runs, raw, found),
        "md": as_markdown(stem, runs, raw, found),
        "svg": as_picture(stem.name, device, first) + "\n",
    }
    written = {stem.with_name(f"{stem.name}.{ending}"): text for ending, text in texts.items()}
    for path, text in written.items():
        replace(path, text)
    return list(written)
