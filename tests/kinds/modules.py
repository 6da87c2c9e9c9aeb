"""The table of module kinds: a row is a module, the inputs it is called with, and what is known.

Each kind is tested for parameters and inputs, for the whole batch and per sample, by every
strategy. Whatever torch starts at zeros or ones (biases, the scales and statistics of norms) is
moved away from it, so that no derivative is trivial.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.kinds.programs import CubePushed, OldCube

B = 3  # samples in every batch


class Refusal(NamedTuple):
    """An error that is right: its words, why it can't work, and which calls it is for."""

    words: str
    why: str
    wrt: tuple[str, ...] = ("params", "inputs")
    modes: tuple[str, ...] = ("whole", "per sample")
    strategies: tuple[str, ...] = ("reverse", "looped", "forward", "auto")
    is_torchs: bool = False  # torch's own error, which says itself what to do


def no_forward(why: str, *wrt: str, words: str = "no forward mode") -> Refusal:
    """Forward mode is refused, everything else works."""
    return Refusal(words, why, wrt or ("params", "inputs"), strategies=("forward",))


def no_vmap(why: str) -> Refusal:
    """Nothing is refused, but samples run as a batch or one by one, not under vmap."""
    return Refusal("", why, modes=())


def coupled(why: str) -> Refusal:
    """Samples depend on each other: there is no Jacobian of one alone."""
    words = "samples that do not depend on each other"
    return Refusal(words, why, modes=("per sample",))


@dataclass(frozen=True)
class ModuleKind:
    """A module, and the inputs it is called with, batch first.

    ``is_random``: it draws random numbers, so that per sample it needs a word about them.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]] = dict
    is_random: bool = False
    refusals: tuple[Refusal, ...] = ()
    rtol: float = 1e-9

    @property
    def runs_under_vmap(self) -> bool:
        """Can all samples be taken at once by vmap?"""
        return all(refusal.modes for refusal in self.refusals)

    def refusals_of(self, wrt: str, mode: str, strategy: str) -> list[Refusal]:
        """Those for this call: torch decides which of them comes first."""
        return [
            refusal
            for refusal in self.refusals
            if wrt in refusal.wrt and mode in refusal.modes and strategy in refusal.strategies
        ]


def floats(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator)


def batch(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs: a batch of each shape."""
    return lambda: tuple(floats(B, *shape, seed=n + 1) for n, shape in enumerate(shapes))


def _prepared(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed costs more than the module
        module = build().to(dtype)
        with torch.no_grad():
            for param in module.parameters():
                if not param.is_complex():
                    param += 0.1 * torch.randn(param.shape, dtype=torch.float64).to(param.dtype)
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
    return module


def kind(
    name: str,
    build: Callable[[], nn.Module],
    *shapes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    inputs: Callable[[], tuple[Any, ...]] | None = None,
    **more: Any,
) -> ModuleKind:
    """A row: random inputs of the shapes of one sample, unless they are made."""
    made = inputs or batch(*shapes)
    return ModuleKind(name, lambda: _prepared(build, dtype), made, **more)


class Calls(nn.Module):
    """A module called by a function: picks from its output, or gives it keywords."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.call(self.inner, *inputs, **kwargs)


def warmed(module: nn.Module, *shape: int) -> nn.Module:
    """A lazy module with its shapes known."""
    with torch.no_grad():
        module(torch.zeros(shape))
    return module


# --- activations and linear maps ---


def activation(name: str, make: Callable[[], nn.Module], width: int = 4, **more: Any) -> ModuleKind:
    """Inside an MLP; ``width`` is what it makes of 4."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(width, 2))

    return kind(f"mlp {name}", build, (3,), **more)


NO_BATCHED_RRELU = (no_vmap("torch has no batching rule of it"),)

ACTIVATIONS = (
    activation("Identity", nn.Identity),
    activation("ReLU", nn.ReLU),
    activation("ReLU in place", lambda: nn.ReLU(inplace=True)),
    activation("ReLU6", nn.ReLU6),
    activation("GELU", nn.GELU),
    activation("GELU tanh", lambda: nn.GELU("tanh")),
    activation("SiLU", nn.SiLU),
    activation("Mish", nn.Mish),
    activation("Softplus", nn.Softplus),
    activation("ELU", nn.ELU),
    activation("ELU in place", lambda: nn.ELU(inplace=True)),
    activation("SELU", nn.SELU),
    activation("CELU", nn.CELU),
    activation("Tanh", nn.Tanh),
    activation("Sigmoid", nn.Sigmoid),
    activation("Hardtanh", nn.Hardtanh),
    activation("Hardswish", nn.Hardswish),
    activation("Hardsigmoid", nn.Hardsigmoid),
    activation("LeakyReLU", nn.LeakyReLU),
    activation("PReLU", nn.PReLU),
    activation("PReLU per channel", lambda: nn.PReLU(4)),
    activation("RReLU eval", lambda: nn.RReLU().eval(), refusals=NO_BATCHED_RRELU),
    activation("RReLU train", nn.RReLU, is_random=True, refusals=NO_BATCHED_RRELU),
    activation("GLU", nn.GLU, width=2),
    activation("Softmax", lambda: nn.Softmax(-1)),
    activation("LogSoftmax", lambda: nn.LogSoftmax(-1)),
    activation("Softmin", lambda: nn.Softmin(-1)),
    activation("Tanhshrink", nn.Tanhshrink),
    activation("Hardshrink", nn.Hardshrink),
    activation("Softshrink", nn.Softshrink),
    activation("Softsign", nn.Softsign),
    activation("LogSigmoid", nn.LogSigmoid),
    activation("Threshold", lambda: nn.Threshold(0.1, 20.0)),
)

LINEAR = (
    kind("Linear", lambda: nn.Linear(3, 2), (3,)),
    kind(
        "Linear float32",
        lambda: nn.Linear(3, 2),
        dtype=torch.float32,
        inputs=lambda: (floats(B, 3, dtype=torch.float32),),
        rtol=1e-5,
    ),
    kind(
        "Linear bfloat16",
        lambda: nn.Linear(3, 2),
        dtype=torch.bfloat16,
        inputs=lambda: (floats(B, 3, dtype=torch.bfloat16),),
        rtol=2e-2,
    ),
    kind("Linear no bias", lambda: nn.Linear(3, 2, bias=False), (3,)),
    kind("Linear of sequences", lambda: nn.Linear(3, 2), (2, 3)),
    kind("LazyLinear", lambda: warmed(nn.LazyLinear(2), 1, 3), (3,)),
    kind("Bilinear", lambda: nn.Bilinear(2, 3, 2), (2,), (3,)),
    kind(
        "Flatten Unflatten",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (2, 2))),
        (2, 2),
    ),
)

# --- convolutions, pooling, padding, resampling ---

