"""The tensors of a function that are parameters, or views of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import means_more
from jacfunc._errors import Refused, UnseenWrite
from jacfunc._factored.learned import Outdated
from jacfunc._factored.use import KnownUse, Path, Use, UsedPart, View, holds_tensors
from jacfunc._layouts import NoLayout, Placing
from jacfunc._torch import below_transforms, untracked
from jacfunc.layers import FormOf, Rule

UNSEEN_WRITE = (
    "a parameter must be written into by operations that Python sees, or from the first call on, "
    "got a write by others, which has changed it. Write into a copy of it."
)


@dataclass(eq=False)
class TrackedParameter:
    """A tensor that a function has, which is a parameter or a view of one."""

    number: int
    handle: Tensor
    """The tensor, known by its identity."""
    twin: Tensor
    """Operations with a rule get it in place of the handle."""
    path: Path
    """The views that lead from the parameter to the handle."""
    memory: Tensor
    """The handle without the wrappers of transforms: its version counts the writes into it."""
    version: int
    """The version of the memory when it was tracked: a later one tells of a write."""


@dataclass(eq=False)
class UnruledUse:
    """Parameters, by number, that operations without a rule have got as arguments."""

    numbers: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """Parameters that were written into, or may have been."""


@dataclass
class TrackedParameters:
    """Parameters, and views of them, by the identities of the tensors that a function has.

    Args:
        lent: numbers of the parameters that are no copies, which must not be written into.
        unruled: is told which parameters operations without a rule get.
        hooked: numbers of operations that are not to be differentiated by their rules.
    """

    lent: Set[int]
    unruled: UnruledUse
    hooked: set[int]
    by_id: dict[int, TrackedParameter] = field(default_factory=dict)

    def track(self, number: int, handle: Tensor, twin: Tensor, path: Path = ()) -> None:
        """Track a tensor that is parameter ``number``, or the view of it that the path makes."""
        memory = below_transforms(handle)
        tracked = TrackedParameter(number, handle, twin, path, memory, memory._version)
        self.by_id[id(handle)] = tracked

    def track_views(
        self, whole: TrackedParameter, view: View, result: Any, are_parts: Sequence[bool]
    ) -> None:
        """Track the views that a call has made of a tensor, those that are parts of it."""
        # tuples: the function may change its lists later
        args = tuple(tuple(a) if isinstance(a, list) else a for a in view.args)
        kwargs = {k: tuple(a) if isinstance(a, list) else a for k, a in view.kwargs.items()}
        twins = view.func(whole.twin, *args, **kwargs)
        is_single = not isinstance(result, tuple | list)
        views, of_twin = ([result], [twins]) if is_single else (result, twins)
        with untracked():
            for item, handle in enumerate(views):
                if are_parts[item]:
                    step = View(view.func, args, kwargs, None if is_single else item)
                    self.track(whole.number, handle, of_twin[item], (*whole.path, step))

    def note_unruled(self, values: Iterable[Any], may_write_unseen: bool = False) -> None:
        """Note the parameters among the arguments of an operation without a rule.

        Nothing tells whether the operation writes into them.
        """
        for value in values:
            if tracked := self.by_id.get(id(value)):
                is_lent = tracked.number in self.lent
                if is_lent and tracked.memory._version != tracked.version:
                    raise UnseenWrite(UNSEEN_WRITE)
                self.unruled.numbers.add(tracked.number)
                if is_lent:
                    raise Refused("a parameter that is no copy may be written into")
                if may_write_unseen:
                    self.unruled.written.add(tracked.number)
            elif type(value) is not Tensor and isinstance(value, tuple | list):
                self.note_unruled(value, may_write_unseen)

    def note_hook(self, tensor: Tensor, uses: Sequence[Use]) -> None:
        """Note the operations among ``uses`` that a tensor with a hook came out of.

        A pullback that goes on from there to others captures what comes before the hook.

        Raises:
            Outdated: if there is one: the next evaluation takes it without its rule.
        """
        with untracked():
            node = below_transforms(tensor).grad_fn
        if numbers := {use.key[0] for use in uses if use.last is node}:
            self.hooked |= numbers
            raise Outdated

    def find(self, value: Any) -> TrackedParameter | None:
        """The tracked parameter that a value is, if nothing has written into it."""
        tracked = self.by_id.get(id(value))
        return tracked if tracked is not None and self.is_as_tracked(tracked) else None

    def is_as_tracked(self, tracked: TrackedParameter) -> bool:
        """Has nothing written into a tracked tensor?"""
        is_written = tracked.memory._version != tracked.version
        return not is_written and tracked.number not in self.unruled.written

    def written(self) -> set[int]:
        """Numbers of the parameters that were written into.

        Raises:
            UnseenWrite: if one of them is no copy.
        """
        written = {x.number for x in self.by_id.values() if x.memory._version != x.version}
        if written & self.lent:
            raise UnseenWrite(UNSEEN_WRITE)
        return written


@dataclass(eq=False)
class RuledCall:
    """A call of an operation with a rule: its arguments, and the parameters that the rule covers.

    Both are by the names that the rule has for them.
    """

    number: int
    rule: Rule
    func: Callable[..., Any]
    named: dict[str, Any]
    params: dict[str, TrackedParameter] = field(default_factory=dict)

    def forms(self, placing: Placing, params: TrackedParameters) -> Mapping[str, FormOf]:
        """The form of each argument that may be a parameter; none where one has no samples in it.

        Sparse tensors of all samples can't be had from inside vmap.
        """
        tensors = {name: x for name, x in self.named.items() if isinstance(x, Tensor)}
        # torch reads some numbers from tensors, of which no sample has one of its own
        numbers = [n for n in tensors if type(self.rule.defaults[n]) in (bool, int, float)]
        if not self.named or numbers or not all(map(_is_usual, tensors.values())):
            return {}
        of_params = [name for name, x in tensors.items() if id(x) in params.by_id]
        every = placing.of_parameters(self.named, of_params)
        try:
            for name, x in tensors.items():
                if name not in every:
                    every[name] = placing.of_all((self.number, name), x, self.func, self.rule)
        except NoLayout:
            return {}
        return self.rule.forms_of(**{**self.named, **every})

    def known(self) -> KnownUse | None:
        """What later evaluations are to know of the call; None if a tensor is not dense or free."""
        tensors = dict[str, int | None]()
        for name, value in self.named.items():
            if isinstance(value, Tensor):
                param = self.params.get(name)
                tensors[name] = None if param is None else param.number
                if value.layout is not torch.strided:
                    return None
            elif holds_tensors(value):
                return None
        return KnownUse(self.func, tensors)

    def is_like(self, known: KnownUse, placing: Placing, params: TrackedParameters) -> bool:
        """Is this call like one of an earlier evaluation, with parameters in the same places?

        If it is, the parameters are noted, and every other tensor among the arguments is replaced
        by the tensor of all samples.
        """
        named, of_params = self.named, self.params
        if known.func is not self.func or placing.listener is not None:
            return False
        tensors, left = known.tensors, len(known.tensors)
        for name, value in named.items():
            if not isinstance(value, Tensor):
                if holds_tensors(value):
                    return False
                continue
            left -= 1
            param = params.by_id.get(id(value))
            number = None if param is None else param.number
            if tensors.get(name, -1) != number or not _is_usual(value):
                return False
            if param is None:
                try:
                    key = self.number, name
                    named[name] = placing.of_all(key, value, self.func, self.rule)
                except NoLayout:
                    return False
            elif params.is_as_tracked(param):
                of_params[name] = param
            else:
                return False
        return not left

    def known_parts(self, placing: Placing) -> list[UsedPart]:
        """The parts of parameters that this call uses, which is like one of an earlier evaluation.

        Raises:
            Outdated: if the rule does not cover the same parameters.
        """
        forms = self.rule.forms_of(**self.named | placing.of_parameters(self.named, self.params))
        if not self.params.keys() <= forms.keys():
            raise Outdated
        return self.parts(forms)

    def parts(self, forms: Mapping[str, FormOf]) -> list[UsedPart]:
        """The parts of parameters that it uses."""
        return [(param.number, param.path, forms[name]) for name, param in self.params.items()]


def add_parts(uses: Iterable[tuple[Use, RuledCall]], placing: Placing) -> None:
    """Add to each use the parts of parameters that its call uses; all are like earlier calls.

    Raises:
        Outdated: if a rule does not cover the same parameters.
    """
    for use, call in uses:
        use.parts = call.known_parts(placing)


def _is_usual(tensor: Tensor) -> bool:
    """Is it dense, and has its class no ``__torch_function__`` of which no rule knows?"""
    kind = type(tensor)
    return tensor.layout is torch.strided and (kind is Tensor or not means_more(kind))
