"""One call of a module, as a function of its parameters and inputs, and the Jacobian of that."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import Sink
from jacfunc._calls import Derivation, FlatCall, ModuleOrigin
from jacfunc._faults import untracked
from jacfunc._lending import ModuleState
from jacfunc._linear_map import batch_size
from jacfunc._lock import alone
from jacfunc._modules.batch import SampledCall
from jacfunc._modules.checks import check_call, check_module_inputs, check_parameters, check_samples
from jacfunc._modules.independence import Independence
from jacfunc._modules.inputs import InputChoice
from jacfunc._remembered import CallKind
from jacfunc._samples import Subject
from jacfunc._torch import RandomState, inside_derivative, is_outermost, is_pushing
from jacfunc._trees import (
    Arguments,
    Split,
    check_batch,
    flatten,
    kinds_of,
    map_tensors,
    sample_dims,
    unflatten,
)
from jacfunc._types import Argnums, Leaves, Randomness, Tree, is_differentiable, is_tensor
from jacfunc.strategies import Evaluation, Strategy, evaluate

Wrt: TypeAlias = Literal["params", "inputs"]
POSITIONS = {"params": 0, "inputs": 1}
"""Among what a module is a function of."""


def argnums_of(api: str, wrt: Any) -> Argnums:
    """Positions of what is named."""
    wanted = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not wanted or any(w not in POSITIONS for w in wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"{api}: wrt must be 'params', 'inputs' or a tuple of both, got {wrt!r}. "
            "Choose single parameters with select=, single inputs with inputs=."
        )
    found = tuple(POSITIONS[w] for w in wanted)
    return found[0] if isinstance(wrt, str) else found


@dataclass(frozen=True)
class ModuleCall:
    """Arguments of one call, and what is to become of it."""

    api: str
    state: ModuleState
    argnums: Argnums
    choice: InputChoice
    arguments: Arguments
    with_buffers: bool
    create_graph: bool
    independence: Independence = field(default_factory=Independence)

    def of_all(self, strategy: Strategy, sink: Sink) -> Evaluation:
        """The Jacobian of the call as it is."""
        with self.undisturbed():
            return evaluate(self.api, self.flat_call(self.arguments, None), strategy, sink)

    def of_samples(
        self, strategy: Strategy, sink: Sink, in_dims: Tree, randomness: Randomness
    ) -> Evaluation:
        """The Jacobian of every sample."""
        batch = self.batch(sink, in_dims, randomness)
        with self.undisturbed():
            self.check_independent(batch)
            return batch.run(strategy)

    def batch(self, sink: Sink, in_dims: Tree, randomness: Randomness) -> SampledCall:
        """The call as one of many samples."""
        check_samples(self.api, self.state)
        every_dim = sample_dims(self.api, in_dims, self.arguments)
        split = Split.of(self.arguments, is_tensor)
        dims = [d for d, is_leaf in zip(every_dim, split.is_chosen, strict=True) if is_leaf]
        check_batch(self.api, split.leaves, dims)

        def call_of(leaves: Leaves) -> FlatCall:
            return self.flat_call(split.merge(leaves), every_dim)

        state, point = self.state, tuple(self.state.point)
        of_call = self.argnums, point, kinds_of(self.arguments), tuple(dims)
        kind = CallKind(state.module, of_call, state.origin or state)
        leaves, has_layers = split.leaves, not self._differentiates("inputs")
        return SampledCall(self.api, call_of, leaves, dims, kind, randomness, sink, has_layers)

    def check_independent(self, batch: SampledCall) -> None:
        """Refuse samples that depend on each other; inside a transform nothing can be compared."""
        if is_outermost():
            kind = batch.kind.kind
            self.independence.check(self.api, self.state, kind, lambda: self._subject(batch))

    def _subject(self, batch: SampledCall) -> Subject:
        """The module at the batch, in all its parameters but those of TorchScript."""
        state, split = self.state, Split.of(self.arguments, is_tensor)
        scripted = {
            id(param)
            for part in state.parts.values()
            if part.is_scripted
            for param in part.params.values()
        }
        values = {
            name: state.point.get(name, param)
            for name, param in state.params.items()
            if is_differentiable(param) and id(param) not in scripted
        }

        def whole(params: Leaves, leaves: Leaves) -> Leaves:
            args, kwargs = split.merge(leaves)
            with state.lent(dict(zip(values, params, strict=True))):
                output = state.parts[""].module(*args, **kwargs)
            return tuple(filter(is_differentiable, flatten(output)[0]))

        width = 0
        if self._differentiates("params"):
            width += sum(param.numel() for param in state.point.values())
        if self._differentiates("inputs"):
            chosen = filter(is_differentiable, flatten(self.choice.split(self.arguments))[0])
            width += sum(x.numel() for x in chosen) // batch_size(batch.leaves, batch.dims)
        by_inputs = self._differentiates("inputs")
        params, renewing = tuple(values.values()), state.as_evaluated
        return Subject(whole, params, batch.leaves, batch.dims, width, by_inputs, renewing)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The call is checked, and whatever it does, nothing outside is changed."""
        state = self.state
        check_call(self.api, state, self.create_graph)
        if self._differentiates("inputs"):
            check_module_inputs(self.api, self.choice.split(self.arguments))
        if self._differentiates("params"):
            check_parameters(self.api, state)
        with (
            alone(),
            RandomState(_tensors_of(state)).kept(),
            torch.set_grad_enabled(self.create_graph and torch.is_grad_enabled()),
            state.kept(self._point(), self.api),
        ):
            yield

    def flat_call(self, arguments: Arguments, dims: Sequence[int | None] | None) -> FlatCall:
        """As a function of leaves; of one sample where there are dims, which it then lacks."""
        # plans go by what this closes over, the module above all
        state, module, point = self.state, self.state.parts[""].module, self._point()
        hooks = state.hooks() if point else {}
        if hooks and self.create_graph:
            raise NotImplementedError(
                f"{self.api}: with create_graph=True parameters must have no hooks, which would "
                f"change second derivatives twice, got some on {', '.join(hooks)}. Remove them."
            )

        def call(params: dict[str, Tensor], chosen: Tree, arguments: Arguments) -> Tree:
            args, kwargs = self._renewed(chosen, arguments, dims)
            if is_pushing():
                state.check_forward()
            for name, some in hooks.items() if params else ():
                for hook in some if params[name].requires_grad else ():
                    params[name].register_hook(hook)
            with state.lent(params or point, (args, kwargs) if params else None):
                output = module(*args, **kwargs)
                if inside_derivative():  # where no graph is looked at
                    with untracked():
                        state.check_fresh(flatten(output)[0])
                if dims is not None:
                    output = map_tensors(self._of_one, output)
                return (output, state.buffers_now()) if self.with_buffers else output

        params = point if self._differentiates("params") else {}
        chosen = self.choice.split(arguments) if self._differentiates("inputs") else None
        every = (params, chosen, arguments)

        def kind() -> Hashable:
            # parameters keep their shapes: calls of one module differ in their inputs
            return self.argnums, tuple(point), kinds_of(arguments)

        derivation = Derivation(self.api, call, self.argnums, self.with_buffers)
        return FlatCall(derivation, every, {}, ModuleOrigin(state, kind))

    def _renewed(
        self, chosen: Tree, arguments: Arguments, dims: Sequence[int | None] | None
    ) -> Arguments:
        """The arguments with what was chosen, and copies of all else: a module may write there."""
        differentiated = {id(leaf) for leaf in flatten(chosen)[0] if is_differentiable(leaf)}
        if chosen is not None:
            arguments = self.choice.join(chosen, arguments)
        leaves, spec = flatten(arguments)
        fresh = [
            x if id(x) in differentiated or not isinstance(x, Tensor) else x.clone() for x in leaves
        ]
        if dims is not None:
            fresh = [x if d is None else x.unsqueeze(d) for x, d in zip(fresh, dims, strict=True)]
        renewed: Arguments = unflatten(spec, fresh)
        return renewed

    def _point(self) -> dict[str, Tensor]:
        """Parameters that are not constants."""
        return self.state.point if self.create_graph or self._differentiates("params") else {}

    def _differentiates(self, what: str) -> bool:
        argnums = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        return POSITIONS[what] in argnums

    def _of_one(self, output: Tensor) -> Tensor:
        """An output of one sample; the loss of a batch has no batch in front."""
        if output.dim() and output.shape[0] != 1:
            raise ValueError(
                f"{self.api}: per_sample needs every output to have the batch in front, got shape "
                f"{tuple(output.shape)} for a batch of one. Use a module that transposes it, or "
                "that returns other outputs alone."
            )
        return output.squeeze(0)


def _tensors_of(state: ModuleState) -> Leaves:
    return (*state.point.values(), *state.params.values(), *state.buffers.values())