CONVOLUTIONS = (
    kind("Conv1d", lambda: nn.Conv1d(2, 2, 3), (2, 5)),
    kind("Conv1d strided dilated", lambda: nn.Conv1d(1, 2, 2, stride=2, dilation=2), (1, 7)),
    kind(
        "Conv1d replicate", lambda: nn.Conv1d(1, 2, 3, padding=1, padding_mode="replicate"), (1, 4)
    ),
    kind("Conv2d", lambda: nn.Conv2d(1, 2, 3), (1, 4, 4)),
    kind("Conv2d groups", lambda: nn.Conv2d(4, 2, 2, groups=2), (4, 3, 3)),
    kind("Conv2d depthwise", lambda: nn.Conv2d(2, 4, 2, groups=2, bias=False), (2, 3, 3)),
    kind("Conv2d strided dilated", lambda: nn.Conv2d(1, 2, 2, (2, 1), dilation=(1, 2)), (1, 4, 4)),
    kind("Conv2d same", lambda: nn.Conv2d(1, 1, 3, padding="same"), (1, 2, 3)),
    kind(
        "Conv2d reflect", lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 3, 3)
    ),
    kind(
        "Conv2d circular", lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (1, 3, 3)
    ),
    kind(
        "Conv2d channels last",
        lambda: nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last),
        inputs=lambda: (floats(B, 2, 3, 3).to(memory_format=torch.channels_last),),
    ),
    kind("Conv3d", lambda: nn.Conv3d(1, 2, 2), (1, 2, 3, 3)),
    kind("LazyConv2d", lambda: warmed(nn.LazyConv2d(2, 2), 1, 1, 3, 3), (1, 3, 3)),
    kind("ConvTranspose1d", lambda: nn.ConvTranspose1d(1, 2, 2, stride=2), (1, 3)),
    kind("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 1, 2), (2, 2, 2)),
    kind(
        "ConvTranspose2d groups",
        lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2, bias=False),
        (2, 2, 2),
    ),
    kind(
        "ConvTranspose2d output padding",
        lambda: nn.ConvTranspose2d(1, 2, 2, stride=2, padding=1, output_padding=1),
        (1, 2, 2),
    ),
    kind("ConvTranspose3d", lambda: nn.ConvTranspose3d(1, 1, 2), (1, 2, 2, 2)),
)


def _unpool() -> nn.Module:
    class Unpool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.pool = nn.MaxPool2d(2, return_indices=True)
            self.unpool = nn.MaxUnpool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            pooled, where = self.pool(self.conv(x))
            return self.unpool(pooled, where)

    return Unpool()


def convolved(middle: nn.Module) -> nn.Module:
    """A module without parameters, after a convolution that has some."""
    return nn.Sequential(nn.Conv2d(1, 2, 1), middle)


POOLING = (
    kind("MaxPool1d", lambda: nn.MaxPool1d(2), (2, 4)),
    kind("MaxPool2d", lambda: convolved(nn.MaxPool2d(2, stride=1)), (1, 3, 3)),
    kind(
        "MaxPool2d ceil dilated", lambda: nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), (1, 4, 4)
    ),
    kind("MaxPool2d with indices", lambda: nn.MaxPool2d(2, return_indices=True), (1, 4, 4)),
    kind("MaxPool3d", lambda: nn.MaxPool3d(2), (1, 2, 4, 2)),
    kind("AvgPool1d", lambda: nn.AvgPool1d(2), (1, 4)),
    kind(
        "AvgPool2d",
        lambda: convolved(nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        (1, 3, 3),
    ),
    kind("AvgPool3d", lambda: nn.AvgPool3d(2), (1, 2, 4, 2)),
    kind("AdaptiveAvgPool1d", lambda: nn.AdaptiveAvgPool1d(2), (2, 3)),
    kind("AdaptiveAvgPool2d", lambda: convolved(nn.AdaptiveAvgPool2d((2, 1))), (1, 3, 3)),
    kind("AdaptiveAvgPool3d", lambda: nn.AdaptiveAvgPool3d(2), (1, 2, 3, 2)),
    kind("AdaptiveMaxPool1d", lambda: nn.AdaptiveMaxPool1d(2), (2, 3)),
    kind("AdaptiveMaxPool2d", lambda: convolved(nn.AdaptiveMaxPool2d(2)), (1, 3, 3)),
    kind("AdaptiveMaxPool3d", lambda: nn.AdaptiveMaxPool3d(1), (1, 2, 2, 2)),
    kind("LPPool1d", lambda: nn.LPPool1d(2.0, 2), (1, 4)),
    kind("LPPool2d", lambda: convolved(nn.LPPool2d(2.0, 2)), (1, 4, 2)),
    kind("LPPool3d", lambda: nn.LPPool3d(2.0, 2), (1, 2, 4, 2)),
    kind(
        "FractionalMaxPool2d",
        lambda: nn.FractionalMaxPool2d(2, output_size=3),
        (1, 5, 5),
        is_random=True,
    ),
    kind(
        "FractionalMaxPool3d",
        lambda: nn.FractionalMaxPool3d((1, 1, 2), output_size=(1, 1, 3)),
        (1, 2, 2, 7),
        is_random=True,
    ),
    kind("MaxUnpool2d", _unpool, (1, 4, 4)),
)

RESHAPING = (
    kind("ReflectionPad1d", lambda: nn.ReflectionPad1d(2), (1, 3)),
    kind("ReflectionPad2d", lambda: convolved(nn.ReflectionPad2d(1)), (1, 2, 2)),
    kind("ReflectionPad3d", lambda: nn.ReflectionPad3d(1), (1, 2, 2, 2)),
    kind("ReplicationPad1d", lambda: nn.ReplicationPad1d((1, 2)), (1, 2)),
    kind("ReplicationPad2d", lambda: convolved(nn.ReplicationPad2d(1)), (1, 2, 2)),
    kind("ReplicationPad3d", lambda: nn.ReplicationPad3d(1), (1, 1, 2, 2)),
    kind("ZeroPad2d", lambda: convolved(nn.ZeroPad2d(1)), (1, 2, 2)),
    kind("ConstantPad1d", lambda: nn.ConstantPad1d((1, 0), 3.0), (1, 3)),
    kind("CircularPad2d", lambda: convolved(nn.CircularPad2d(1)), (1, 2, 2)),
    kind("Upsample nearest", lambda: convolved(nn.Upsample(scale_factor=2)), (1, 2, 2)),
    kind("Upsample nearest-exact", lambda: nn.Upsample(5, mode="nearest-exact"), (1, 3)),
    kind("Upsample linear", lambda: nn.Upsample(5, mode="linear"), (2, 3)),
    kind("Upsample bilinear", lambda: convolved(nn.Upsample(3, mode="bilinear")), (1, 2, 2)),
    kind(
        "Upsample bilinear corners",
        lambda: nn.Upsample(3, mode="bilinear", align_corners=True),
        (1, 2, 2),
    ),
    kind("Upsample bicubic", lambda: convolved(nn.Upsample(3, mode="bicubic")), (1, 2, 2)),
    kind("Upsample trilinear", lambda: nn.Upsample(3, mode="trilinear"), (1, 2, 2, 1)),
    kind("PixelShuffle", lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2)), (1, 2, 2)),
    kind("PixelUnshuffle", lambda: convolved(nn.PixelUnshuffle(2)), (1, 2, 2)),
    kind(
        "ChannelShuffle", lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ChannelShuffle(2)), (1, 1, 2)
    ),
    kind("Unfold", lambda: convolved(nn.Unfold(2)), (1, 3, 2)),
    kind("Fold", lambda: nn.Sequential(nn.Linear(2, 2), nn.Fold((3, 2), 2)), (4, 2)),
)

