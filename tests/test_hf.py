"""Our weights ↔ transformers' GPT2LMHeadModel: the same function, and a refusal of whatever is not it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from gpt2train.config import Device, ModelConfig
from gpt2train.errors import CheckpointError, ConfigError
from gpt2train.model import GPT
from gpt2train.release.hf import (
    choose_device,
    from_hf_state,
    hf_config,
    load_model,
    model_config_from_hf,
    parameter_shapes,
    read_hf_folder,
    to_hf_state,
)

transformers = pytest.importorskip("transformers", reason="transformers is the reference")

TINY = ModelConfig("tiny", layers=2, channels=48, heads=3, context=32, vocabulary=301, pad_vocabulary_to=64)
SMALL = ModelConfig("small")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of an untrained model, with gains, biases and positions that are no zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(GPT(config, seed=seed).state_dict())
    return {
        name: w + (0.1 if w.ndim == 1 else 0.0) * torch.randn(w.shape, generator=generator)
        for name, w in weights.items()
    }


def reference(config: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))


def tokens(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def save_pretrained(config: ModelConfig, folder: Path, **options: object) -> None:
    """A folder as transformers itself writes it."""
    torch.manual_seed(3)
    settings = transformers.GPT2Config(**hf_config(config))
    transformers.GPT2LMHeadModel(settings).save_pretrained(folder, **options)


@pytest.mark.parametrize("config", [TINY, replace(TINY, vocabulary=320), SMALL], ids=["tiny", "no padding", "124M"])
def test_logits_equal_those_of_transformers(config: ModelConfig) -> None:
    weights = random_weights(config)
    ours = GPT(config)
    ours.load_state_dict(weights)
    theirs = reference(config)
    missing = theirs.load_state_dict(to_hf_state(weights, config), strict=False, assign=True)
    assert missing.missing_keys == ["lm_head.weight"], "all but the tied head comes from us"
    assert missing.unexpected_keys == []
    theirs.tie_weights()
    batch = tokens(config, 2, min(config.context, 64))
    with torch.no_grad():
        expected = theirs.eval()(batch).logits
        got = ours.eval()(batch)
    assert got.shape == expected.shape == (*batch.shape, config.vocabulary)
    assert (got - expected).abs().max().item() <= 1e-5


def test_there_and_back_is_the_same_bits() -> None:
    weights = random_weights(TINY)
    back = from_hf_state(to_hf_state(weights, TINY), TINY)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert back["wte.weight"].shape == (320, 48)


def test_shapes_are_the_models_own() -> None:
    assert parameter_shapes(TINY) == {name: tuple(p.shape) for name, p in GPT(TINY).named_parameters()}


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_transformers_saves(tmp_path: Path, sharded: bool) -> None:
    save_pretrained(TINY, tmp_path, **({"max_shard_size": "60KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    model = load_model(tmp_path)
    assert not model.training
    assert replace(model.config, name="tiny", pad_vocabulary_to=64) == TINY
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    batch = tokens(TINY, 2, 32)
    with torch.no_grad():
        assert (model(batch) - theirs(batch).logits).abs().max().item() <= 1e-5


def test_reads_a_file_without_prefix_and_with_mask_buffers(tmp_path: Path) -> None:
    """The form of OpenAI's weights on the Hub."""
    weights = random_weights(TINY)
    state = {name.removeprefix("transformer."): w for name, w in to_hf_state(weights, TINY).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    state |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    _, read = read_hf_folder(tmp_path)
    padded = torch.cat([weights["wte.weight"][:301], torch.zeros(83, 48)])
    assert torch.equal(read.pop("wte.weight"), padded)
    assert all(torch.equal(read[name], weights[name]) for name in read)


def test_half_precision_files_become_fp32(tmp_path: Path) -> None:
    state = {name: w.to(torch.bfloat16) for name, w in to_hf_state(random_weights(TINY), TINY).items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    _, read = read_hf_folder(tmp_path)
    assert {w.dtype for w in read.values()} == {torch.float32}
    assert torch.equal(read["h.1.mlp.c_fc.weight"], state["transformer.h.1.mlp.c_fc.weight"].float().T)


def test_all_faulty_tensors_are_named_together() -> None:
    state = to_hf_state(random_weights(TINY), TINY)
    del state["transformer.ln_f.bias"]
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].T
    state["score.weight"] = torch.zeros(2, 48)
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with pytest.raises(ConfigError) as caught:
        from_hf_state(state, TINY)
    assert len(caught.value.faults) == 4
    text = str(caught.value)
    assert "ln_f.bias: missing" in text
    assert "h.0.mlp.c_fc.weight=[192, 48]: config.json says [48, 192]" in text
    assert "score.weight: GPT-2 has no such parameter" in text
    assert "lm_head.weight: differs from wte.weight" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("n_inner", 100),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("attn_pdrop", 0.3),
        ("n_head", 5),
        ("n_layer", 0),
        ("n_embd", "48"),
        ("vocab_size", 70_000),
        ("model_type", "llama"),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_field_that_our_model_cannot_represent_is_named(field: str, value: object) -> None:
    shown = {"attn_pdrop": "resid_pdrop", "n_head": "n_embd"}.get(field, field)
    with pytest.raises(ConfigError, match=f"^{shown}=.*: must .*; "):
        model_config_from_hf(hf_config(TINY) | {field: value})


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    theirs = transformers.GPT2Config()
    ours = model_config_from_hf({"model_type": "gpt2"})
    assert (ours.layers, ours.channels, ours.heads) == (theirs.n_layer, theirs.n_embd, theirs.n_head)
    assert (ours.context, ours.vocabulary, ours.dropout) == (theirs.n_positions, theirs.vocab_size, theirs.resid_pdrop)
    assert model_config_from_hf(hf_config(SMALL)) == replace(SMALL, name="imported")


def test_the_three_names_of_the_tanh_gelu_are_one_function() -> None:
    x = torch.linspace(-6, 6, 1001)
    ours = torch.nn.functional.gelu(x, approximate="tanh")
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        model_config_from_hf(hf_config(TINY) | {"activation_function": name})
        assert (transformers.activations.ACT2FN[name](x) - ours).abs().max().item() < 1e-6


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("sprung"),)


def test_a_pickle_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: is a pickle.*safe_serialization"):
        load_model(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "missing shard", "config torn", "config missing", "no weights"]
)
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    save_pretrained(TINY, tmp_path, max_shard_size="60KB" if damage == "missing shard" else "1GB")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing shard":
        sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    elif damage == "config torn":
        config.write_text(config.read_text()[:100])
    elif damage == "config missing":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    error = ConfigError if damage in ("config missing", "no weights") else CheckpointError
    with pytest.raises(error, match=r"model|config\.json"):
        read_hf_folder(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(TINY, folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    (tmp_path / "other.safetensors").write_bytes((folder / content["weight_map"][name]).read_bytes())
    content["weight_map"][name] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"'\.\./other\.safetensors': must name a file of the same folder"):
        read_hf_folder(folder)


def test_weights_are_written_contiguous(tmp_path: Path) -> None:
    state = to_hf_state(random_weights(TINY), TINY)
    save_file(state, tmp_path / "x.safetensors")  # refuses tensors that are not
    assert load_file(tmp_path / "x.safetensors").keys() == state.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    assert choose_device(Device.auto) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda: torch sees no GPU"):
        choose_device(Device.cuda)
