"""Models of HuggingFace from tiny random configurations, against one backward pass an output."""

from __future__ import annotations

import copy
import inspect
import os
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.modules import B, ModuleKind, floats, integers
from tests.modules.test_module_kinds import (
    MODES,
    STRATEGIES,
    Judged,
    assert_agrees,
    jacobian_of,
    judge,
    judge_samples,
    says_what_to_do,
    seed,
)
from tests.truth.batches import DOORS, Call
from tests.truth.oracles import assert_same, place

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched: the weights are random
tf = pytest.importorskip("transformers", reason="the extra test-hf is not installed")

WORDS, LENGTH, WIDTH, MASK = 7, 3, 4, torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
# under these names in every family, whatever it calls them itself
SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 5}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
GPT2 = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
LLAMA = {"num_key_value_heads": 1, "attention_dropout": 0.1, "use_cache": False}
VIT = {"image_size": 4, "patch_size": 2, "num_channels": 1, "attention_probs_dropout_prob": 0.1}
T5 = {"d_kv": 2, "d_ff": 5, "num_decoder_layers": 1, "decoder_start_token_id": 0}


class Family(NamedTuple):
    """A class of models, the settings of its configuration, a few of its parameters.

    ``rtol``: of what is pushed forward; some models compute in float32 in between.
    """

    model: Any
    config: dict[str, Any]
    select: str
    rtol: float = 1e-9


FAMILIES = {
    "BERT": Family(tf.BertModel, {}, "*query.weight"),
    "GPT-2": Family(tf.GPT2LMHeadModel, GPT2, "*.c_attn.*"),
    "Llama": Family(tf.LlamaForCausalLM, LLAMA, "*norm.weight", 1e-4),
    "ViT": Family(tf.ViTForImageClassification, VIT, "*.layer*.0.*bias", 1e-4),
    "T5": Family(
        tf.T5ForConditionalGeneration, {**T5, "use_cache": False}, "decoder.*.wo.weight", 1e-4
    ),
    "DistilBERT": Family(tf.DistilBertModel, {"hidden_dim": 5}, "*q_lin.weight"),
}
ATTENTIONS, CALLS = ("eager", "sdpa"), ("keywords", "positions")


def made(family: Family, attention: str, mode: str, **settings: Any) -> nn.Module:
    """In float64, and with no bias or scale as it starts, so that no derivative is trivial."""
    with torch.random.fork_rng(devices=[]):
        seed()
        settings = {**SIZES, **family.config, **settings, "attn_implementation": attention}
        module = family.model(family.model.config_class(**settings)).double().train(mode == "train")
        with torch.no_grad():
            for param in module.parameters():
                param += 0.3 * torch.randn_like(param)
    return module


def batch_of(name: str) -> dict[str, Tensor]:
    """Arguments by keyword: a masked batch."""
    if name == "ViT":
        return floats_of(name)
    batch = {"input_ids": integers(WORDS, B, LENGTH), "attention_mask": MASK}
    return batch | {"decoder_input_ids": integers(WORDS, B, 2)} if name == "T5" else batch


def floats_of(name: str) -> dict[str, Tensor]:
    """Arguments by keyword that are differentiable."""
    if name == "ViT":
        return {"pixel_values": floats(B, 1, 4, 4)}
    embeddings = {"inputs_embeds": floats(B, LENGTH, WIDTH)}
    return (
        embeddings | {"decoder_inputs_embeds": floats(B, 2, WIDTH, seed=2)}
        if name == "T5"
        else embeddings
    )


def positions_of(name: str) -> tuple[Any, ...]:
    """The differentiable arguments by position, None for those between them."""
    embeddings = floats_of(name)
    _, *order = inspect.signature(FAMILIES[name].model.forward).parameters
    return tuple(embeddings.get(key) for key in order[: 1 + max(map(order.index, embeddings))])