# --- normalization ---

COUPLED = Refusal(
    r"batch normalization over the batch in .*Call module\.eval\(\), or leave per_sample out",
    "the statistics of a batch couple its samples",
    modes=("per sample",),
)


OLD_STYLE = (
    no_forward("an autograd.Function without jvp"),
    no_vmap("an autograd.Function of the old style"),
)

WRONG_LRN = (
    *OLD_STYLE,
    Refusal(
        "leaves out the other channels|no forward mode",
        "torch's backward pass is wrong",
        strategies=("reverse", "looped", "auto"),
    ),
)


def normed(norm: nn.Module, *, conv: bool = False, training: bool = True) -> nn.Module:
    first = nn.Conv2d(1, 2, 1) if conv else nn.Linear(3, 4)
    return nn.Sequential(first, norm, nn.Tanh()).train(training)


NORMS = (
    kind("BatchNorm1d eval", lambda: normed(nn.BatchNorm1d(4), training=False), (3,)),
    kind("BatchNorm1d train", lambda: normed(nn.BatchNorm1d(4)), (3,), refusals=(COUPLED,)),
    kind(
        "BatchNorm1d no statistics",
        lambda: normed(nn.BatchNorm1d(4, track_running_stats=False), training=False),
        (3,),
        refusals=(COUPLED,),
    ),
    kind(
        "BatchNorm1d momentum None",
        lambda: normed(nn.BatchNorm1d(4, momentum=None)),
        (3,),
        refusals=(COUPLED,),
    ),
    kind(
        "BatchNorm2d eval", lambda: normed(nn.BatchNorm2d(2), conv=True, training=False), (1, 2, 2)
    ),
    kind(
        "BatchNorm2d train",
        lambda: normed(nn.BatchNorm2d(2), conv=True),
        (1, 2, 2),
        refusals=(COUPLED,),
    ),
    kind("BatchNorm3d eval", lambda: nn.BatchNorm3d(2).eval(), (2, 1, 2, 2)),
    kind(
        "BatchNorm3d train",
        lambda: nn.BatchNorm3d(1, affine=False),
        (1, 1, 2, 2),
        refusals=(COUPLED,),
    ),
    kind("GroupNorm", lambda: normed(nn.GroupNorm(2, 4)), (3,)),
    kind("GroupNorm images", lambda: normed(nn.GroupNorm(1, 2), conv=True), (1, 2, 2)),
    kind("GroupNorm not affine", lambda: normed(nn.GroupNorm(2, 4, affine=False)), (3,)),
    kind("LayerNorm", lambda: normed(nn.LayerNorm(4)), (3,)),
    kind("LayerNorm no bias", lambda: normed(nn.LayerNorm(4, bias=False)), (3,)),
    kind("LayerNorm not affine", lambda: normed(nn.LayerNorm(4, elementwise_affine=False)), (3,)),
    kind("LayerNorm images", lambda: normed(nn.LayerNorm((2, 2, 2)), conv=True), (1, 2, 2)),
    kind("RMSNorm", lambda: normed(nn.RMSNorm(4)), (3,)),
    kind("RMSNorm not affine", lambda: normed(nn.RMSNorm(4, elementwise_affine=False)), (3,)),
    kind("InstanceNorm1d", lambda: nn.InstanceNorm1d(2), (2, 3)),
    kind(
        "InstanceNorm2d affine",
        lambda: normed(nn.InstanceNorm2d(2, affine=True), conv=True),
        (1, 2, 2),
    ),
    kind(
        "InstanceNorm2d tracking eval",
        lambda: normed(nn.InstanceNorm2d(2, track_running_stats=True), conv=True, training=False),
        (1, 2, 2),
    ),
    kind(
        "InstanceNorm2d tracking train",
        lambda: normed(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), conv=True),
        (1, 2, 2),
        refusals=(no_vmap("each sample would write into the one buffer"),),
    ),
    kind("InstanceNorm3d", lambda: nn.InstanceNorm3d(1), (1, 1, 2, 2)),
    kind("LocalResponseNorm", lambda: convolved(nn.LocalResponseNorm(2)), (1, 2, 2)),
    kind("CrossMapLRN2d", lambda: convolved(nn.CrossMapLRN2d(2)), (1, 2, 2), refusals=WRONG_LRN),
)

# --- embeddings ---


def ids(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (integers(5, B, *shape),)


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(5, 2, **options)


def bag(mode: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(5, 2, mode=mode, **options)


WRONG_EMBEDDING = no_forward(
    "torch's forward mode does not know these changes of the gradient",
    words="forward mode of embedding is wrong here",
)
NO_FORWARD_BAG = (no_forward("torch has no forward mode of bags"),)

EMBEDDINGS = (
    kind("Embedding", embedding(), inputs=ids(2)),
    kind("Embedding of a scalar", embedding(), inputs=ids()),
    kind("Embedding padding", embedding(padding_idx=1), inputs=ids(2)),
    kind(
        "Embedding max norm",
        embedding(max_norm=0.5),
        inputs=ids(2),
        refusals=(no_vmap("each sample would write norms into the one table"),),
    ),
    kind(
        "Embedding by frequency",
        embedding(scale_grad_by_freq=True),
        inputs=ids(2),
        refusals=(WRONG_EMBEDDING, coupled("gradients are divided by counts of the whole batch")),
    ),
    kind("Embedding sparse", embedding(sparse=True), inputs=ids(2)),
    kind(
        "Embedding in a net",
        lambda: nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2)),
        inputs=ids(2),
    ),
    kind("EmbeddingBag sum", bag("sum"), inputs=ids(3), refusals=NO_FORWARD_BAG),
    kind("EmbeddingBag mean", bag("mean"), inputs=ids(3), refusals=NO_FORWARD_BAG),
    kind("EmbeddingBag max", bag("max"), inputs=ids(3), refusals=NO_FORWARD_BAG),
    kind(
        "EmbeddingBag padding", bag("mean", padding_idx=1), inputs=ids(3), refusals=NO_FORWARD_BAG
    ),
    kind(
        "EmbeddingBag weights",
        lambda: Calls(
            nn.EmbeddingBag(5, 2, mode="sum"),
            lambda bag, ids, weights: bag(ids, per_sample_weights=weights),
        ),
        inputs=lambda: (integers(5, B, 3), floats(B, 3)),
        refusals=NO_FORWARD_BAG,
    ),
)

