"""Opens recurrent layers: a linear layer of all steps' inputs, and one of the state at each step.

Torch's own can't be batched, so under vmap samples would have no recurrent layers at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc.layers._rules import opening, visible

HiddenState: TypeAlias = tuple[Tensor, ...]
"""The hidden state ``[N, H]``, and the state of the cell if it has one."""

Step: TypeAlias = Callable[[Tensor, Tensor, HiddenState], HiddenState]
"""The next state from the projected input, the projected hidden state, and the state."""

PADDED = (
    *("input", "hx", "params", "has_biases", "num_layers", "dropout", "train"),
    *("bidirectional", "batch_first"),
)
PACKED = ("data", "batch_sizes", *PADDED[1:-1])


def lstm_step(inputs: Tensor, hidden: Tensor, state: HiddenState) -> HiddenState:
    """The step of an LSTM: the cell has a memory, and gates to write, keep and read it."""
    entry, forget, cell, output = (inputs + hidden).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + entry.sigmoid() * cell.tanh()
    return output.sigmoid() * memory.tanh(), memory


def gru_step(inputs: Tensor, hidden: Tensor, state: HiddenState) -> HiddenState:
    """The step of a GRU; the reset gate acts on the projected state with its bias."""
    resets, updates, news = zip(inputs.chunk(3, -1), hidden.chunk(3, -1), strict=True)
    new = (news[0] + (resets[0] + resets[1]).sigmoid() * news[1]).tanh()
    return (new + (updates[0] + updates[1]).sigmoid() * (state[0] - new),)


def tanh_step(inputs: Tensor, hidden: Tensor, state: HiddenState) -> HiddenState:
    """The step of a plain recurrent layer with tanh."""
    return ((inputs + hidden).tanh(),)


def relu_step(inputs: Tensor, hidden: Tensor, state: HiddenState) -> HiddenState:
    """The step of a plain recurrent layer with ReLU."""
    return ((inputs + hidden).relu(),)


@dataclass(frozen=True)
class Weights:
    """The weights of one direction of one layer."""

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None

    @classmethod
    def of(cls, params: Sequence[Tensor], has_biases: bool) -> Weights:
        """The weights from a list in torch's order, in which a projection comes last."""
        biases = params[2:4] if has_biases else (None, None)
        return cls(*params[:2], *biases, *params[4 if has_biases else 2 :])

    def next(self, step: Step, projected: Tensor, state: HiddenState) -> HiddenState:
        """The state after a step, from its projected input."""
        new = step(projected, F.linear(state[0], self.hidden, self.hidden_bias), state)
        return new if self.projection is None else (F.linear(new[0], self.projection), *new[1:])


@dataclass(frozen=True)
class Layers:
    """All directions of all layers, as torch's functions take them."""

    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool

    def run(
        self, step: Step, values: Tensor, sizes: Sequence[int], first: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """All hidden states of the last layer, and the last states of all layers.

        ``values[Σ sizes, I]`` hold, for one step after the other, the sequences that still run.
        """
        directions = 2 if self.bidirectional else 1
        each = len(self.params) // (self.num_layers * directions)
        last: list[HiddenState] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.train:
                values = F.dropout(values, self.dropout)
            outputs = []
            for is_backward in (False, True)[:directions]:
                number = len(last)
                params = self.params[number * each : (number + 1) * each]
                weights = Weights.of(params, self.has_biases)
                start = tuple(x[number] for x in first)
                output, end = _one_direction(step, weights, values, sizes, start, is_backward)
                outputs.append(output)
                last.append(end)
            values = torch.cat(outputs, -1)
        return values, tuple(torch.stack(states) for states in zip(*last, strict=True))


def _one_direction(
    step: Step,
    weights: Weights,
    values: Tensor,
    sizes: Sequence[int],
    first: HiddenState,
    is_backward: bool,
) -> tuple[Tensor, HiddenState]:
    """All hidden states, and the last state of each sequence, from their first states."""
    steps = F.linear(values, weights.inputs, weights.input_bias).split(list(sizes))
    outputs: list[Tensor] = []
    ends: list[HiddenState] = []
    order = list(zip(steps, sizes, strict=True))[:: -1 if is_backward else 1]
    running = order[0][1]
    state = tuple(x[:running] for x in first)
    for projected, size in order:
        if size < running:
            ends.append(tuple(x[size:] for x in state))
            state = tuple(x[:size] for x in state)
        elif size > running:
            starts = (x[running:size] for x in first)
            state = tuple(torch.cat(both) for both in zip(state, starts, strict=True))
        state = weights.next(step, projected, state)
        # from here on the state is no parameter, in whose uses rules are looked for
        step, running = AS_ONE.get(step, step), size
        outputs.append(state[0])
    last = (torch.cat(parts) for parts in zip(state, *ends[::-1], strict=True))
    return torch.cat(outputs[:: -1 if is_backward else 1]), tuple(last)


def sequences(step: Step, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """All hidden states, and the last ones, of padded or packed sequences."""
    is_packed = "data" in kwargs or (len(args) > 3 and isinstance(args[3], tuple | list))
    names = PACKED if is_packed else PADDED
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    layers = Layers(**{name: named[name] for name in PADDED[2:-1]})
    first = _states(named["hx"])
    if is_packed:
        output, last = layers.run(step, named["data"], named["batch_sizes"].tolist(), first)
        return output, *last
    steps = named["input"].transpose(0, 1) if named["batch_first"] else named["input"]
    length, size = steps.shape[:2]
    output, last = layers.run(step, steps.flatten(0, 1), [size] * length, first)
    output = output.unflatten(0, (length, size))
    return output.transpose(0, 1) if named["batch_first"] else output, *last


def cell(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """One step of a recurrent layer."""
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    new = weights.next(step, F.linear(input, w_ih, b_ih), _states(hx))
    return new if len(new) > 1 else new[0]


def _states(hx: Tensor | Sequence[Tensor]) -> HiddenState:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


STEPS: Mapping[Step, Sequence[Callable[..., Any]]] = {
    lstm_step: (torch.lstm, torch.lstm_cell),
    gru_step: (torch.gru, torch.gru_cell),
    tanh_step: (torch.rnn_tanh, torch.rnn_tanh_cell),
    relu_step: (torch.rnn_relu, torch.rnn_relu_cell),
}

AS_ONE: Mapping[Step, Step] = {step: visible(step) for step in STEPS}
"""Steps as single operations, of which fewer have to be recorded."""

for of_state, (of_sequences, of_step) in STEPS.items():
    opening(of_sequences)(partial(sequences, of_state))
    opening(of_step)(partial(cell, of_state))
