"""Where parameters are used: seen while a function runs, by the parameter's identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Refused
from jacfunc._factored.tracked import UNSEEN_WRITE, TrackedParameter, UnruledUse
from jacfunc._factored.use import Use
from jacfunc._factored.views import METADATA, RAW_MEMORY, VIEWS, Path, View, is_part
from jacfunc._faults import TAKES_DERIVATIVES, untracked
from jacfunc._linear_map import Anchor, nodes_of_call
from jacfunc._torch import at_once, below_transforms, innermost, mapped, mapped_anyway, of_samples
from jacfunc.layers import FormOf, Rule, table

MOST_PARTS = 32
"""Of so many pieces of a parameter each is looked at; of more, the ordinary engine is faster."""


class UseRecorder(TorchFunctionMode):
    """While it is entered, every use of a tracked parameter that has a rule is recorded.

    Args:
        size: how many samples there are.
        lent: numbers of parameters that are no copies, so that nobody may write into them.
        touched: what is noticed of the others.
    """

    def __init__(self, size: int, lent: Set[int], touched: UnruledUse) -> None:
        super().__init__()
        self._lent, self._touched = lent, touched
        self._found: list[Use] = []
        self._kept: list[tuple[Tensor, int]] = []
        self._size = size
        self._tracked: dict[int, TrackedParameter] = {}
        self._level = innermost()
        self._rules, self._opened = table().rules, table().opened

    def found(self) -> list[Use]:
        """What was recorded.

        Raises:
            Refused: if what went into one was written into later, as autograd does.
            RuntimeError: if a parameter that is no copy was written into where nobody sees it.
        """
        with untracked():
            if any(x._version != version for x, version in self._kept):
                raise Refused("what went into a layer was written into after it")
            written = {t.number for t in self._tracked.values() if not t.is_intact}
        if written & self._lent:
            raise RuntimeError(UNSEEN_WRITE)
        self._touched.given.update(written)
        self._touched.written.update(written)
        return self._found

    def track(self, number: int, held: Tensor, twin: Tensor, path: Path = ()) -> None:
        """From here on, ``held`` is parameter ``number``, or the part of it that the path is."""
        version = below_transforms(held)._version
        self._tracked[id(held)] = TrackedParameter(number, held, twin, path, version)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # met by every operation: as short as it can be
        kwargs = kwargs or {}
        if func in TAKES_DERIVATIVES and self._sees():
            raise Refused("the function takes a derivative itself, of what may stand for others")
        is_held = self._holds(args) or self._holds(kwargs.values())
        is_used = is_held and self._sees()
        if func in self._opened and (is_used or self._is_mapped()):
            with self:
                return self._opened[func](*args, **kwargs)
        if is_used and func in VIEWS:
            return self._view(func, args, kwargs)
        if is_used and func in self._rules:
            return self._use(self._rules[func], func, args, kwargs)
        if is_held and func is Tensor.register_hook:
            raise Refused("a parameter has a hook, which layers' factors pass by")
        if is_held and func not in METADATA:
            self._touch((*args, *kwargs.values()), func in RAW_MEMORY)
        return func(*args, **kwargs)

    def _holds(self, values: Iterable[Any]) -> bool:
        """Is something tracked among arguments, or in lists of them?"""
        for value in values:
            if id(value) in self._tracked:
                return True
            if isinstance(value, tuple | list) and self._holds(value):
                return True
        return False

    def _touch(self, values: Iterable[Any], is_bared: bool = False) -> None:
        """An operation gets these, and who knows whether it writes into them."""
        for value in values:
            if found := self._tracked.get(id(value)):
                is_lent = found.number in self._lent
                if is_lent and not found.is_intact:
                    raise RuntimeError(UNSEEN_WRITE)
                self._touched.given.add(found.number)
                if is_lent:
                    raise Refused("a parameter that is no copy may be written into")
                if is_bared:
                    self._touched.written.add(found.number)
            elif isinstance(value, tuple | list):
                self._touch(value, is_bared)

    def _sees(self) -> bool:
        """Not where nothing is differentiated, nor inside another transform."""
        return torch.is_grad_enabled() and innermost() == self._level

    def _is_mapped(self) -> bool:
        """Under vmap, what is made of other operations runs where it may not as a whole."""
        return self._level is not None and innermost() == self._level

    def _find(self, value: Any) -> TrackedParameter | None:
        found = self._tracked.get(id(value))
        if found is None or not found.is_intact or found.number in self._touched.written:
            return None
        return found

    def _view(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The views are tracked, too."""
        found, parts = self._find(args[0]) if args else None, func(*args, **kwargs)
        # only where a parameter's entries lie side by side, a view of it is one of J's rows, too
        if found is None or not (found.path or found.twin.is_contiguous()):
            self._touch((*args, *kwargs.values()))
            return parts

        several = list(parts) if isinstance(parts, tuple | list) else [parts]
        shown = [is_part(held, found.held, _flat(args[1:], kwargs)) for held in several]
        if len(several) > MOST_PARTS or not all(shown):
            self._touch(args)
        if len(several) > MOST_PARTS or not any(shown):
            return parts
        # lists may hold other numbers later
        options = tuple(tuple(a) if isinstance(a, list) else a for a in args[1:])
        named = {k: tuple(a) if isinstance(a, list) else a for k, a in kwargs.items()}
        twins = func(found.twin, *options, **named)
        for item, held in enumerate(several):
            if shown[item]:
                is_one = held is parts
                view = View(func, options, named, None if is_one else item)
                twin = twins if is_one else twins[item]
                with untracked():
                    self.track(found.number, held, twin, (*found.path, view))
        return parts

    def _use(
        self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        named = rule.named(args, kwargs) or {}
        with untracked():
            forms = self._forms(rule, named) if named else {}
            found = {name: self._find(named[name]) for name in forms}
            covered = {name: tracked for name, tracked in found.items() if tracked is not None}
            twins = {name: tracked.twin.view_as(tracked.twin) for name, tracked in covered.items()}
        if not covered:
            self._touch((*args, *kwargs.values()))
            return func(*args, **kwargs)
        by_place = zip(rule.defaults, args, strict=False)
        args = tuple(twins.get(name, value) for name, value in by_place)
        kwargs = {name: twins.get(name, value) for name, value in kwargs.items()}
        self._touch((*args, *kwargs.values()))
        if rule.keeps_lead and args:
            out = at_once(func, args, kwargs, self._level)
        else:
            out = func(*args, **kwargs)
        with untracked():
            parts = [(t.number, t.path, forms[name]) for name, t in covered.items()]
            return self._recorded(out, parts, twins.values(), named.values())

    def _forms(self, rule: Rule, named: Mapping[str, Any]) -> Mapping[str, FormOf]:
        """By argument, all tensors seen as of all samples; none of sparse ones, which can't be."""
        if not all(map(_is_plain, named.values())):
            return {}
        return rule.forms_of(**{name: self._shown(value) for name, value in named.items()})

    def _recorded(
        self,
        out: Tensor,
        parts: Sequence[tuple[int, Path, FormOf]],
        twins: Iterable[Tensor],
        inputs: Iterable[Any],
    ) -> Tensor:
        """What came out, as one that differs from sample to sample."""
        out = mapped_anyway(out, self._size, self._level)
        values, dim = mapped(out, self._level)
        if values.requires_grad:
            ends = {twin.grad_fn for twin in twins}
            nodes = nodes_of_call(values, ends)
            last = values.grad_fn
            anchor = Anchor.behind(values)
            self._found.append(Use(anchor, dim, parts, last, ends, nodes, values.nbytes))
            self._kept += [
                (x, x._version)
                for x in (below_transforms(x) for x in inputs if isinstance(x, Tensor))
                if not x.is_inference()
            ]
        return out

    def _shown(self, value: Any) -> Any:
        """A tensor as of all samples, ``[B, *shape]``."""
        is_shown = isinstance(value, Tensor)
        return of_samples(value, self._size, self._level) if is_shown else value


def _is_plain(value: Any) -> bool:
    """Sparse tensors are not shown as of all samples."""
    return not isinstance(value, Tensor) or value.layout == torch.strided


def _flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Arguments, and what is in lists of them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