# --- recurrent layers ---


def _last_states() -> nn.Module:
    return Calls(
        nn.LSTM(2, 2, batch_first=True),
        lambda lstm, x: [state.transpose(0, 1) for state in lstm(x)[1]],
    )


class Packed(nn.Module):
    """Sequences of their own lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.gru(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]


class Unrolled(nn.Module):
    """A cell called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(x.shape[0], 2), x.new_zeros(x.shape[0], 2))
        steps = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            steps.append(self.head(state[0]))
        return torch.stack(steps, 1)


NO_BATCHED_RNN = no_vmap("torch's recurrent layers write into states that are not batched")


def recurrent(name: str, make: Callable[[], nn.Module], **more: Any) -> ModuleKind:
    """Only its output sequence, whose batch is in front."""
    return kind(
        name,
        lambda: Calls(make(), lambda layer, x: layer(x)[0]),
        (2, 2),
        refusals=(NO_BATCHED_RNN,),
        **more,
    )


RECURRENT = (
    recurrent("RNN", lambda: nn.RNN(2, 2, batch_first=True)),
    recurrent("RNN relu", lambda: nn.RNN(2, 2, nonlinearity="relu", batch_first=True)),
    recurrent("GRU", lambda: nn.GRU(2, 2, batch_first=True)),
    recurrent("GRU both ways", lambda: nn.GRU(2, 1, batch_first=True, bidirectional=True)),
    recurrent("LSTM", lambda: nn.LSTM(2, 2, batch_first=True)),
    recurrent("LSTM two layers", lambda: nn.LSTM(2, 1, 2, batch_first=True)),
    recurrent(
        "LSTM two layers both ways", lambda: nn.LSTM(2, 1, 2, batch_first=True, bidirectional=True)
    ),
    recurrent("LSTM projected", lambda: nn.LSTM(2, 3, batch_first=True, proj_size=2)),
    recurrent("LSTM no bias", lambda: nn.LSTM(2, 2, bias=False, batch_first=True)),
    recurrent(
        "LSTM dropout", lambda: nn.LSTM(2, 2, 2, dropout=0.5, batch_first=True), is_random=True
    ),
    kind("LSTM last states", _last_states, (2, 2), refusals=(NO_BATCHED_RNN,)),
    kind(
        "GRU with a state",
        lambda: Calls(
            nn.GRU(2, 2, batch_first=True),
            lambda gru, x, state: gru(x, state.transpose(0, 1).contiguous())[0],
        ),
        (2, 2),
        (1, 2),
    ),
    kind(
        "GRU packed",
        Packed,
        inputs=lambda: (floats(B, 3, 2), torch.tensor([2, 3, 1])),
        refusals=(
            no_vmap("samples have lengths of their own"),
            no_forward(
                "torch can't pack sequences with a tangent",
                words="no forward mode|can't push tangents forward",
            ),
        ),
    ),
    kind("RNNCell", lambda: nn.RNNCell(2, 2), (2,), (2,)),
    kind("GRUCell", lambda: nn.GRUCell(2, 2), (2,), (2,)),
    kind(
        "LSTMCell",
        lambda: nn.LSTMCell(2, 2),
        inputs=lambda: (floats(B, 2), (floats(B, 2, seed=2), floats(B, 2, seed=3))),
    ),
    kind("LSTMCell unrolled", Unrolled, (2, 2)),
)

# --- attention ---


def self_attention(attention: nn.Module, x: Tensor, **more: Any) -> Any:
    return attention(x, x, x, **more)


def attending(call: Callable[..., Any] = self_attention, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Calls(nn.MultiheadAttention(4, 2, batch_first=True, **options), call)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    settings = {"dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(4, 2, 3, **settings)


def _padding() -> dict[str, Tensor]:
    """The last position of the last samples is masked."""
    return {"mask": torch.tensor([[False, False], [False, True], [False, True]])}


class Fused(nn.Module):
    """Scaled dot product attention, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


ATTENTION = (
    kind("MultiheadAttention", attending(lambda m, x: m(x, x, x, need_weights=False)[0]), (2, 4)),
    kind("MultiheadAttention with weights", attending(), (2, 4)),
    kind(
        "MultiheadAttention weights of heads",
        attending(lambda m, x: m(x, x, x, average_attn_weights=False)),
        (2, 4),
    ),
    kind(
        "MultiheadAttention eval",
        lambda: attending(lambda m, x: m(x, x, x, need_weights=False)[0])().eval(),
        (2, 4),
    ),
    kind(
        "MultiheadAttention padding",
        attending(lambda m, x, mask: m(x, x, x, key_padding_mask=mask, need_weights=False)[0]),
        (2, 4),
        kwargs=_padding,
    ),
    kind(
        "MultiheadAttention mask",
        attending(lambda m, x: m(x, x, x, attn_mask=torch.ones(2, 2).triu(1).bool())[0]),
        (2, 4),
    ),
    kind(
        "MultiheadAttention cross",
        attending(lambda m, q, kv: m(q, kv, kv)[0], kdim=3, vdim=3),
        (2, 4),
        (3, 3),
    ),
    kind(
        "MultiheadAttention bias of keys",
        attending(lambda m, x: m(x, x, x)[0], add_bias_kv=True, add_zero_attn=True),
        (2, 4),
    ),
    kind(
        "MultiheadAttention dropout",
        attending(lambda m, x: m(x, x, x, need_weights=False)[0], dropout=0.5),
        (2, 4),
        is_random=True,
    ),
    kind("scaled dot product attention", Fused, (3, 4)),
    kind("TransformerEncoderLayer train", encoder_layer, (2, 4)),
    kind("TransformerEncoderLayer eval", lambda: encoder_layer(dropout=0.1).eval(), (2, 4)),
    kind(
        "TransformerEncoderLayer norm first gelu",
        lambda: encoder_layer(norm_first=True, activation="gelu"),
        (2, 4),
    ),
    kind(
        "TransformerEncoderLayer dropout",
        lambda: encoder_layer(dropout=0.3),
        (2, 4),
        is_random=True,
    ),
    kind(
        "TransformerEncoderLayer padding",
        lambda: Calls(
            encoder_layer().eval(), lambda layer, x, mask: layer(x, src_key_padding_mask=mask)
        ),
        (2, 4),
        kwargs=_padding,
    ),
    kind("TransformerEncoder", lambda: nn.TransformerEncoder(encoder_layer(), 2).eval(), (2, 4)),
    kind(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0, batch_first=True),
        (2, 4),
        (2, 4),
    ),
    kind(
        "Transformer",
        lambda: nn.Transformer(4, 2, 1, 1, 3, dropout=0.0, batch_first=True),
        (2, 4),
        (1, 4),
    ),
    kind(
        "Transformer causal",
        lambda: Calls(
            nn.Transformer(4, 2, 1, 1, 2, dropout=0.0, batch_first=True),
            lambda m, source, target: m(
                source,
                target,
                tgt_is_causal=True,
                tgt_mask=m.generate_square_subsequent_mask(2).double(),
            ),
        ),
        (2, 4),
        (2, 4),
    ),
)

# --- random layers ---


class Noise(nn.Module):
    """Draws its own numbers, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.spread(x)
        return self.mean(x) + torch.randn_like(spread) * spread.exp()


def noisy(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))


RANDOM = (
    kind("Dropout train", lambda: noisy(nn.Dropout(0.5)), (3,), is_random=True),
    kind("Dropout in place", lambda: noisy(nn.Dropout(0.5, inplace=True)), (3,), is_random=True),
    kind("Dropout eval", lambda: noisy(nn.Dropout(0.5)).eval(), (3,)),
    kind("Dropout p=0", lambda: noisy(nn.Dropout(0.0)), (3,)),
    kind("Dropout p=1", lambda: noisy(nn.Dropout(1.0)), (3,)),
    kind(
        "Dropout1d",
        lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.Dropout1d(0.5)),
        (1, 2),
        is_random=True,
    ),
    kind(
        "Dropout2d",
        lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Dropout2d(0.5)),
        (1, 1, 2),
        is_random=True,
    ),
    kind("Dropout3d", lambda: nn.Dropout3d(0.5), (4, 1, 1, 2), is_random=True),
    kind("AlphaDropout", lambda: noisy(nn.AlphaDropout(0.4)), (3,), is_random=True),
    kind("FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.4), (4, 1, 2), is_random=True),
    kind("reparametrized noise", Noise, (3,), is_random=True),
)

