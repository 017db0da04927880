"""Our parameters ↔ those of Hugging Face transformers' GPT2LMHeadModel, and the folders that hold them.

Flows in: a folder with config.json and model.safetensors (or its sharded form), or our weights. Flows out: the same
function in the other's layout; logits agree to rounding. transformers itself is not needed. Pickled weights
(pytorch_model.bin) are refused, since reading them can run code.

The differences: transformers keeps the block's four linear layers as Conv1D, [in, out], where ours are [out, in]; our
token embedding has padding rows after the vocabulary; theirs may carry the prefix `transformer.`, a copy of the tied
output embedding and buffers of the causal mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.tokenizer import END_OF_TEXT
from gpt2train import checkpoint
from gpt2train.config import Device, ModelConfig
from gpt2train.errors import CheckpointError, ConfigError
from gpt2train.model import GPT, LAYER_NORM_EPS
from gpt2train.mup import logit_ratio, query_ratio
from gpt2train.release import nanochat

_PREFIX = "transformer."
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# One function under three names: transformers' activations.py spells the tanh form of GELU differently in each.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of ours."""
    c = config.channels
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.padded_vocabulary, c),
        "wpe.weight": (config.context, c),
    }
    for i in range(config.layers):
        for name, shape in (
            ("ln_1", (c,)),
            ("attn.c_attn", (3 * c, c)),
            ("attn.c_proj", (c, c)),
            ("ln_2", (c,)),
            ("mlp.c_fc", (4 * c, c)),
            ("mlp.c_proj", (c, 4 * c)),
        ):
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[:1]
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (c,)
    return shapes


