"""Files that no winners can be read from, or written into, in the place of Autotune's cache."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacfunc
from tests.kinds.bad_inputs import Bad

CONTENTS = {
    "words": "not JSON",
    "nothing": "",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "numbers by machine": '{"a": 3}',
}
ENTRIES: dict[str, Any] = {
    "a number": 3,
    "an unknown strategy": {"strategy": "Backward", "options": {}},
    "no options": {"strategy": "Reverse"},
    "an unknown option": {"strategy": "Reverse", "options": {"speed": 1}},
    "a bad option": {"strategy": "Reverse", "options": {"chunk_size": -3}},
    "a list for the strategy": {"strategy": ["Reverse"], "options": {}},
}


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def tuned(cache: Path) -> Any:
    return jacfunc.jacobian(doubled, strategy=jacfunc.Autotune(cache))(torch.ones(3))


def in_a_folder(call: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return call(Path(folder))


def with_contents(contents: str, folder: Path) -> Any:
    cache = folder / "winners.json"
    cache.write_text(contents)
    return tuned(cache)


def with_entry(entry: Any, folder: Path) -> Any:
    """With a file of Autotune's own in which the entry of the call was changed."""
    cache = folder / "winners.json"
    tuned(cache)
    ((where, entries),) = json.loads(cache.read_text()).items()
    other = folder / "other.json"  # the process remembers what it has measured for the first
    other.write_text(json.dumps({where: dict.fromkeys(entries, entry)}))
    return tuned(other)


def below_a_file(folder: Path) -> Any:
    (folder / "file").write_text("")
    return tuned(folder / "file" / "winners.json")


OURS = "cache must be a file that Autotune has written"
ROWS = [
    *(
        Bad("Autotune", f"a file with {name}", partial(in_a_folder, call), ValueError, OURS)
        for name, call in {
            **{name: partial(with_contents, text) for name, text in CONTENTS.items()},
            **{f"the entry {name}": partial(with_entry, entry) for name, entry in ENTRIES.items()},
            "none, as it is a folder": tuned,
            "none, as it is below a file": below_a_file,
        }.items()
    ),
    Bad(
        "Autotune",
        "a folder that can't be made",
        lambda: tuned(Path("/proc/nowhere/winners.json")),
        ValueError,
        "cache must be a file that can be written",
    ),
]