# --- parametrizations and sharing ---


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def orthogonal(map_name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        # double before, since the parametrization solves for its first value
        layer = nn.Linear(3, 3).double()
        return parametrizations.orthogonal(layer, orthogonal_map=map_name)

    return make


def pruned() -> nn.Module:
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", amount=3)
    return layer


class TiedDecoder(nn.Module):
    """An embedding whose table is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


class Autoencoder(nn.Module):
    """The decoder is the encoder's transpose, and a table of buffers is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("scale", torch.linspace(1.0, 2.0, 3))
        self.register_buffer("same_scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh((x * self.scale) @ self.weight)
        return (code @ self.weight.mT) * self.same_scale


class Thrice(nn.Module):
    """One layer called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


def twice_in_a_row() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def part_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


class LowRank(nn.Module):
    """A frozen layer with a trained correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


WRONG_SOLVE = no_vmap("torch's pushforwards of LU factors are wrong under two vmaps")

PARAMETRIZED = (
    kind(
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
        (3,),
    ),
    kind(
        "weight_norm conv",
        lambda: parametrizations.weight_norm(nn.Conv2d(1, 2, 2)),
        (1, 2, 3),
    ),
    kind(
        "spectral_norm train",
        lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
        (3,),
    ),
    kind(
        "spectral_norm eval", lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), (3,)
    ),
    kind(
        "spectral_norm by hook",
        lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
        (3,),
    ),
    kind("orthogonal matrix_exp", orthogonal("matrix_exp"), (3,)),
    kind("orthogonal cayley", orthogonal("cayley"), (3,), refusals=(WRONG_SOLVE,)),
    kind("orthogonal householder", orthogonal("householder"), (3,)),
    kind("symmetric weight", symmetric, (3,)),
    kind("pruned", pruned, (3,)),
    kind("tied decoder", TiedDecoder, inputs=ids(2)),
    kind("tied transpose", Autoencoder, (3,)),
    kind("called thrice", Thrice, (3,)),
    kind("twice in a Sequential", twice_in_a_row, (3,)),
    kind("part frozen", part_frozen, (3,)),
    kind("all frozen", lambda: nn.Linear(3, 2).requires_grad_(False), (3,)),
    kind("low rank adapter", LowRank, (3,)),
)

# --- containers, and state of every sort ---


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])])
        self.heads = nn.ModuleDict({"b": nn.Linear(3, 1), "a": nn.Linear(3, 2)})
        self.shifts = nn.ParameterList([torch.randn(3), torch.randn(())])
        self.scales = nn.ParameterDict({"z": torch.randn(3), "c": torch.randn(1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.layers[0](x) + self.shifts[0]) * self.scales["z"]
        x = self.layers[1][0](x) * self.shifts[1] + self.scales["c"]
        return {name: head(x) for name, head in self.heads.items()}


class Arithmetic(nn.Module):
    """Parameters without layers: a scalar, a matrix, an unused one, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.matrix = nn.Parameter(torch.randn(3, 2))
        self.unused = nn.Parameter(torch.randn(2))
        self.empty = nn.Parameter(torch.empty(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x.unsqueeze(-1) * self.matrix / self.temperature, 1)


class Counts(nn.Module):
    """Writes into its buffers: a counter, and an average of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.calls += 1
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * y.mean(0))
        return y.tanh()


class Reassigns(nn.Module):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.last
        self.last = y.detach().mean(0)
        return y.tanh()


class Remembers(nn.Module):
    """Keeps its activation as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.activation: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.activation = torch.tanh(self.layer(x))
        return self.activation.square()


class Quantizes(nn.Module):
    """Nearest codes with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 2)
        self.codes = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(-1)
        code = self.codes[nearest]
        return z + (code - z).detach(), (code - z.detach()).square().sum(-1)


class StopsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).square()


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    net[0].register_forward_hook(lambda _, inputs, output: output + inputs[0])
    return net


def backward_hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[1].register_full_backward_hook(lambda _, grad_in, grad_out: (grad_in[0] * 2,))
    return net


class ClipsGradient(nn.Module):
    """A hook on an activation, which changes the gradient that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 0.5)
        return y.tanh()


class InPlace(nn.Module):
    """Writes into its input, and into its own activations."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0).add_(self.shift)
        y = self.layer(x.tanh())
        y[:, 0] = 2.0 * y[:, 1]
        return y.exp_()


class WeightDecay(nn.Module):
    """Reads its parameters as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        penalty = sum(param.square().sum() for param in self.parameters())
        return self.net(x) + 0.1 * penalty


class Listed(nn.Module):
    """Keeps its parameters in a plain list too, and takes them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.all = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.all[0])