@cache
def kind_of(name: str, attention: str, call: str, mode: str = "eval", **more: Any) -> ModuleKind:
    family = FAMILIES[name]
    return ModuleKind(
        name,
        lambda: made(family, attention, mode),
        lambda: positions_of(name) if call == "positions" else (),
        lambda: batch_of(name) if call == "keywords" else {},
        **more,
    )


@cache
def judged(name: str, attention: str, call: str, mode: str, how: str) -> Judged:
    """The reference; all samples of a model that draws have the same random numbers."""
    kind = kind_of(name, attention, call, mode)
    with torch.random.fork_rng(devices=[]):
        seed()
        if how == "per sample":
            return judge_samples(kind, same_draws=mode == "train")
        return judge(kind.make(), kind.inputs(), kind.kwargs())


def by(want: Judged, wrt: Any, select: str) -> Any:
    """The reference in the tree of ``module_jacobian``: by parameters, or by inputs, too."""
    point = want.point[0] if len(want.point) == 1 else want.point
    trees = []
    for params, inputs in zip(want.params, want.inputs, strict=True):
        named = zip(want.names, params, strict=True)
        blocks = {name: block for name, block in named if fnmatchcase(name, select)}
        trees.append(blocks if wrt == "params" else (blocks, place(point, inputs)))
    return place(want.output, trees)


def refusal_of(name: str, call: str, strategy: str) -> str:
    """Words of the error, where torch can't do it; empty where it can."""
    looks_up = name in ("BERT", "DistilBERT") and call == "keywords"
    return "padding_idx" if looks_up and strategy == "forward" else ""


CASES = [
    pytest.param(case, id="-".join(case))
    for case in product(FAMILIES, ATTENTIONS, CALLS, ("eval", "train"), MODES, STRATEGIES)
    # dropout is the same whatever is called how: one family stands for the others
    if case[0] == "BERT" or case[2:4] != ("keywords", "train")
]


@pytest.mark.parametrize("case", CASES)
def test_every_family(case: tuple[str, str, str, str, str, str]) -> None:
    """By all parameters, called by name; by some and by the inputs, called by position."""
    name, _, call, mode, how, strategy = case
    family = FAMILIES[name]
    kind = kind_of(*case[:4], rtol=family.rtol if strategy in ("forward", "auto") else 1e-9)
    wrt, select = ("params", "*") if call == "keywords" else (("params", "inputs"), family.select)
    options = {"randomness": "same"} if (mode, how) == ("train", "per sample") else {}
    if words := refusal_of(name, call, strategy):
        with pytest.raises(NotImplementedError, match=words) as caught:
            jacobian_of(kind, wrt, how, strategy, select=select, **options)
        assert says_what_to_do(str(caught.value)), caught.value
    else:
        got = jacobian_of(kind, wrt, how, strategy, select=select, **options)
        assert_agrees(kind, got, by(judged(*case[:5]), wrt, select))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_ids_alone_and_batches_of_transformers(name: str, per_sample: bool) -> None:
    module, ids = made(FAMILIES[name], "eager", "eval"), batch_of(name)["input_ids"]
    jac = jacfunc.module_jacobian(module, select=FAMILIES[name].select, per_sample=per_sample)
    by_name = jac(**tf.BatchEncoding({"input_ids": ids}))
    assert type(by_name) is type(module(ids))
    assert_same(jac(ids), by_name)
    if name != "GPT-2":  # whose second place is its cache's
        assert_same(jac(ids, torch.ones_like(ids)), by_name)


def telling(name: str, is_new: bool) -> nn.Module:
    """Gives tuples of tensors, too: by hooks that transformers sets at the first call."""
    more = {"output_hidden_states": True, "output_attentions": True}
    module = made(FAMILIES[name], "eager", "eval", **more)
    if not is_new:
        module(*positions_of(name))
    return module


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_attentions(name: str, how: str) -> None:
    inputs = positions_of(name)
    kind = ModuleKind(name, lambda: telling(name, is_new=False), lambda: inputs)
    want = judge_samples(kind, False) if how == "per sample" else judge(kind.make(), inputs, {})
    assert_agrees(kind, jacobian_of(kind, "inputs", how, "reverse"), want.tree("inputs"))


