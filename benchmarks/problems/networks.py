"""Small classifiers of 28 × 28 images, for what is measured without any data set."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import ANSWER, Case
from benchmarks.problems.judge import TOLERANCE, Answer, check, reference
from benchmarks.problems.refusing import ACTIVATIONS
from jacfunc._measuring import Contestant, Run
from jacfunc.compare import Problem

CLASSES, PIXELS = 10, 28


class Network(NamedTuple):
    """How a network is made, and how many parameters it has: known before it is made."""

    make: Callable[[], nn.Module]
    parameters: int


def perceptron(*widths: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, from the pixels to scores."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((PIXELS**2, *widths)):
        layers += [nn.Linear(inputs, outputs), between()]
    return nn.Sequential(*layers[:-1])


def lenet(first: int, second: int, padding: int) -> nn.Module:
    """LeNet with ReLU: two convolutions of so many channels, the second one with a padding."""
    side = 5 + padding
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(second * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, CLASSES),
    )


def grouped() -> nn.Module:
    """Two convolutions with a stride, normalized over groups of channels."""
    first = nn.Conv2d(1, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), nn.SiLU()
    second = nn.Conv2d(16, 32, 3, 2, padding=1), nn.GroupNorm(4, 32), nn.SiLU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 49, CLASSES))


def resnet() -> nn.Module:
    """Three residual blocks, two of which halve the image.
    It is smooth throughout: of so many activations one is so near to zero that float32 and float64
    would take different sides of a ReLU, and the judge would call right answers wrong.
    """
    blocks = (_Block(16, 16), _Block(16, 32, stride=2), _Block(32, 64, stride=2))
    first = nn.Conv2d(1, 16, 3, padding=1, bias=False), _settled(16), nn.SiLU()
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(*first, *blocks, *last)


class _Block(nn.Module):
    """Two convolutions, one normalized over the past, one over groups, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.between, self.after = _settled(width), nn.GroupNorm(4, width)
        is_same = channels == width and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(channels, width, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.silu(self.between(self.first(images)))
        return F.silu(self.after(self.second(inner)) + self.shortcut(images))


def _settled(channels: int) -> nn.Module:
    """Batch normalization with a past: at its start it would change nothing in eval mode."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean = 0.1 * torch.randn(channels)
    norm.running_var = 0.5 + torch.rand(channels)
    return norm


class Recurrent(nn.Module):
    """It reads an image row by row."""

    def __init__(self, kind: Any = nn.GRU, width: int = 48) -> None:
        super().__init__()
        self.read = kind(PIXELS, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.read(images.flatten(1, 2))[0][:, -1])


class Transformer(nn.Module):
    """Two pre-norm encoder layers on 16 patches of 7 × 7 pixels.
    Every parameter lies in a layer that hooks can see, and the positions are constants: the
    libraries that work by hooks would refuse anything else.
    """

    def __init__(self, patch: int = 7, width: int = 72, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(patch**2, width)
        self.layers = nn.Sequential(*(_Layer(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.register_buffer("positions", torch.randn((PIXELS // patch) ** 2, width) / 5)

    def forward(self, images: Tensor) -> Any:
        tiles = images.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        # [B, 1, rows, patch, columns, patch] to one row of pixels a patch
        patches = tiles.transpose(-3, -2).flatten(1, 3).flatten(2)
        tokens = self.layers(self.embed(patches) + self.positions)
        return self.head(self.norm(tokens).mean(1))


class _Layer(nn.Module):
    """Attention, written out so that each parameter is a linear layer's, then a perceptron."""

    def __init__(self, width: int, heads: int = 3, is_causal: bool = False) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Any:
        mixed = self.mix(self.before(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        tokens = tokens + self.out(seen.transpose(1, 2).flatten(2))
        return tokens + self.narrow(F.gelu(self.widen(self.between(tokens))))


class Language(nn.Module):
    """A small GPT whose words are the rows of an image, by how bright they are."""

    def __init__(self, words: int = 32, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(PIXELS, width)
        self.layers = nn.Sequential(*(_Layer(width, is_causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Any:
        count = self.words.num_embeddings
        words = (images.mean((1, 3)) * count + count / 2).long().clamp(0, count - 1)
        places = self.places(torch.arange(PIXELS, device=images.device))
        return self.head(self.norm(self.layers(self.words(words) + places))[:, -1])


VIT: dict[str, Any] = {"image_size": PIXELS, "patch_size": 7, "num_channels": 1}
VIT |= {"num_labels": CLASSES, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
# a bias of the keys has no effect on any score, the rest has little at its start, and the fused
# kernels know no forward mode
VIT |= {"num_attention_heads": 3, "qkv_bias": False, "initializer_range": 0.2}
VIT |= {"attn_implementation": "eager"}


class VisionTransformer(nn.Module):
    """HuggingFace's, of two layers on 16 patches; it gives the scores alone."""

    def __init__(self) -> None:
        super().__init__()
        # only here: it takes seconds, and need not be installed
        from transformers import ViTConfig, ViTForImageClassification

        self.inner = ViTForImageClassification(ViTConfig(**VIT))

    def forward(self, images: Tensor) -> Any:
        return self.inner(images).logits


LARGE, LENET, RECURRENT = "mlp of 536k", "lenet", "gru"
SHORT, WIDE, NARROW = "transformer of 4 patches", "transformer of 606k", "transformer of 15k"
DEEP = "mlp of 1502k"
SMALL, TINY, HIGH = "mlp of 55k", "mlp of 10k", "mlp of 815k"
NETWORKS: dict[str, Network] = {
    "mlp": Network(partial(perceptron, 224, 224, CLASSES), 228_490),
    "cnn": Network(partial(lenet, 16, 32, padding=2), 212_542),  # as large as memory has room for
    "resnet": Network(resnet, 77_658),
    "transformer": Network(Transformer, 89_002),
    "vit": Network(VisionTransformer, 41_482),
    LARGE: Network(partial(perceptron, 512, 256, CLASSES), 535_818),  # J outgrows every cache
    LENET: Network(partial(lenet, 6, 16, padding=0), 61_706),  # LeNet-5 as it is taught
    SHORT: Network(partial(Transformer, PIXELS // 2), 99_586),
    WIDE: Network(partial(Transformer, width=192), 605_962),
    NARROW: Network(partial(Transformer, PIXELS // 2, 24), 14_770),
    RECURRENT: Network(Recurrent, 11_722),
    SMALL: Network(partial(perceptron, 64, 64, CLASSES), 55_050),
    TINY: Network(partial(perceptron, 12, 12, CLASSES), 9_706),
    # the one by which curvlinops tells what its compiled products take
    DEEP: Network(partial(perceptron, 1024, 512, 256, 128, 64, CLASSES), 1_501_770),
    HIGH: Network(partial(perceptron, 1024, CLASSES), 814_090),
    "groupnorm": Network(grouped, 20_586),
    "gpt": Network(Language, 41_386),
    "lstm": Network(partial(Recurrent, nn.LSTM), 15_466),
    **{
        name: Network(partial(perceptron, 64, 64, CLASSES, between=between), 55_050)
        for name, between in ACTIVATIONS.items()
    },
}


def build(name: str) -> nn.Module:
    """The network of this name in eval mode, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name].make().eval()


def noisy(name: str, batch: int, wrt: Any, device: Any, dtype: Any = None, **how: Any) -> Problem:
    """A network with noise for images: no time depends on what is in them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, PIXELS, PIXELS, generator=generator)
    model = build(name).to(device, dtype)
    return Problem(model, (images.to(device, dtype),), wrt=wrt, **how)


def parts(problem: Problem) -> tuple[nn.Module, Tensor]:
    """The network and its images."""
    assert problem.module is not None
    return problem.module, problem.args[0]


def labels_of(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device) % CLASSES


def sample_by_sample(way: Callable[[Problem], Run], problem: Problem) -> Run:
    """A way that is given one sample at a time; its blocks are put together."""
    runs = [way(replace(problem, args=(image[None],))) for image in problem.args[0]]

    def run() -> Answer:
        samples = [run() for run in runs]
        return {name: torch.cat([blocks[name] for blocks in samples]) for name in samples[0]}

    return run


def case(
    network: str,
    batch: int,
    contestants: tuple[Contestant[Problem], ...],
    expected: Callable[[Problem], Answer] = reference,
    wrt: str = "params",
    per_sample: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    """A network at one batch size, judged by what is ``expected``.
    Its answer is the Jacobian of every sample, also where that is only contracted.
    """
    parameters, precision = NETWORKS[network].parameters, str(dtype).removeprefix("torch.")
    width = parameters if wrt == "params" else PIXELS**2
    answer = batch * CLASSES * width * dtype.itemsize
    others = [] if dtype == torch.float32 else [precision]
    others += [f"{options['threads']} threads"] if "threads" in options else []
    return Case(
        name=", ".join([network, f"B={batch}", *others]),
        setup=partial(noisy, network, batch, wrt, per_sample=per_sample, dtype=dtype),
        contestants=contestants,
        check=lambda problem: partial(
            check, expected=expected(problem), tolerance=TOLERANCE[dtype]
        ),
        dtype=precision,
        sizes={"batch": batch, "parameters": parameters, "classes": CLASSES, ANSWER: answer},
        **options,
    )