STATEFUL = (
    kind(
        "nested Sequential",
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh())),
            nn.Sequential(OrderedDict(last=nn.Linear(2, 2))),
        ),
        (3,),
    ),
    kind("containers", Containers, (3,)),
    kind("parameter arithmetic", Arithmetic, (3,)),
    kind(
        "counter and average",
        Counts,
        (3,),
        refusals=(no_vmap("each sample would write its average into the one buffer"),),
    ),
    kind("reassigned buffer", Reassigns, (3,)),
    kind("remembered activation", Remembers, (3,)),
    kind(
        "vector quantization",
        Quantizes,
        (3,),
        refusals=(no_forward("torch has no forward mode of cdist"),),
    ),
    kind("no_grad inside", StopsGradient, (3,)),
    kind("forward hooks", hooked, (3,)),
    kind(
        "backward hook",
        backward_hooked,
        (3,),
        refusals=(
            *OLD_STYLE[1:],
            no_forward("no tangent meets them", words="passes by the backward hooks of '1'"),
        ),
    ),
    kind(
        "tensor hook",
        ClipsGradient,
        (3,),
        refusals=(no_forward("no tangent meets them", words="passes by the hooks of tensors"),),
    ),
    kind("in place", InPlace, (3,)),
    kind("weight decay", WeightDecay, (3,)),
    kind("parameters in a plain list", Listed, (3,)),
)

# --- control flow, autograd of its own, other ways to run ---


class Branches(nn.Module):
    """Takes one of two layers by the value of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.positive if x.sum().item() > 0 else self.negative)(x)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.outer = nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=self.use_reentrant))


class CheckpointedAttention(nn.Module):
    """What is run again must attend by the same kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = Fused(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.attend, x, use_reentrant=False)).mean(1)


class CheckpointedSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


class Applies(nn.Module):
    def __init__(self, func: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.func = func

    def forward(self, x: Tensor) -> Tensor:
        return self.func(self.layer(x))


class Potential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum()


class Force(Potential):
    """The force of a learnt energy: a gradient is taken inside forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return -slope


class FunctionalForce(Potential):
    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(super().forward)(x)


class PerSampleNorms(nn.Module):
    """Vmaps inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.linalg.vector_norm(self.layer(row)))(x)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class MixedDtypes(nn.Module):
    """A float32 layer between float64 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.float())).double())

    def to(self, *_: Any, **__: Any) -> MixedDtypes:
        self.last.double()
        return self


class Spectral(nn.Module):
    """Complex numbers inside, and in a buffer; real at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("phase", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.gain * self.phase, n=4)

    def to(self, dtype: torch.dtype) -> Spectral:
        self.gain.data = self.gain.data.to(dtype)
        self.phase = self.phase.to(torch.complex128)
        return self


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double())


def traced() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double()
    return torch.jit.trace(net, floats(2, 3))


def graphed() -> nn.Module:
    return fx.symbolic_trace(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten()))


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))


class FakeQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.layer.weight, 0.01, 0, -128, 127)
        return torch.tanh(F.linear(x, weight, self.layer.bias))


class SparseAdjacency(nn.Module):
    """Messages by a product with a sparse buffer, all samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(2, 2)
        edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
        graph = torch.sparse_coo_tensor(edges, torch.ones(4), (3, 3), check_invariants=True)
        self.register_buffer("graph", graph)

    def forward(self, nodes: Tensor) -> Tensor:
        messages = self.message(nodes).transpose(0, 1)
        summed = torch.sparse.mm(self.graph, messages.flatten(1))
        return torch.tanh(summed.view_as(messages).transpose(0, 1))


class Adapts(nn.Module):
    """One step of gradient descent inside forward, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        params = dict(self.layer.named_parameters())

        def loss(params: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(self.layer, params, (x,)) - target).square().mean()

        slopes = torch.func.grad(loss)(params)
        adapted = {name: param - 0.1 * slopes[name] for name, param in params.items()}
        return torch.func.functional_call(self.layer, adapted, (x,))


COMPILED = (
    Refusal("TorchScript", "its code may take other parameters for constants", ("params",)),
    no_forward("after some calls torch gives zeros", words="zero in TorchScript"),
)

RUNNING = (
    kind(
        "branches on data",
        Branches,
        (3,),
        refusals=(
            no_vmap("samples may take different branches"),
            coupled("the batch as a whole chooses the branch"),
        ),
    ),
    kind("checkpoint", Checkpointed, (3,)),
    kind(
        "checkpoint reentrant",
        lambda: Checkpointed(use_reentrant=True),
        (3,),
        refusals=(
            *OLD_STYLE,
            Refusal("use_reentrant=False", "torch runs it under backward() alone"),
        ),
    ),
    kind("checkpointed attention", CheckpointedAttention, (2, 4)),
    kind("checkpoint sequential", CheckpointedSequence, (3,)),
    kind(
        "autograd function of old style", lambda: Applies(OldCube.apply), (3,), refusals=OLD_STYLE
    ),
    kind("autograd function of new style", lambda: Applies(CubePushed.apply), (3,)),
    kind(
        "autograd.grad inside",
        Force,
        (3,),
        refusals=(
            no_forward("autograd knows no tangents", words="can't push tangents forward"),
            no_vmap("torch.autograd.grad does not run inside functorch"),
        ),
    ),
    kind("torch.func.grad inside", FunctionalForce, (3,)),
    kind(
        "gradient step inside",
        Adapts,
        (3,),
        (2,),
        refusals=(coupled("the loss of the batch moves the parameters"),),
    ),
    kind("vmap inside", PerSampleNorms, (3,)),
    kind(
        "autocast inside",
        Autocast,
        dtype=torch.float32,
        inputs=lambda: (floats(B, 3, dtype=torch.float32),),
        rtol=2e-2,
    ),
    kind("mixed dtypes", MixedDtypes, (3,), rtol=1e-5),
    kind("complex inside", Spectral, (4,)),
    kind(
        "fake quantization",
        FakeQuantized,
        (3,),
        refusals=(no_forward("torch has none of fake quantization", "params"),),
    ),
    kind(
        "sparse adjacency",
        SparseAdjacency,
        (3, 2),
        refusals=(
            no_forward("torch has no forward mode of sparse products"),
            no_vmap("torch has no batching rule of sparse tensors"),
        ),
    ),
    kind("TorchScript script", scripted, (3,), refusals=COMPILED),
    kind("TorchScript trace", traced, (3,), refusals=COMPILED[:1]),
    kind("fx graph", graphed, (1, 3)),
    kind("DataParallel", lambda: nn.DataParallel(nn.Linear(3, 2)), (3,)),
    kind("averaged model", averaged, (3,)),
)

# --- losses and similarities ---


class Criterion(nn.Module):
    """A loss on top of a layer, with its target as an input."""

    def __init__(self, loss: nn.Module, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.loss = loss

    def forward(self, x: Tensor, *targets: Tensor, **more: Tensor) -> Tensor:
        return self.loss(self.layer(x), *targets, **more)


def criterion(
    name: str, make: Callable[[], nn.Module], target: Callable[[], Tensor], **more: Any
) -> ModuleKind:
    return kind(name, lambda: Criterion(make()), inputs=lambda: (floats(B, 3), target()), **more)


def targets() -> Tensor:
    return floats(B, 2, seed=5)


def classes() -> Tensor:
    return torch.tensor([1, 0, 1])


def probabilities() -> Tensor:
    return torch.softmax(targets(), -1)


def signs() -> Tensor:
    return torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)