def test_a_model_that_was_not_called_before_collects_nothing_twice() -> None:
    module, inputs = telling("BERT", is_new=True), positions_of("BERT")
    for _ in range(2):
        jac = jacfunc.module_jacobian(module, "inputs", strategy="reverse")(*inputs)
        assert len(jac.hidden_states) == len(module(*inputs).hidden_states) == 2


class OfIds(nn.Module):
    """A model that is called with token ids alone, and returns its cache, as models do by default.

    A model of two stacks has a cache of two.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.is_double = (
            made(FAMILIES[name], "eager", "eval", use_cache=True),
            name == "T5",
        )

    def forward(self, ids: Tensor) -> Any:
        more = {"decoder_input_ids": ids[:, :2]} if self.is_double else {}
        return self.model(input_ids=ids, **more)


CACHED = {
    "logits": lambda tree: tree.logits,
    "keys": lambda tree: layers_of(tree.past_key_values)[0].keys,
}
"""What is taken out of an output with a cache, or out of a result like it."""


def layers_of(cache: Any) -> list[Any]:
    double = isinstance(cache, tf.EncoderDecoderCache)
    return (cache.cross_attention_cache if double else cache).layers


@pytest.mark.parametrize("door", [door for door in DOORS if not door.startswith("inputs")])
@pytest.mark.parametrize("what", CACHED)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "T5"])
def test_caches_are_outputs(name: str, what: str, door: str) -> None:
    near = {"rtol": FAMILIES[name].rtol, "atol": FAMILIES[name].rtol / 10}
    DOORS[door](Call(OfIds(name), integers(WORDS, B, LENGTH), pick=CACHED[what], tolerances=near))


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_caches_are_inputs(name: str) -> None:
    """Each evaluation adds to a cache of its own; the user's stays as it is."""
    module, ids = made(FAMILIES[name], "eager", "eval", use_cache=True), integers(WORDS, B, LENGTH)
    cache = module(ids[:, :2]).past_key_values

    def logits(n: slice) -> Tensor:
        own = copy.deepcopy(cache)
        for layer in own.layers:
            layer.keys, layer.values = layer.keys.detach()[n], layer.values.detach()[n]
        return module(ids[n, 2:], past_key_values=own).logits

    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    (weight, param), *_ = (pair for pair in module.named_parameters() if "attn" in pair[0])
    out = logits(slice(None))
    rows = [torch.autograd.grad(o, param, retain_graph=True)[0] for o in out.flatten()]
    want = torch.stack(rows).reshape(*out.shape, *param.shape)
    for per_sample, strategy in product((False, True), ("auto", "reverse", "looped")):
        jac = jacfunc.module_jacobian(
            module, select=weight, per_sample=per_sample, strategy=strategy
        )
        got = jac(ids[:, 2:], past_key_values=cache).logits[weight]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == 2


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["BatchEncoding", "BatchFeature"])
def test_batches_of_transformers_are_inputs(kind: str, door: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch: Any) -> Tensor:
            return torch.tanh(self.layer(batch["x"] * batch.data["mask"]))

    seed()

    def batch(x: Tensor) -> Any:
        return getattr(tf, kind)({"x": x, "mask": torch.ones_like(x).int(), "words": "any"})

    DOORS[door](Call(Net().double(), floats(B, 3), batch))


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_by_name(name: str, how: str) -> None:
    want, by_name = judged(name, "sdpa", "positions", "eval", how), partial(floats_of, name)
    kind = ModuleKind(name, kind_of(name, "sdpa", "positions").make, tuple, by_name)
    got = jacobian_of(kind, "inputs", how, "reverse", inputs=next(iter(by_name())))
    assert_agrees(kind, got, place(want.output, [row[0] for row in want.inputs]))
