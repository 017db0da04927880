"""Our parameters ↔ those of transformers' NanoChatForCausalLM, whose network is that of `recipe=modern`.

Flows in: our weights, or a folder's state. Flows out: the same function in the other's layout; logits agree to
rounding. transformers has the architecture from version 5 on (its docs/model_doc/nanochat.md); nothing of it is needed
here.

The differences: transformers keeps queries, keys and values as three linear layers where ours are one; our matrices
over the vocabulary have padding rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from data_pipeline.tokenizer import END_OF_TEXT
from gpt2train.config import Activation, ModelConfig, Norm, Positions
from gpt2train.errors import ConfigError
from gpt2train.mup import logit_ratio, query_ratio
from gpt2train.network.attention import RMS_NORM_EPS, ROTARY_BASE

MODEL_TYPE, ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
MIN_TRANSFORMERS = "5.0"
NETWORK: dict[str, Any] = {
    "positions": Positions.rotary,
    "activation": Activation.relu2,
    "norm": Norm.rms,
    "biases": False,
    "qk_norm": True,
    "embedding_norm": True,
}
"""What of ModelConfig this architecture fixes; the head and the soft cap are free."""
_NAMES = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def differences(config: ModelConfig) -> list[str]:
    """Settings that keep a model from being a NanoChat, as `model.NAME=VALUE`; empty when it is one."""
    shown = config.to_json()
    return [f"model.{name}={shown[name]}" for name, value in NETWORK.items() if getattr(config, name) != value]


def mup_faults(config: ModelConfig) -> list[str]:
    """Multipliers of µP that no weight of a NanoChat can take in, one line each."""
    stays = "`gpt2train generate` and `evaluate` take the run as it is"
    faults = []
    if config.tied_head and logit_ratio(config) != 1.0:
        faults.append(
            f"model.mup_base={config.mup_base}: a NanoChat whose head is the embedding has no place for logits × "
            f"{logit_ratio(config):.4g}; train with model.tied_head=false to export it; {stays}"
        )
    if query_ratio(config) != 1.0:
        faults.append(
            f"model.mup_base_head={config.mup_base_head}: a NanoChat norms its queries, so scores × "
            f"{query_ratio(config):.4g} have no place in it; train with heads of one size to export it; {stays}"
        )
    return faults


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json: the fields of transformers' NanoChatConfig that say what our model computes."""
    end = END_OF_TEXT if config.vocabulary > END_OF_TEXT else None
    return {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
        "final_logit_softcapping": config.logit_softcap or None,
        "hidden_act": "relu2",
        "hidden_size": config.channels,
        "initializer_range": 0.02,
        "intermediate_size": 4 * config.channels,
        "max_position_embeddings": config.context,
        "model_type": MODEL_TYPE,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.heads,
        "pad_token_id": None,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_theta": ROTARY_BASE, "rope_type": "default"},
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": config.vocabulary,
    }


