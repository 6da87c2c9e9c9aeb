"""The table of HuggingFace families: a row is a model of random weights, and how it is called.

The configurations are tiny and nothing is fetched. Dropout is zero, so that a loop can check train
mode, too; biases and scales are moved away from where they start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kinds.modules import B, floats, integers

os.environ["HF_HUB_OFFLINE"] = "1"

Batch = dict[str, Tensor]
Config = dict[str, Any]
WORDS, LENGTH, WIDTH, CLASSES = 7, 3, 8, 3


def of_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, of one class a sample or one a position."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Family:
    """A model, and the batches that it is called with, by keyword.

    Args:
        model: the name of its class in ``transformers``.
        config: the settings of its configuration.
        batch: a batch as users have it: tokens and masks, images, sounds.
        embedded: a batch whose ``wrt`` is differentiable: of tokens, their embeddings.
        wrt: the input by which the model is differentiated; empty where it can't be.
        output: the output of which kernels and curvatures are taken.
        loss: of that output and of targets.
        parts: configurations inside the configuration: their class and settings by name.
        has_checkpoints: it has gradient checkpoints.
        couples: in train mode its samples depend on each other.
        rtol: of what is compared; some models compute in float32 in between.
        adapt: what users do to the model before they train it.
        package: what must be installed for that.
    """

    model: str
    config: Config
    batch: Callable[[], Batch]
    embedded: Callable[[], Batch]
    wrt: str
    output: str = "logits"
    loss: Callable[[Tensor, Tensor], Tensor] = of_classes
    parts: dict[str, tuple[str, Config]] = field(default_factory=dict)
    has_checkpoints: bool = True
    couples: bool = False
    rtol: float = 1e-9
    adapt: Callable[[Any], nn.Module] = lambda module: module
    package: str = "transformers"

    def make(self, mode: str = "eval") -> nn.Module:
        """In float64. Mode ``"checkpointed"`` is train mode, its checkpoints not reentrant."""
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            parts = {key: getattr(transformers, n)(**c) for key, (n, c) in self.parts.items()}
            kind = getattr(transformers, self.model)
            config = kind.config_class(**self.config, **parts)
            for each in (config, *parts.values()):
                _without_dropout(each)
            module = self.adapt(kind(config)).double().train(mode != "eval")
            with torch.no_grad():
                for param in module.parameters():
                    param += 0.1 * torch.randn_like(param)
        if mode == "checkpointed":
            module.activation_checkpointing_enable({"use_reentrant": False})
        return module

    def targets(self, outputs: Tensor) -> Tensor:
        """Targets for the loss of these outputs."""
        if self.loss is of_classes:
            return integers(outputs.shape[-1], *outputs.shape[:-1])
        return floats(*outputs.shape, seed=5)


def _without_dropout(config: Any) -> None:
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)


# --- batches ---


def mask(length: int = LENGTH) -> Tensor:
    """Samples of three lengths: a third is missing from the second, two from the last."""
    missing = torch.arange(B).unsqueeze(1) * (length // 3)
    return (torch.arange(length) < length - missing).long()


def tokens(**more: Callable[[], Tensor]) -> Batch:
    batch = {"input_ids": integers(WORDS, B, LENGTH), "attention_mask": mask()}
    return batch | {key: make() for key, make in more.items()}


def embeddings(width: int = WIDTH, **more: Callable[[], Tensor]) -> Batch:
    batch = {"inputs_embeds": floats(B, LENGTH, width), "attention_mask": mask()}
    return batch | {key: make() for key, make in more.items()}


def images(size: int) -> Batch:
    return {"pixel_values": floats(B, 1, size, size)}


def decoded() -> Tensor:
    return integers(WORDS, B, 2, seed=2)


def first_alone() -> Tensor:
    return torch.tensor([1, 0, 0]).repeat(B, 1)


def text(model: str, config: Config, width: int = WIDTH, **more: Any) -> Family:
    """A model of masked tokens."""
    batches = (tokens, partial(embeddings, width))
    return Family(model, config, *batches, wrt="inputs_embeds", **more)


def translating(model: str, config: Config, **more: Any) -> Family:
    """A model of masked tokens and of the tokens that are made of them."""
    batches = (partial(f, decoder_input_ids=decoded) for f in (tokens, embeddings))
    return Family(model, config | {"use_cache": False}, *batches, wrt="inputs_embeds", **more)


def seeing(model: str, config: Config, size: int = 4, **more: Any) -> Family:
    """A model of images."""
    batches = [partial(images, size)] * 2
    return Family(model, {"num_channels": 1} | config, *batches, wrt="pixel_values", **more)


def listening(model: str, masks: Callable[[], Batch] = dict, **more: Any) -> Family:
    """A model of sounds."""
    batches = [lambda: {"input_values": floats(B, 24)} | masks()] * 2
    return Family(model, SOUND, *batches, **{"wrt": "input_values"} | more)


def with_frozen_ears(module: Any) -> nn.Module:
    """Else in train mode it writes ``requires_grad`` of its input, which must then be a leaf."""
    module.freeze_feature_encoder()
    return module


def with_adapters(name: str, kind: str = "LoraConfig", **settings: Any) -> Family:
    """A family with low-rank or other adapters, which are then all that is trained."""

    def adapt(module: Any) -> nn.Module:
        import peft

        return peft.get_peft_model(module, getattr(peft, kind)(**settings))

    return replace(FAMILIES[name], adapt=adapt, package="peft")


# --- configurations: the same sizes under the names of each family ---

PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LABELS = {"num_labels": CLASSES}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
ENCODER = {"vocab_size": WORDS, "hidden_size": WIDTH, "max_position_embeddings": 12}
ENCODER |= LAYERS | PADS | LABELS
DECODER = ENCODER | {"use_cache": False}
GROUPED = DECODER | {"num_key_value_heads": 1, "head_dim": 4}
SINGLE = 1e-5
"""What agrees to the rounding of float32, in which some models compute in between."""
# grouped products of matrices know no float64
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
NARROW = {"vocab_size": WORDS, "n_embd": WIDTH, "n_head": 2, "n_layer": 1, "n_positions": 12}
NARROW |= PADS | LABELS | {"use_cache": False}
BOTH = {"vocab_size": WORDS, "d_model": WIDTH, "max_position_embeddings": 12}
BOTH |= {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 6}
BOTH |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 6}
BOTH |= PADS | {"decoder_start_token_id": 1}
PATCHES = {"image_size": 4, "patch_size": 2, "num_channels": 1, "hidden_size": WIDTH}
PATCHES |= LAYERS | LABELS
STAGES = {"num_channels": 1, "hidden_sizes": [4, 6], "depths": [1, 1]} | LABELS
SOUND = {"vocab_size": WORDS, "hidden_size": WIDTH, "conv_dim": (4, 4), "conv_stride": (4, 2)}
SOUND |= {"conv_kernel": (4, 3), "num_feat_extract_layers": 2, "feat_extract_norm": "layer"}
SOUND |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2}
SOUND |= {"classifier_proj_size": 4, "apply_spec_augment": False} | LAYERS | LABELS

# --- encoders of masked text ---

FAMILIES = {
    "BERT": text("BertForSequenceClassification", ENCODER),
    "BERT of questions": text(
        "BertForQuestionAnswering", ENCODER | {"num_labels": 2}, output="start_logits"
    ),
    "RoBERTa": text("RobertaForTokenClassification", ENCODER),
    "DistilBERT": text(
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": WIDTH, "n_layers": 1, "n_heads": 2, "hidden_dim": 6}
        | {"max_position_embeddings": 12}
        | LABELS,
    ),
    # its layers share their parameters
    "ALBERT": text(
        "AlbertForSequenceClassification",
        ENCODER | {"embedding_size": 4, "num_hidden_layers": 2},
        width=4,
        has_checkpoints=False,
    ),
    "ELECTRA": text("ElectraForSequenceClassification", ENCODER | {"embedding_size": 4}, width=4),
    "ModernBERT": text(
        "ModernBertForSequenceClassification",
        ENCODER | {"num_hidden_layers": 2, "local_attention": 2},
        rtol=SINGLE,
    ),
    "MPNet": text("MPNetForSequenceClassification", ENCODER, has_checkpoints=False),
    "DeBERTa-v2": text(
        "DebertaV2ForSequenceClassification",
        ENCODER
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": 8},
    ),
    "XLNet": text(
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": 1, "n_head": 2, "d_inner": 6}
        | {"use_mems_eval": False}
        | LABELS,
        has_checkpoints=False,
    ),
    "Longformer": Family(
        "LongformerForSequenceClassification",
        ENCODER | {"attention_window": [4], "max_position_embeddings": 14},
        *[partial(f, global_attention_mask=first_alone) for f in (tokens, embeddings)],
        wrt="inputs_embeds",
    ),
    # --- decoders ---
    "GPT-2": text("GPT2LMHeadModel", NARROW),
    "GPT-2 of classes": text("GPT2ForSequenceClassification", NARROW),
    "Llama": text("LlamaForCausalLM", GROUPED, rtol=SINGLE),
    "Mistral": text("MistralForCausalLM", GROUPED | {"sliding_window": 2}, rtol=SINGLE),
    "Gemma 2": text(
        "Gemma2ForCausalLM",
        GROUPED | {"sliding_window": 3, "query_pre_attn_scalar": 4},
        rtol=SINGLE,
    ),
    "Bloom": text("BloomForCausalLM", NARROW | {"hidden_size": WIDTH}, rtol=SINGLE),
    "Falcon": text("FalconForCausalLM", DECODER),
    "Mixtral": text(
        "MixtralForCausalLM", GROUPED | EXPERTS | {"num_local_experts": 3}, rtol=SINGLE
    ),
    "Qwen 2 of experts": text(
        "Qwen2MoeForCausalLM",
        GROUPED
        | EXPERTS
        | {"num_experts": 3, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4},
        rtol=SINGLE,
    ),
    "RWKV": text(
        "RwkvForCausalLM",
        # where it rescales, the first call in eval mode writes into parameters
        DECODER | {"context_length": 12, "num_hidden_layers": 2, "rescale_every": 0},
        rtol=SINGLE,
    ),
    "Mamba 2": text(
        "Mamba2ForCausalLM",
        DECODER | {"num_heads": 2, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 2},
        rtol=SINGLE,
    ),
    # --- encoders with decoders ---
    "T5": translating(
        "T5ForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 4, "d_ff": 6, "num_heads": 2}
        | {"num_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0},
        rtol=SINGLE,
    ),
    "BART": translating("BartForConditionalGeneration", BOTH),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        BOTH
        | {"num_mel_bins": 2, "max_source_positions": 4, "max_target_positions": 8}
        | {"use_cache": False},
        *[lambda: {"input_features": floats(B, 2, 8), "decoder_input_ids": decoded()}] * 2,
        wrt="input_features",
    ),
    # --- images ---
    "ViT": seeing("ViTForImageClassification", PATCHES),
    "DINOv2": seeing("Dinov2ForImageClassification", PATCHES | {"mlp_ratio": 1}),
    "BEiT": seeing("BeitForImageClassification", PATCHES | {"use_relative_position_bias": True}),
    "Swin": seeing(
        "SwinForImageClassification",
        {"image_size": 8, "patch_size": 2, "embed_dim": 4, "depths": [2, 1], "num_heads": [2, 2]}
        | {"window_size": 2}
        | LABELS,
        size=8,
    ),
    "ConvNeXt": seeing(
        "ConvNextForImageClassification",
        STAGES | {"patch_size": 2, "num_stages": 2},
        has_checkpoints=False,
    ),
    "ResNet": seeing(
        "ResNetForImageClassification",
        STAGES | {"embedding_size": 4, "layer_type": "basic"},
        size=16,
        has_checkpoints=False,
        couples=True,
    ),
    "SegFormer": seeing(
        "SegformerForSemanticSegmentation",
        STAGES
        | {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
        | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 4},
        loss=F.mse_loss,
        couples=True,
    ),
    "CLIP of images": seeing(
        "CLIPVisionModelWithProjection",
        PATCHES | {"projection_dim": 4},
        output="image_embeds",
        loss=F.mse_loss,
    ),
    "DETR": seeing(
        "DetrForObjectDetection",
        BOTH
        | LABELS
        | {"num_queries": 2, "use_timm_backbone": False, "use_pretrained_backbone": False},
        size=16,
        parts={
            "backbone_config": (
                "ResNetConfig",
                STAGES | {"embedding_size": 4, "layer_type": "basic", "out_features": ["stage2"]},
            )
        },
    ),
    # --- sounds and series ---
    "Wav2Vec2": listening("Wav2Vec2ForCTC", wrt=""),
    "Wav2Vec2 of masks": listening(
        "Wav2Vec2ForSequenceClassification",
        lambda: {"attention_mask": mask(24)},
        adapt=with_frozen_ears,
    ),
    "PatchTST": Family(
        "PatchTSTForPrediction",
        {"num_input_channels": 2, "context_length": 8, "patch_length": 4, "patch_stride": 4}
        | {"d_model": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 6}
        | {"prediction_length": 2},
        *[lambda: {"past_values": floats(B, 8, 2)}] * 2,
        wrt="past_values",
        output="prediction_outputs",
        loss=F.mse_loss,
        has_checkpoints=False,
        couples=True,
    ),
}

# --- adapters ---

LOW_RANK = {"r": 2, "lora_alpha": 3}
FAMILIES |= {
    "BERT with LoRA": with_adapters(
        "BERT", target_modules=["query", "dense"], modules_to_save=["classifier"], **LOW_RANK
    ),
    "GPT-2 with LoRA": with_adapters(
        "GPT-2", target_modules=["c_attn"], fan_in_fan_out=True, **LOW_RANK
    ),
    "Llama with LoRA": with_adapters("Llama", target_modules=["q_proj", "v_proj"], **LOW_RANK),
    "T5 with LoRA": with_adapters("T5", target_modules=["q", "wo"], **LOW_RANK),
    "ViT with DoRA": with_adapters("ViT", target_modules=["q_proj"], use_dora=True, **LOW_RANK),
    "Mistral with IA3": with_adapters(
        "Mistral",
        "IA3Config",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}
