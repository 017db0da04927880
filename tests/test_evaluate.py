"""Losses and perplexities against loops that have nothing in common with them but the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import torch.multiprocessing
from safetensors.torch import save_file
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)
from torch.nn import functional as F

from data_pipeline.token_shards import TokenShards
from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.config import ModelConfig
from gpt2train.errors import ConfigError
from gpt2train.evaluate import Measure, _number, as_json, evaluate, text_measure, validation_loss
from gpt2train.evaluation.config import EvaluateCommandConfig
from gpt2train.model import GPT
from gpt2train.release.hf import hf_config, to_hf_state

TINY = ModelConfig("tiny", layers=2, channels=16, heads=2, context=32, dropout=0.3)
TEXTS = [f"Document {i}: the naïve café has {i * i} visitors — ça va? " * (3 + i % 4) for i in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards: five documents to train on, seven to validate, over several files."""
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = load_tokenizer()
    with TokenShardWriter(folder, shard_tokens=300, tokenizer_sha256=tokenizer.sha256) as writer:
        for i, text in enumerate(TEXTS):
            ids = np.append(tokenizer.encode(text), np.uint16(END_OF_TEXT)).astype(np.uint16)
            digest = hashlib.sha256(text.encode()).hexdigest()
            writer.append("train" if i < 5 else "validation", ids, index=i, url=f"http://d{i}.test/", digest=digest)
        writer.finish(made_from="texts of a test", settings={})
    return folder


def stream(data: Path) -> np.ndarray:
    """The validation split, read from its files without our reader."""
    parts = [np.fromfile(path, "<u2") for path in sorted(data.glob("validation_*.bin"))]
    return np.concatenate(parts).astype(np.int64)


def lively() -> GPT:
    """As training leaves it: dropout is on."""
    return tiny_models.lively(TINY, seed=1, spread=0.3).train()


def loss_by_loop(model: GPT, tokens: np.ndarray, windows: int) -> float:
    """One window at a time, from logits, in float64."""
    losses = []
    model.eval()
    with torch.no_grad():
        for i in range(windows):
            window = torch.from_numpy(tokens[i * 32 : i * 32 + 33])
            logits = model(window[None, :-1])[0].double()
            losses.append(F.cross_entropy(logits, window[1:]).item())
    return float(np.mean(losses))


@pytest.mark.parametrize("sequences", [1, 3, 7, 0, 10_000])
@pytest.mark.parametrize("micro", [1, 4])
def test_validation_loss_equals_a_plain_loop(data: Path, sequences: int, micro: int) -> None:
    model, tokens = lively(), stream(data)
    windows = (len(tokens) - 1) // 32
    assert windows >= 15
    got = validation_loss(
        model,
        TokenShards.open(data).split("validation"),
        context=32,
        sequences=sequences,
        micro=micro,
        device="cpu",
    )
    expected = loss_by_loop(model, tokens, min(sequences or windows, windows))
    assert got == pytest.approx(expected, rel=1e-6)


def test_the_mode_of_the_model_comes_back(data: Path) -> None:
    """Dropout is off while it is measured, and on again after."""
    model = lively().train()
    split = TokenShards.open(data).split("validation")
    losses = {validation_loss(model, split, context=32, sequences=4, micro=2, device="cpu") for _ in range(3)}
    assert len(losses) == 1
    assert model.training


def test_autocast_is_used(data: Path) -> None:
    split, model = TokenShards.open(data).split("validation"), lively()
    options = {"context": 32, "sequences": 8, "micro": 4, "device": "cpu"}
    exact = validation_loss(model, split, **options)
    rounded = validation_loss(model, split, autocast_dtype=torch.bfloat16, **options)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_a_split_without_a_window_is_named(data: Path) -> None:
    split = TokenShards.open(data).split("validation")
    with pytest.raises(ConfigError, match=rf"its {split.tokens} tokens are fewer than one sequence.*context=4096"):
        validation_loss(lively(), split, context=4096, sequences=0, micro=1, device="cpu")


def _one_rank(rank: int, world_size: int, data: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    split = TokenShards.open(data).split("validation")
    model = lively()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    losses = [
        validation_loss(model, split, context=32, sequences=n, micro=2, rank=rank, world_size=world_size, device="cpu")
        for n in (1, 5, 9)
    ]
    Path(out, str(rank)).write_text(json.dumps({"losses": losses, "passes": len(passes)}))
    torch.distributed.destroy_process_group()


def test_two_ranks_agree_with_one_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """1, 5 and 9 sequences in micro batches of 2 are uneven shares: one rank has nothing left to do at the end."""
    torch.multiprocessing.spawn(_one_rank, (2, str(data), str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    split = TokenShards.open(data).split("validation")
    alone = [validation_loss(lively(), split, context=32, sequences=n, micro=2, device="cpu") for n in (1, 5, 9)]
    assert found[0]["losses"] == found[1]["losses"] == alone
    # 1, 3 and 5 micro batches: 1, 2 and 3 turns, and in each turn both ranks make a forward pass.
    assert [rank["passes"] for rank in found] == [6, 6]


# -- texts


def nats_by_loop(model: GPT, ids: np.ndarray, stride: int) -> float:
    """The sliding window of transformers' guide to perplexity, one window at a time, from whole logits."""
    nats, before = 0.0, 0
    model.eval()
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + 32, len(ids) - 1)
        begin = max(end - 32, 0)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, begin:end]))[0].double()
        losses = F.cross_entropy(logits, torch.from_numpy(ids[begin + 1 : end + 1]), reduction="none")
        nats += losses[before - end :].sum().item() if before else losses.sum().item()
        before = end
        if end == len(ids) - 1:
            return nats
    raise AssertionError("the loop ends at the last token")


