"""A modern model → transformers' NanoChat and back; mixtures that transformers has no name for are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import FILES, lively, make_run
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.config import ModelConfig
from gpt2train.errors import ConfigError
from gpt2train.generation.decoding import sample
from gpt2train.release import nanochat
from gpt2train.release.config import ExportConfig, ImportConfig
from gpt2train.release.export import export_run, import_model
from gpt2train.release.hf import architecture, load_model

transformers = pytest.importorskip("transformers", reason="transformers is the reference", minversion="5.0")

MODERN = ModelConfig(
    "tiny", layers=2, channels=32, heads=2, context=64, tied_head=False, logit_softcap=15.0, **nanochat.NETWORK
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    assert export_run(ExportConfig(run=str(make_run(folder / "run", MODERN)), to=str(folder / "out"))) == 0
    return folder / "out"


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # transformers announces its own changes
def test_transformers_computes_and_writes_the_same(exported: Path) -> None:
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "In a shocking finding, naïve 🤷🏽‍♀️"
    inputs = tokenizer(text, return_tensors="pt")
    tokens = load_tokenizer().encode(text).tolist()
    assert inputs["input_ids"][0].tolist() == tokens
    model = lively(MODERN)
    with torch.no_grad():
        ours = model(inputs["input_ids"])
        torch.testing.assert_close(theirs.eval()(**inputs).logits, ours, rtol=0, atol=1e-4)
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=30, pad_token_id=tokenizer.eos_token_id)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    new = list(sample(load_model(exported), tokens, **options))
    assert out[0].tolist() == tokens + new
    assert len(set(new)) > 5


def test_the_folder_and_its_card(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    card = (exported / "README.md").read_text()
    for said in (
        "- nanochat",
        "is not GPT-2's of 2019",
        "from version 5.0 on",
        "logits capped at ±15",
        "matrix of its own",
    ):
        assert said in card
    assert "- gpt2\n" not in card


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("change", [{"tied_head": True}, {"logit_softcap": 0.0}])
def test_the_head_and_the_cap_are_free(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(MODERN, **change)
    export_run(ExportConfig(run=str(make_run(tmp_path / "run", config)), to=str(tmp_path / "out")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    x = torch.randint(0, 50_257, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, lively(config)(x), rtol=0, atol=1e-4)


def test_an_import_is_the_exported_run(exported: Path, tmp_path: Path) -> None:
    import_model(ImportConfig(path=str(exported), to=str(tmp_path / "run")))
    imported = load_model(tmp_path / "run")
    assert replace(imported.config, name="tiny") == MODERN
    for name, weight in lively(MODERN).state_dict().items():
        got = imported.get_parameter(name)
        rows = MODERN.vocabulary if name in ("wte.weight", "lm_head.weight") else len(weight)
        assert torch.equal(got[:rows], weight[:rows]), name
        assert not got[rows:].any()


@pytest.mark.parametrize("name", [*nanochat.NETWORK, "tied_head", "logit_softcap"])
def test_a_mixture_is_refused_with_what_stands_in_the_way(name: str, tmp_path: Path) -> None:
    config = replace(ModelConfig("tiny", layers=2, channels=32, heads=2, context=64), **{name: getattr(MODERN, name)})
    shown = f"model.{name}={config.to_json()[name]}"
    with pytest.raises(
        ConfigError, match=r"no GPT-2, and with .* no NanoChat: .* train with the network of"
    ) as refused:
        architecture(config)
    assert str(refused.value).startswith(shown)
    if name == "qk_norm":
        run = make_run(tmp_path / "run", config)
        with pytest.raises(ConfigError, match=f"run={run}: model.qk_norm=True: no GPT-2"):
            export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


def test_what_each_architecture_is_called() -> None:
    assert architecture(ModelConfig()) == "gpt2"
    assert architecture(MODERN) == "nanochat"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu", "hidden_act='gelu': must be 'relu2'"),
        ("num_key_value_heads", 1, "num_key_value_heads=1: must be 2"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps=1e-05: must be 1e-06"),
        ("rope_parameters", {"rope_theta": 5e5}, "rope_theta=500000.0: must be 10000.0"),
        ("hidden_size", True, "hidden_size=True: must be a whole number above 0"),
        ("final_logit_softcapping", -1, "final_logit_softcapping=-1: must be null or above 0"),
        ("vocab_size", 1 << 17, "vocab_size=131072: must fit uint16"),
    ],
)
def test_another_nanochat_is_refused_by_field(exported: Path, field: str, value: object, said: str) -> None:
    found = json.loads((exported / "config.json").read_text()) | {field: value}
    with pytest.raises(ConfigError) as refused:
        nanochat.model_config_from_hf(found)
    assert said in str(refused.value)


def test_weights_that_do_not_fit_are_named_together(exported: Path, tmp_path: Path) -> None:
    state = load_file(exported / "model.safetensors")
    state["model.layers.0.mlp.fc1.weight"] = state["model.layers.0.mlp.fc1.weight"][:5].contiguous()
    del state["lm_head.weight"]
    state["model.layers.7.extra"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(ConfigError) as refused:
        load_model(tmp_path)
    for said in (
        "fc1.weight=[5, 32]: config.json says [128, 32]",
        "lm_head.weight: missing",
        "layers.7.extra: NanoChat has",
    ):
        assert said in str(refused.value)