def to_hf_state(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights as NanoChatForCausalLM's state, without a tied `lm_head.weight`, which transformers restores.

    µP's multiplier of the logits goes into the head.
    """
    assert not mup_faults(config), "hf.architecture refuses them"
    state = {"model.embed_tokens.weight": weights["wte.weight"][: config.vocabulary]}
    if not config.tied_head:
        state["lm_head.weight"] = weights["lm_head.weight"][: config.vocabulary] * logit_ratio(config)
    for i in range(config.layers):
        for name, part in zip("qkv", weights[f"h.{i}.attn.c_attn.weight"].chunk(3), strict=True):
            state[f"model.layers.{i}.self_attn.{name}_proj.weight"] = part
        for ours, theirs in _NAMES.items():
            state[f"model.layers.{i}.{theirs}.weight"] = weights[f"h.{i}.{ours}.weight"]
    assert len(weights) == len(state) - 2 * config.layers, "every weight has its place"
    return {
        name: weight.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, weight in state.items()
    }


def model_config_from_hf(found: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """The ModelConfig of a NanoChat's config.json.

    Raises ConfigError naming every field that says something else than our model computes.
    """
    faults: list[str] = []
    sizes: dict[str, int] = {}
    for field in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
        "intermediate_size",
    ):
        value = found.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"{field}={value!r}: must be a whole number above 0; mend config.json")
            value = 1
        sizes[field] = value
    channels, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    rope = found.get("rope_parameters") or {}
    for field, value, wanted in (
        ("hidden_act", found.get("hidden_act", "relu2"), "relu2"),
        ("attention_bias", found.get("attention_bias", False), False),
        ("attention_dropout", found.get("attention_dropout", 0.0), 0.0),
        ("intermediate_size", sizes["intermediate_size"], 4 * channels),
        ("num_key_value_heads", found.get("num_key_value_heads") or heads, heads),
        ("head_dim", found.get("head_dim", channels // heads), channels // heads),
        ("rms_norm_eps", found.get("rms_norm_eps", RMS_NORM_EPS), RMS_NORM_EPS),
        ("rope_theta", rope.get("rope_theta", ROTARY_BASE), ROTARY_BASE),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("quantization_config", found.get("quantization_config"), None),
    ):
        if value != wanted:
            faults.append(f"{field}={value!r}: must be {wanted!r}; choose a model with NanoChat's own settings")
    if channels % (2 * heads):
        faults.append(f"hidden_size={channels}: must be a multiple of 2 × {heads} heads; mend config.json")
    if sizes["vocab_size"] >= 65_536:
        faults.append(f"vocab_size={sizes['vocab_size']}: must fit uint16 token shards; choose a smaller vocabulary")
    softcap = found.get("final_logit_softcapping", 15.0)
    if softcap is not None and not (isinstance(softcap, (int, float)) and softcap > 0):
        faults.append(f"final_logit_softcapping={softcap!r}: must be null or above 0; mend config.json")
    if faults:
        raise ConfigError(faults)
    return ModelConfig(
        name=name,
        layers=sizes["num_hidden_layers"],
        channels=channels,
        heads=heads,
        context=sizes["max_position_embeddings"],
        vocabulary=sizes["vocab_size"],
        tied_head=bool(found.get("tie_word_embeddings", False)),
        logit_softcap=float(softcap or 0.0),
        **NETWORK,
    )


def from_hf_state(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """A NanoChatForCausalLM's state as our weights, in fp32; padding rows are zeros.

    Raises ConfigError naming all tensors that are missing, too many or of another shape than `config` says.
    """
    left = dict(state)
    faults: list[str] = []
    c = config.channels

    def take(name: str, *shape: int) -> torch.Tensor:
        tensor = left.pop(name, None)
        if tensor is None:
            faults.append(f"{name}: missing from the weights; give the complete model.safetensors of a NanoChat")
        elif tuple(tensor.shape) != shape:
            faults.append(f"{name}={list(tensor.shape)}: config.json says {list(shape)}; give the files of one model")
        else:
            return tensor.to(torch.float32).contiguous()
        return torch.zeros(shape)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.zeros(config.padded_vocabulary - config.vocabulary, c)])

    weights = {"wte.weight": padded(take("model.embed_tokens.weight", config.vocabulary, c))}
    shapes = {"attn.c_proj": (c, c), "mlp.c_fc": (4 * c, c), "mlp.c_proj": (c, 4 * c)}
    for i in range(config.layers):
        parts = [take(f"model.layers.{i}.self_attn.{name}_proj.weight", c, c) for name in "qkv"]
        weights[f"h.{i}.attn.c_attn.weight"] = torch.cat(parts)
        for ours, theirs in _NAMES.items():
            weights[f"h.{i}.{ours}.weight"] = take(f"model.layers.{i}.{theirs}.weight", *shapes[ours])
    if config.tied_head:
        left.pop("lm_head.weight", None)
    else:
        weights["lm_head.weight"] = padded(take("lm_head.weight", config.vocabulary, c))
    faults += [f"{name}: NanoChat has no such parameter; give the weights of a {ARCHITECTURE}" for name in sorted(left)]
    if faults:
        raise ConfigError(faults)
    return weights