class LogProbabilities(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(F.log_softmax(x, -1), target)


def ctc_inputs() -> tuple[Tensor, ...]:
    lengths = torch.full((B,), 4), torch.full((B,), 2)
    return floats(B, 4, 3), 1 + integers(2, B, 2), *lengths


class Alignment(nn.Module):
    """Connectionist temporal classification of sequences, batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.loss = nn.CTCLoss(reduction="none")

    def forward(self, x: Tensor, target: Tensor, frames: Tensor, length: Tensor) -> Tensor:
        return self.loss(F.log_softmax(self.layer(x), -1).transpose(0, 1), target, frames, length)


NO_FORWARD_LOSS = (no_forward("torch has no forward mode of this loss"),)

LOSSES = (
    kind("CosineSimilarity", lambda: nn.CosineSimilarity(), (3,), (3,)),
    kind("PairwiseDistance", lambda: nn.PairwiseDistance(), (3,), (3,)),
    criterion("MSELoss", lambda: nn.MSELoss(reduction="none"), targets),
    criterion("MSELoss mean", nn.MSELoss, targets),
    criterion("L1Loss", lambda: nn.L1Loss(reduction="none"), targets),
    criterion("SmoothL1Loss", lambda: nn.SmoothL1Loss(reduction="none"), targets),
    criterion("HuberLoss", lambda: nn.HuberLoss(reduction="none"), targets),
    criterion("CrossEntropyLoss", lambda: nn.CrossEntropyLoss(reduction="none"), classes),
    criterion("CrossEntropyLoss mean", nn.CrossEntropyLoss, classes),
    criterion(
        "CrossEntropyLoss smoothed",
        lambda: nn.CrossEntropyLoss(
            torch.tensor([1.0, 2.0]), label_smoothing=0.1, reduction="none"
        ),
        classes,
    ),
    criterion(
        "CrossEntropyLoss of probabilities",
        lambda: nn.CrossEntropyLoss(reduction="none"),
        probabilities,
    ),
    criterion("NLLLoss", lambda: LogProbabilities(nn.NLLLoss(reduction="none")), classes),
    criterion("KLDivLoss", lambda: LogProbabilities(nn.KLDivLoss(reduction="none")), probabilities),
    criterion(
        "BCELoss",
        lambda: Calls(
            nn.BCELoss(reduction="none"), lambda loss, x, target: loss(torch.sigmoid(x), target)
        ),
        probabilities,
    ),
    criterion("BCEWithLogitsLoss", lambda: nn.BCEWithLogitsLoss(reduction="none"), probabilities),
    criterion("PoissonNLLLoss", lambda: nn.PoissonNLLLoss(reduction="none"), probabilities),
    kind(
        "GaussianNLLLoss",
        lambda: Criterion(nn.GaussianNLLLoss(reduction="none")),
        inputs=lambda: (floats(B, 3), targets(), probabilities()),
        refusals=(no_vmap("it looks for negative variances"),),
    ),
    # a constant as a keyword: torch refuses to differentiate by this target
    kind(
        "SoftMarginLoss",
        lambda: Criterion(nn.SoftMarginLoss(reduction="none")),
        (3,),
        kwargs=lambda: {"target": targets().sign()},
    ),
    criterion(
        "MultiMarginLoss",
        lambda: nn.MultiMarginLoss(reduction="none"),
        classes,
        refusals=NO_FORWARD_LOSS,
    ),
    criterion(
        "MultiLabelMarginLoss",
        lambda: nn.MultiLabelMarginLoss(reduction="none"),
        lambda: torch.tensor([[0, -1], [1, -1], [1, 0]]),
        refusals=NO_FORWARD_LOSS,
    ),
    criterion(
        "MultiLabelSoftMarginLoss",
        lambda: nn.MultiLabelSoftMarginLoss(reduction="none"),
        lambda: (targets() > 0).double(),
    ),
    criterion(
        "HingeEmbeddingLoss",
        lambda: nn.HingeEmbeddingLoss(reduction="none"),
        lambda: targets().sign(),
    ),
    kind(
        "MarginRankingLoss",
        lambda: nn.MarginRankingLoss(1.0, reduction="none"),
        inputs=lambda: (floats(B), floats(B, seed=2), signs()),
    ),
    kind(
        "CosineEmbeddingLoss",
        lambda: nn.CosineEmbeddingLoss(reduction="none"),
        inputs=lambda: (floats(B, 3), floats(B, 3, seed=2), signs()),
    ),
    kind("TripletMarginLoss", lambda: nn.TripletMarginLoss(reduction="none"), (3,), (3,), (3,)),
    kind(
        "TripletMarginWithDistanceLoss",
        lambda: nn.TripletMarginWithDistanceLoss(reduction="none"),
        (3,),
        (3,),
        (3,),
    ),
    kind("CTCLoss", Alignment, inputs=ctc_inputs, refusals=NO_FORWARD_LOSS),
    kind(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(3, 4, [2], div_value=1.0),
        inputs=lambda: (floats(B, 3), torch.tensor([0, 3, 1])),
        refusals=(no_vmap("samples go to the cluster of their class"),),
    ),
)

# --- inputs and outputs of every shape ---


class Named(NamedTuple):
    mean: Tensor
    spread: Tensor


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        y = self.layer(batch["x"]) * batch["scale"]
        return {"y": y, "best": y.argmax(-1), "nested": [y.sum(-1), (batch["x"].sin(),)]}


class OfKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(
        self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None, power: int = 1
    ) -> Tensor:
        y = self.layer(x) * scale
        return (y if shift is None else y + shift) ** power


class ToNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Named:
        mean, spread = self.layer(x).chunk(2, -1)
        return Named(mean, F.softplus(spread))


class WithOptional(nn.Module):
    """A flag and a None among the positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor | None, twice: bool) -> Tensor:
        y = self.layer(x) if mask is None else self.layer(x) * mask
        return 2 * y if twice else y