def to_hf_state(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights as GPT2LMHeadModel's state, without the tied `lm_head.weight`, which transformers restores.

    It has no place for µP's multipliers: that of the logits goes into the last norm's gains and biases, that of the
    scores into the queries.
    """
    state = {}
    for name, shape in parameter_shapes(config).items():
        weight = weights[name]
        assert tuple(weight.shape) == shape, f"{name}: expected {shape}, got {tuple(weight.shape)}"
        if name.startswith("ln_f."):
            weight = weight * logit_ratio(config)
        if ".attn.c_attn." in name and query_ratio(config) != 1.0:
            queries, others = weight.split((config.channels, 2 * config.channels))
            weight = torch.cat([queries * query_ratio(config), others])
        if name == "wte.weight":
            weight = weight[: config.vocabulary]
        if TRANSPOSED.fullmatch(name):
            weight = weight.T
        state[_PREFIX + name] = weight.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    return state


def from_hf_state(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """A GPT2LMHeadModel's or GPT2Model's state as our weights, in fp32; the padding rows of `wte` are zeros.

    Raises ConfigError naming all tensors that are missing, too many or of another shape than `config` says.
    """
    found: dict[str, torch.Tensor] = {}
    faults: list[str] = []
    for name, tensor in state.items():
        bare = name.removeprefix(_PREFIX)
        if _MASK_BUFFER.fullmatch(bare):
            continue
        if bare in found:
            faults.append(f"{name}: the weights hold it with and without the prefix {_PREFIX!r}; keep one")
        found[bare] = tensor
    head = found.pop("lm_head.weight", None)
    embedding = found.get("wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        faults.append("lm_head.weight: differs from wte.weight; this model ties them, export one with tied embeddings")
    shapes = parameter_shapes(config)
    shapes["wte.weight"] = (config.vocabulary, config.channels)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensor = found.pop(name, None)
        if tensor is None:
            faults.append(f"{name}: missing from the weights; give the complete model.safetensors of a GPT-2")
            continue
        theirs = tuple(reversed(shape)) if TRANSPOSED.fullmatch(name) else shape
        if tuple(tensor.shape) != theirs:
            faults.append(f"{name}={list(tensor.shape)}: config.json says {list(theirs)}; give the files of one model")
            continue
        tensor = tensor.to(torch.float32)
        if name == "wte.weight":
            padding = torch.zeros(config.padded_vocabulary - config.vocabulary, config.channels)
            tensor = torch.cat([tensor, padding])
        weights[name] = (tensor.T if TRANSPOSED.fullmatch(name) else tensor).contiguous()
    faults += [f"{name}: GPT-2 has no such parameter; give the weights of a GPT2LMHeadModel" for name in sorted(found)]
    if faults:
        raise ConfigError(faults)
    return weights


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json: the fields of transformers' GPT2Config that say what our model computes."""
    end = END_OF_TEXT if config.vocabulary > END_OF_TEXT else None
    return {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": config.dropout,
        "bos_token_id": end,
        "embd_pdrop": config.dropout,
        "eos_token_id": end,
        "initializer_range": 0.02,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "model_type": "gpt2",
        "n_ctx": config.context,
        "n_embd": config.channels,
        "n_head": config.heads,
        "n_inner": None,
        "n_layer": config.layers,
        "n_positions": config.context,
        "resid_pdrop": config.dropout,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": config.vocabulary,
    }


def model_config_from_hf(found: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """The ModelConfig of a config.json; what it leaves out has GPT2Config's default.

    Raises ConfigError naming every field that says something else than our model computes.
    """
    faults: list[str] = []

    def require(holds: bool, field: str, bound: str, remedy: str) -> None:
        if not holds:
            faults.append(f"{field}={found.get(field)!r}: {bound}; {remedy}")

    def size(field: str, default: int) -> int:
        value = found.get(field, default)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(whole, field, "must be a whole number above 0", "mend config.json")
        return value if whole else default

    another = "choose a GPT-2 with OpenAI's own settings"
    require(
        found.get("model_type") == "gpt2", "model_type", "must be 'gpt2' or 'nanochat'", "choose a model of these types"
    )
    channels, layers, heads = size("n_embd", 768), size("n_layer", 12), size("n_head", 12)
    context, vocabulary = size("n_positions", 1024), size("vocab_size", 50_257)
    require(channels % heads == 0, "n_embd", f"must be a multiple of n_head={heads}", "mend config.json")
    require(vocabulary < 65_536, "vocab_size", "must fit uint16 token shards", "choose a model with fewer tokens")
    require(
        found.get("n_inner") in (None, 4 * channels), "n_inner", f"must be null or 4 × n_embd = {4 * channels}", another
    )
    require(
        found.get("activation_function", "gelu_new") in _TANH_GELU,
        "activation_function",
        f"must be the tanh form of GELU, {' or '.join(_TANH_GELU)}",
        another,
    )
    epsilon = found.get("layer_norm_epsilon", LAYER_NORM_EPS)
    require(epsilon == LAYER_NORM_EPS, "layer_norm_epsilon", f"must be {LAYER_NORM_EPS}", another)
    for field, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
        ("tie_word_embeddings", True),
    ):
        require(found.get(field, wanted) is wanted, field, f"must be {str(wanted).lower()}", another)
    require(not found.get("quantization_config"), "quantization_config", "must be absent", "give the full weights")
    dropouts = [found.get(field, 0.1) for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    plain = all(isinstance(d, (int, float)) and not isinstance(d, bool) and 0 <= d < 1 for d in dropouts)
    require(
        plain and len(set(dropouts)) == 1,
        "resid_pdrop",
        f"must lie in [0, 1) and be the same as embd_pdrop={dropouts[1]!r} and attn_pdrop={dropouts[2]!r}",
        "set all three alike in config.json",
    )
    if faults:
        raise ConfigError(faults)
    return ModelConfig(
        name=name,
        layers=layers,
        channels=channels,
        heads=heads,
        context=context,
        vocabulary=vocabulary,
        dropout=float(dropouts[0]),
    )


def is_hf_folder(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def architecture(config: ModelConfig) -> str:
    """`gpt2` or `nanochat`, the model type under which transformers computes the same function.

    Raises ConfigError for a mixture of both, which it has no name for, and for multipliers of µP without a place in it.
    """
    defaults, shown = ModelConfig(), config.to_json()
    network = (*nanochat.NETWORK, "tied_head", "logit_softcap")
    modern = [f"model.{name}={shown[name]}" for name in network if getattr(config, name) != getattr(defaults, name)]
    if not modern:
        return "gpt2"
    missing = nanochat.differences(config)
    if not missing:
        if faults := nanochat.mup_faults(config):
            raise ConfigError(faults)
        return nanochat.MODEL_TYPE
    raise ConfigError(
        [
            f"{', '.join(modern)}: no GPT-2, and with {', '.join(missing)} no NanoChat: transformers has no name for "
            f"this mixture; train with the network of recipe=gpt2 or of recipe=modern to export it; `gpt2train "
            f"generate` and `evaluate` take the run as it is"
        ]
    )


def read_hf_folder(path: str | Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """(ModelConfig, our weights) of a folder in Hugging Face format.

    Raises ConfigError for a folder that is none or whose model is not ours, CheckpointError for a damaged file.
    """
    folder = Path(path)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"path={folder}: has no config.json; give a folder in Hugging Face format"]) from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: is no JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object; fetch it again")
    modern = found.get("model_type") == nanochat.MODEL_TYPE
    config = nanochat.model_config_from_hf(found) if modern else model_config_from_hf(found)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safe_open object is no dictionary)
                    state[name] = tensors.get_tensor(name)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: is missing, but the index names it; fetch it again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{file}: is damaged ({error}); fetch it again") from None
    return config, nanochat.from_hf_state(state, config) if modern else from_hf_state(state, config)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json names; raises as `read_hf_folder` does."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index}: expected an object with `weight_map`; fetch it again") from None
        for name in names:
            if Path(name).name != name:
                raise ConfigError([f"{index}: {name!r}: must name a file of the same folder; mend the index"])
        return [folder / name for name in names]
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise ConfigError(
            [
                f"{pickles[0]}: is a pickle, and reading one can run code; convert it where you trust it with "
                f"transformers' save_pretrained(folder, safe_serialization=True) and give that folder"
            ]
        )
    raise ConfigError([f"path={folder}: has no model.safetensors; give the folder of a GPT2LMHeadModel"])


def read_model(path: str | Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """(ModelConfig, our weights in fp32) of a run folder, a checkpoint folder or a folder in Hugging Face format."""
    if is_hf_folder(path):
        return read_hf_folder(path)
    folder = checkpoint.resolve(path)
    return ModelConfig.from_json(checkpoint.read_state(folder)["model"]), checkpoint.read_weights(folder)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The model of a run folder, a checkpoint folder or a folder in Hugging Face format, in fp32 and eval mode.

    One that was trained with `data.document_mask` is evaluated with it.
    """
    config, weights = read_model(path)
    data = {} if is_hf_folder(path) else checkpoint.read_state(checkpoint.resolve(path)).get("data", {})
    model = GPT(
        config,
        seed=None,
        document_mask=bool(data.get("document_mask", False)),
        reset_positions=bool(data.get("reset_positions", False)),
    )
    model.load_state_dict(weights)
    return model.to(device).eval()


def choose_device(device: Device) -> torch.device:
    """`auto`: cuda where there is one. Raises ConfigError for cuda where there is none."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError(["device=cuda: torch sees no GPU; give device=cpu"])
    return torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")
