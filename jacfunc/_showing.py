"""How results are shown: what returned functions are called, and tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

Progress: TypeAlias = Callable[[Any], Iterable[Any]]
"""Wraps a sequence, and shows how much of it is done, as ``tqdm.tqdm`` does."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def named(api: str, of: object, function: FunctionT) -> FunctionT:
    """The function, after it was told its name: the door that made it, and of what.

    Example:
        >>> import jacfunc
        >>> jacfunc.jacrev(jacfunc.jacrev(len)).__qualname__
        'jacrev(jacrev(len))'
    """
    if not torch.compiler.is_compiling():  # it can't trace that an attribute is set
        name = getattr(of, "__qualname__", type(of).__qualname__)
        function.__qualname__ = f"{api}({name.rpartition('.')[2]})"
    return function


def check_progress(api: str, progress: object) -> None:
    """Refuse what does not wrap a sequence."""
    if progress is not None and not callable(progress):
        raise TypeError(
            f"{api}: progress must be a function that wraps a sequence, got "
            f"{type(progress).__name__}. Pass tqdm.tqdm, or leave it out."
        )


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as HTML.

    Example:
        >>> from jacfunc._showing import html_table
        >>> html_table("a < b", [], [["1"]])
        '<table><caption>a &lt; b</caption><tr><td>1</td></tr></table>'
    """
    lines = [_row("th", head)] if head else []
    lines += [_row("td", row) for row in rows]
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