@pytest.mark.parametrize("stride", [1, 5, 16, 32, 512])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text", ["One", TEXTS[0], " ".join(TEXTS[:5])], ids=["a word", "a text", "five texts"])
def test_text_perplexity_equals_a_plain_loop(text: str, stride: int, batch: int) -> None:
    model, tokenizer = lively().eval(), load_tokenizer()
    ids = np.concatenate([[END_OF_TEXT], tokenizer.encode(text)]).astype(np.int64)
    got = text_measure(model, text, tokenizer, stride=stride, batch=batch)
    assert got.nats == pytest.approx(nats_by_loop(model, ids, min(stride, 32)), rel=1e-6)
    assert (got.tokens, got.words, got.text_bytes) == (len(ids) - 1, len(text.split()), len(text.encode()))
    assert got.perplexity == pytest.approx(math.exp(got.nats / got.tokens))
    assert got.word_perplexity == pytest.approx(math.exp(got.nats / got.words))
    assert got.bits_per_byte == pytest.approx(got.nats / math.log(2) / len(text.encode()))


def test_the_model_is_left_as_it_was() -> None:
    """The hook that saves logits is gone: the model gives all positions again."""
    model = lively().eval()
    text_measure(model, TEXTS[0], load_tokenizer(), stride=4, batch=2)
    assert model(torch.zeros(1, 7, dtype=torch.int64)).shape == (1, 7, TINY.vocabulary)


def test_what_cannot_be_said_is_null() -> None:
    found = as_json(Measure("x", nats=1e6, tokens=10))
    assert found["loss"] == 1e5
    assert found["perplexity"] is found["word_perplexity"] is found["bits_per_byte"] is None


@pytest.mark.parametrize(
    ("value", "told"), [(None, "–"), (3.25, "3.2500"), (123456.5, "123456.5000"), (1.2345e76, "1.234e+76")]
)
def test_a_number_of_77_digits_is_told_by_its_first(value: float | None, told: str) -> None:
    assert _number(value) == told


# -- the command


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """A run folder as `train` leaves it, as far as evaluation reads it."""
    folder = tmp_path / "run"
    weights = lively().state_dict()
    tensors = ((n, w, torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items())
    state = {"step": 40, "tokens": 1280, "model": TINY.to_json()}
    checkpoint.save(folder, 40, tensors, state)
    (folder / "versions.json").write_text(json.dumps({"data": {"path": str(data)}}))
    return folder


def test_the_command_prints_and_records(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(TEXTS), encoding="utf-8")
    assert evaluate(EvaluateCommandConfig(run=str(run), texts=[str(text)], stride=16)) == 0
    found = json.loads((run / "evaluation.json").read_text())
    tokens = stream(data)
    windows = (len(tokens) - 1) // 32
    validation, book = found["results"]
    loss = loss_by_loop(lively(), tokens, windows)
    assert validation["loss"] == pytest.approx(loss, rel=1e-6)
    assert validation["tokens"] == 32 * windows
    targets = [i for i in tokens[1 : 32 * windows + 1] if i != END_OF_TEXT]
    spelled = len(load_tokenizer().decode_bytes(targets))
    assert validation["bits_per_byte"] == pytest.approx(loss * 32 * windows / math.log(2) / spelled, rel=1e-6)
    assert book["words"] == len(" ".join(TEXTS).split())
    assert (found["source"], found["step"], found["tokens_trained"]) == ("step_00000040", 40, 1280)
    assert found["data_fingerprint"] == TokenShards.open(data).fingerprint
    printed = capsys.readouterr().out
    for m in (validation, book):
        assert f"{m['loss']:.4f}" in printed
        assert f"{m['bits_per_byte']:.4f}" in printed


def test_no_bits_per_byte_for_another_vocabulary(run: Path, tmp_path: Path) -> None:
    """Tokens of another vocabulary spell other bytes, so no number is made up."""
    other = tmp_path / "other"
    other.mkdir()
    ids = np.append(np.arange(100, dtype=np.uint16), np.uint16(END_OF_TEXT))
    with TokenShardWriter(other, shard_tokens=1000, tokenizer_sha256="0" * 64) as writer:
        for split in ("train", "validation"):
            writer.append(split, ids, index=0, url="http://a.test/", digest="0" * 64)
        writer.finish(made_from="a test", settings={})
    assert evaluate(EvaluateCommandConfig(run=str(run), data=str(other))) == 0
    result = json.loads((run / "evaluation.json").read_text())["results"][0]
    assert result["bits_per_byte"] is None
    assert result["perplexity"] > 1


def test_a_hugging_face_folder_needs_data_or_texts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    save_file(to_hf_state(lively().state_dict(), TINY), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="data='': a Hugging Face folder has no data of its own"):
        evaluate(EvaluateCommandConfig(run=str(tmp_path)))
    assert evaluate(EvaluateCommandConfig(run=str(tmp_path), data=str(data), sequences=2)) == 0
    assert f"{loss_by_loop(lively(), stream(data), 2):.4f}" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    wrong = EvaluateCommandConfig(sequences=-1, stride=0, batch=0, texts=[str(tmp_path / "none.txt")])
    with pytest.raises(ConfigError) as caught:
        evaluate(wrong)
    names = [fault.split("=")[0] for fault in caught.value.faults]
    assert names == ["run", "sequences", "stride", "batch", "texts"]


def test_an_empty_text_is_named(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ConfigError, match=r"texts=empty\.txt: is empty"):
        evaluate(EvaluateCommandConfig(run=str(run), texts=[str(empty)]))