class Same(nn.Module):
    """The same tensor twice, a view of it, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return y, y, y[:, 0], x


SHAPES = (
    kind(
        "dicts in and out",
        OfDicts,
        inputs=lambda: ({"x": floats(B, 3), "scale": floats(B, 1, seed=2)},),
    ),
    kind(
        "keywords",
        OfKeywords,
        (3,),
        kwargs=lambda: {"scale": floats(B, 1, seed=2), "shift": None, "power": 2},
    ),
    kind("named tuple out", ToNamed, (3,)),
    kind("flag and None in", WithOptional, inputs=lambda: (floats(B, 3), None, True)),
    kind("mask and flag in", WithOptional, inputs=lambda: (floats(B, 3), integers(2, B, 1), False)),
    kind(
        "integers beside floats",
        lambda: Calls(nn.Embedding(5, 2), lambda e, i, x: e(i) * x),
        inputs=lambda: (integers(5, B), floats(B, 2)),
    ),
    kind("same tensor twice", Same, (3,)),
    kind("output transposed", lambda: Calls(nn.Linear(3, 2), lambda m, x: m(x).mT), (2, 3)),
    kind(
        "output of one entry", lambda: Calls(nn.Linear(3, 1), lambda m, x: m(x).squeeze(-1)), (3,)
    ),
    kind(
        "constant output", lambda: Calls(nn.Linear(3, 2), lambda m, x: x.new_ones(len(x), 2)), (3,)
    ),
    kind("inputs not contiguous", lambda: nn.Linear(3, 2), inputs=lambda: (floats(3, B).mT,)),
    kind("inputs expanded", lambda: nn.Linear(3, 2), inputs=lambda: (floats(1, 3).expand(B, 3),)),
    kind("batch of one", lambda: nn.Linear(3, 2), inputs=lambda: (floats(1, 3),)),
)

# --- whole architectures ---


class ResidualBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm(2), norm(2)
        self.shortcut = nn.Sequential(nn.Conv2d(1, 2, 1, stride=2, bias=False), norm(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 3, 4))
        self.block = encoder_layer(norm_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.block(tokens + self.positions)[:, 0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 2, 2, stride=2)
        self.middle = nn.Conv2d(2, 2, 1)
        self.up = nn.ConvTranspose2d(2, 1, 2, stride=2)
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = F.silu(self.middle(F.silu(self.down(x))))
        return self.last(torch.cat([x, self.up(low)], 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.squeeze, self.excite = nn.Linear(2, 1), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return y * gate[:, :, None, None]


class Experts(nn.Module):
    """Mixture of experts with a softmax gate."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.gate = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(-1).unsqueeze(-1) * outputs).sum(1)


class RoutedExperts(nn.Module):
    """Each sample goes to its best expert alone, as it is chosen by its data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        self.gate = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight, best = self.gate(x).softmax(-1).max(-1)
        y = x.new_zeros(len(x), 2)
        for k, expert in enumerate(self.experts):
            (mine,) = torch.where(best == k)
            y = y.index_add(0, mine, expert(x[mine]) * weight[mine, None])
        return y


class HyperNetwork(nn.Module):
    """The weights of the layer come from another input."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(2, 6)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = self.weights(context).view(-1, 2, 3)
        return torch.tanh(torch.einsum("boi,bi->bo", weights, x))


class Equilibrium(nn.Module):
    """A fixed point by a fixed number of iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 2)
        for _ in range(4):
            z = torch.tanh(0.5 * self.inner(z) + self.outer(x))
        return z


class RungeKutta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = 0.1
        k1 = self.field(x)
        k2 = self.field(x + h / 2 * k1)
        k3 = self.field(x + h / 2 * k2)
        k4 = self.field(x + h * k3)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Coupling(nn.Module):
    """A normalizing flow: the transformed point and its log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)
        self.mix = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x @ self.mix
        kept, moved = x.chunk(2, -1)
        log_scale, shift = torch.tanh(self.net(kept)).chunk(2, -1)
        log_det = log_scale.sum(-1) + torch.linalg.slogdet(self.mix).logabsdet
        return torch.cat([kept, moved * log_scale.exp() + shift], -1), log_det


class GraphConvolution(nn.Module):
    """Messages along fixed edges, summed at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(2, 2)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]]))

    def forward(self, nodes: Tensor) -> Tensor:
        source, target = self.edges
        messages = self.message(nodes[:, source])
        return torch.tanh(nodes.index_add(1, target, messages))


class StateSpace(nn.Module):
    """A diagonal linear recurrence, by cumulative sums in the log domain."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(2))
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        log_decay = F.logsigmoid(self.decay) * torch.ones_like(x[..., :1])
        total = log_decay.cumsum(1)
        return self.mix(total.exp() * (x * (-total).exp()).cumsum(1))


class DeepSet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)).amax(1))


class Ridge(nn.Module):
    """A differentiable least squares solve as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(2, 2)
        self.log_penalty = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        phi = torch.tanh(self.features(x))
        eye = torch.eye(2, dtype=x.dtype)
        gram = phi.mT @ phi + self.log_penalty.exp() * eye
        return torch.linalg.solve(gram, phi.mT @ y)


class Sampler(nn.Module):
    """A spatial transformer: the input resampled along a grid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.3 * self.locate(x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(x), 1, 2, 2], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Sirens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(3.0 * layer(x))
        return self.layers[-1](x)


ARCHITECTURES = (
    kind(
        "CNN",
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)
        ),
        (1, 3, 3),
    ),
    kind("residual block BatchNorm eval", lambda: ResidualBlock(nn.BatchNorm2d).eval(), (1, 3, 3)),
    kind(
        "residual block BatchNorm train",
        lambda: ResidualBlock(nn.BatchNorm2d),
        (1, 3, 3),
        refusals=(COUPLED,),
    ),
    kind(
        "residual block GroupNorm",
        lambda: ResidualBlock(lambda width: nn.GroupNorm(1, width)),
        (1, 3, 3),
    ),
    kind("vision transformer", VisionTransformer, (1, 2, 4)),
    kind("U-Net", UNet, (1, 2, 2)),
    kind("squeeze and excite", SqueezeExcite, (1, 2, 2)),
    kind("mixture of experts", Experts, (3,)),
    kind(
        "routed experts",
        RoutedExperts,
        (3,),
        refusals=(no_vmap("samples go to experts of their own"),),
    ),
    kind("hypernetwork", HyperNetwork, (3,), (2,)),
    kind("equilibrium", Equilibrium, (3,)),
    kind("Runge-Kutta step", RungeKutta, (2,)),
    kind("normalizing flow", Coupling, (4,), refusals=(WRONG_SOLVE,)),
    kind("graph convolution", GraphConvolution, (3, 2)),
    kind("state space", StateSpace, (3, 2)),
    kind("deep set", DeepSet, (3, 2)),
    kind("least squares layer", Ridge, (3, 2), (3, 1), refusals=(WRONG_SOLVE,)),
    kind(
        "spatial transformer",
        Sampler,
        (1, 2, 2),
        refusals=(no_forward("torch has no forward mode of grid_sample"),),
    ),
    kind("sine network", Sirens, (2,)),
)

MODULE_KINDS: tuple[ModuleKind, ...] = (
    *ACTIVATIONS,
    *LINEAR,
    *CONVOLUTIONS,
    *POOLING,
    *RESHAPING,
    *NORMS,
    *EMBEDDINGS,
    *RECURRENT,
    *ATTENTION,
    *RANDOM,
    *PARAMETRIZED,
    *STATEFUL,
    *RUNNING,
    *LOSSES,
    *SHAPES,
    *ARCHITECTURES,
)
