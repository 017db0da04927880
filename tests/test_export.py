"""A checkpoint → what transformers loads, and back to a run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.claim import Claim, identity
from gpt2train.config import ModelConfig, TrainConfig
from gpt2train.errors import CheckpointError, ConfigError, GPT2TrainError
from gpt2train.generation.decoding import sample
from gpt2train.release import export
from gpt2train.release.config import ExportConfig, ExportFormat, ImportConfig
from gpt2train.release.export import export_run, import_model
from gpt2train.release.hf import load_model

transformers = pytest.importorskip("transformers", reason="transformers is the reference")

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer_config.json",
    "vocab.json",
}


def make_run(folder: Path, config: ModelConfig = TINY) -> Path:
    """A run folder as `train` leaves it after step 20."""
    weights = lively(config).state_dict()
    data = {"fingerprint": "f" * 64, "tokenizer_sha256": load_tokenizer().sha256}
    state = {
        "step": 20,
        "tokens": 5120,
        "model": config.to_json(),
        "data": data,
        "layout": {"processes": 2, "zero_stage": 1, "precision": "fp32"},
    }
    tensors = ((n, w, torch.ones_like(w), torch.ones_like(w)) for n, w in weights.items())
    checkpoint.save(folder, 20, tensors, state)
    run = TrainConfig(model=config, steps=20, run_dir=str(folder))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))
    lines = [{"step": 20, "loss": 6.25, "tokens": 5120}, {"step": 20, "validation_loss": 6.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    versions = {"versions": {"torch": "2.13"}, "git_commit": "abc123", "data": {"path": "/secret/place", **data}}
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "odd | *name*")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "new" / "out"
    assert export_run(ExportConfig(run=str(run), to=str(folder))) == 0
    return folder


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # transformers announces its own changes
def test_transformers_generates_the_same_text(exported: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "In a shocking finding, naïve 🤷🏽‍♀️"
    inputs = tokenizer(text, return_tensors="pt")
    ours = load_tokenizer()
    assert inputs["input_ids"][0].tolist() == ours.encode(text).tolist()
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=30, pad_token_id=tokenizer.eos_token_id)
    options = {"max_new_tokens": 30, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    new = list(sample(load_model(exported), ours.encode(text).tolist(), **options))
    assert tokenizer.decode(out[0]) == text + ours.decode(new)
    assert len(set(new)) > 10


def test_the_tokenizer_is_gpt_2s(exported: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer()
    assert (len(theirs), theirs.eos_token, theirs.eos_token_id) == (50257, "<|endoftext|>", 50256)
    assert theirs.model_max_length == TINY.context
    for text in ("  two spaces ,and a comma .", "日本語\n\n\tΕλληνικά", "don't  I'LL 123456"):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_the_folder_holds_what_it_should(exported: Path, run: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    assert [path.name for path in exported.parent.iterdir()] == ["out"], "nothing is left beside it"
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("transformer.wte.weight").get_shape() == [50257, 32]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in exported.iterdir()), "others may read it"
    loaded = transformers.AutoConfig.from_pretrained(exported)
    assert (loaded.n_layer, loaded.n_embd, loaded.n_head, loaded.n_positions) == (2, 32, 2, 64)


def test_the_same_checkpoint_gives_the_same_bytes(exported: Path, run: Path, tmp_path: Path) -> None:
    named = run / "checkpoints" / "step_00000020"
    assert export_run(ExportConfig(run=str(named), to=str(tmp_path))) == 0, "an empty folder is a new one"
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_the_model_card(exported: Path, run: Path) -> None:
    text = (exported / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    [result] = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "odd | *name*"
    assert result["metrics"][0]["value"] == 6.5
    assert r"# odd \| \*name\*" in body
    for said in ("5,120", "6.2500", "6.5000", "f" * 64, "abc123", "ZeRO stage 1", "No license is stated here"):
        assert said in body, said
    assert "/secret" not in text
    assert str(run) not in text


def test_the_card_tells_of_the_corpus_the_compute_and_the_audit(tmp_path: Path) -> None:
    run, corpus = make_run(tmp_path / "run"), tmp_path / "corpus"
    (corpus / "tokens").mkdir(parents=True)
    split = {"tokens": 900_000, "documents": 12, "files": []}
    (corpus / "tokens" / "manifest.json").write_text(json.dumps({"fingerprint": "f" * 64, "splits": {"train": split}}))
    stage = {"stage": "filter", "in": 20, "kept": 12, "dropped": 8, "failed": 0, "reasons": {"too_short": 7, "x": 1}}
    summary = {"source": "urls", "recipe": "webtext", "stages": [stage], "tokens": {"fingerprint": "f" * 64}}
    (corpus / "summary.json").write_text(json.dumps(summary))
    versions = json.loads((run / "versions.json").read_text())
    versions["data"]["path"] = str(corpus / "tokens")
    (run / "versions.json").write_text(json.dumps(versions))
    config = TrainConfig(model=TINY, steps=20, run_dir=str(run))
    config.cluster.watts, config.cluster.device = 700.0, "H100 SXM"
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    lines = [{"step": s, "loss": 6.0, "tokens": 256 * s, "tokens_per_s": 128.0} for s in range(1, 26)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"checkpoint": "step_00000020", "prompt_tokens": 50, "continuation_tokens": 40,
             "windows": {"said": 3, "tried": 500, "interval": [0.002, 0.018]},
             "personal": {"emails": {"said": 1, "tried": 30}}}  # fmt: skip
    (run / "audit.json").write_text(json.dumps(found))
    export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "900,000 tokens of 12 documents" in text
    assert r"20 in, 12 kept, 8 dropped, 0 failed; too\_short 7, x 1" in text
    assert "recipe webtext" in text
    # 20 steps of 256 tokens at 128 a second are 40 s; two processes; 700 W.
    assert "| 0.0222 |" in text
    assert "0.0156 kWh (700 W, H100 SXM; the rest of the machine not counted)" in text
    assert "40 tokens said after 50 | 3 of 500 (0.20% to 1.80%)" in text
    assert "emails in the training text, said | 1 of 30" in text
    found["checkpoint"] = "step_00000010"
    (run / "audit.json").write_text(json.dumps(found))
    (corpus / "tokens" / "manifest.json").write_text(json.dumps({"fingerprint": "e" * 64, "splits": {}}))
    export_run(ExportConfig(run=str(run), to=str(tmp_path / "other")))
    text = (tmp_path / "other" / "README.md").read_text()
    assert "Not looked at" in text
    assert "the corpus is not where it was" in text


def test_the_card_makes_nothing_up(run: Path, tmp_path: Path) -> None:
    """A checkpoint that was taken out of its run: no losses, no settings, no name."""
    alone = tmp_path / "step_00000020"
    shutil.copytree(run / "checkpoints" / "step_00000020", alone)
    export_run(ExportConfig(run=str(alone), to=str(tmp_path / "out")))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured for this checkpoint." in text
    assert "model-index" not in text
    assert "learning rate" not in text
    assert "# tiny" in text


def test_an_evaluation_of_another_checkpoint_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = {"name": "book", "tokens": 7, "loss": 4.25, "perplexity": 70.0, "word_perplexity": None}
    for source, shown in (("step_00000010", False), ("step_00000020", True)):
        (run / "evaluation.json").write_text(json.dumps({"source": source, "results": [result]}))
        export_run(ExportConfig(run=str(run), to=str(tmp_path / source)))
        text = (tmp_path / source / "README.md").read_text()
        assert ("book (7 tokens), nats per token | 4.2500" in text) == shown
        assert "perplexity per word" not in text


@pytest.mark.parametrize("occupied", ["a file in it", "a file in its place"])
def test_nothing_is_overwritten(run: Path, exported: Path, tmp_path: Path, occupied: str) -> None:
    target = tmp_path / "out"
    if occupied == "a file in it":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    else:
        target.write_text("mine")
    for command in (
        lambda: export_run(ExportConfig(run=str(run), to=str(target))),
        lambda: import_model(ImportConfig(path=str(exported), to=str(target))),
    ):
        with pytest.raises(ConfigError, match=r"to=.*; give a new folder"):
            command()
    left = target / "thesis.txt" if occupied == "a file in it" else target
    assert left.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_settings_that_are_missing_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"run=''.*\nto=''"):
        export_run(ExportConfig())
    with pytest.raises(ConfigError, match=r"path=''.*\nto=''"):
        import_model(ImportConfig())


def test_a_disk_that_lies_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit between writing and reading back, and nothing is published."""
    save = export.save_file

    def save_and_flip(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata=metadata)
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr(export, "save_file", save_and_flip)
    with pytest.raises(CheckpointError, match=r"read back, .* differ from what was written"):
        export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_tokenizer", full)
    with pytest.raises(GPT2TrainError, match=r"cannot be written .No space left on device."):
        export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    [weights] = (run / "checkpoints").glob("*/weights_*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_is_not_gpt_2s_has_no_tokenizer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(TINY, vocabulary=300))
    export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == FILES - {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


# -- import


def test_import_makes_a_run_to_go_on_from(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "imported"
    assert import_model(ImportConfig(path=str(exported), to=str(folder))) == 0
    newest = checkpoint.newest_whole(folder)
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (state["step"], state["tokens"]) == (0, 0)
    with checkpoint.Reader(newest) as read:
        for name, weight in lively(TINY).state_dict().items():
            got, *moments = read(name)
            assert torch.equal(got, weight), name
            assert all(not m.any() and m.shape == weight.shape for m in moments)
    assert f"train run_dir={folder} model.name=imported model.layers=2 model.channels=32" in capsys.readouterr().err
    assert torch.equal(load_model(folder).wte.weight, lively(TINY).wte.weight)


def test_an_imported_model_exports_to_the_same_weights(exported: Path, tmp_path: Path) -> None:
    import_model(ImportConfig(path=str(exported), to=str(tmp_path / "run")))
    export_run(ExportConfig(run=str(tmp_path / "run"), to=str(tmp_path / "out")))
    before, after = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its weights were imported, as named below, and not trained further." in card
    assert "imported model.safetensors, sha256" in card


def test_the_card_says_when_training_went_on_from_an_import(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_model(ImportConfig(path=str(exported), to=str(run)))
    make_run(run)
    export_run(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    assert "Its training went on from imported weights" in (tmp_path / "out" / "README.md").read_text()
    # Started from nothing since: a new id, and the import has no part in it.
    Claim(run, run_id="another", identity=identity(TrainConfig(model=TINY), "f" * 64), published=20).record()
    export_run(ExportConfig(run=str(run), to=str(tmp_path / "again")))
    assert "imported" not in (tmp_path / "again" / "README.md").read_text()


def test_what_is_not_ours_is_not_imported(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(ConfigError, match="activation_function='relu': must be the tanh form of GELU"):
        import_model(ImportConfig(path=str(other), to=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# -- GGUF

GGUF_MODEL = replace(TINY, context=1024)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With GPT-2's context: transformers takes no other from a GGUF file."""
    pytest.importorskip("gguf", reason="the format's own library writes it: pip install 'gpt2train[gguf]'")
    to = tmp_path_factory.mktemp("gguf") / "out"
    run = make_run(to.parent / "run", GGUF_MODEL)
    assert export_run(ExportConfig(run=str(run), to=str(to), format=ExportFormat.gguf)) == 0
    return to


GGUF_TEXT = "In a shocking finding, 37 naïve 日本語   unicorns' herd…\n\nIt's"


@pytest.mark.soak  # transformers takes many seconds to read a tokenizer out of such a file
def test_a_gguf_file_holds_the_model_and_its_tokenizer(gguf_folder: Path) -> None:
    """transformers reads it by names and transposes of its own: the same logits, the same ids."""
    assert {path.name for path in gguf_folder.iterdir()} == FILES | {"model.gguf"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf").eval()
    ids = load_tokenizer().encode(GGUF_TEXT).tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
    assert tokenizer.encode(GGUF_TEXT, add_special_tokens=False) == ids
    with torch.no_grad():
        expected = lively(GGUF_MODEL)(torch.tensor([ids]))
        got = theirs(torch.tensor([ids])).logits
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


def test_llama_cpp_runs_the_gguf_file(gguf_folder: Path) -> None:
    """It cuts the text as GPT-2 does, and its likeliest tokens have our log-likelihoods."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp for Python, to run the file: pip install xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_folder / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 128, 1, False, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    ids = load_tokenizer().encode(GGUF_TEXT).tolist()
    answer = server.handle_completions({"prompt": GGUF_TEXT, "max_tokens": 1, "temperature": 0.0, "logprobs": 20})
    assert answer["usage"]["prompt_tokens"] == len(ids)
    found = {t["id"]: t["logprob"] for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    with torch.no_grad():
        expected = lively(GGUF_MODEL)(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    assert list(found) == expected.topk(len(found)).indices.tolist()
    # ggml looks GELU up in a table of half precision: 0.004 was seen; a wrong weight makes this more than 1.
    assert max(abs(value - expected[token].item()) for token, value in found.items()) < 0.02


def test_what_gguf_cannot_have_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_run(tmp_path / "small", replace(TINY, vocabulary=500))
    with pytest.raises(ConfigError, match=r"model\.vocabulary=500: must be 50257; give format=hf"):
        export_run(ExportConfig(run=str(small), to=str(tmp_path / "out"), format=ExportFormat.gguf))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpt2train\[gguf\]'"):
        export_run(ExportConfig(run=str(run), to=str(tmp_path / "out"), format=ExportFormat.gguf))
    assert not (tmp_path / "out").exists()
