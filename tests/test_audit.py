"""The audit: a model that was trained on planted sentences says by heart those that came often; counts are exact."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import binomtest
from test_export import make_run
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.clean import personal
from data_pipeline.token_shards import TokenShards, TokenSplit
from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.checkpoint import read_state
from gpt2train.config import ModelConfig
from gpt2train.errors import ConfigError
from gpt2train.model import GPT
from gpt2train.release import repeats
from gpt2train.release.audit import audit, masked, wilson
from gpt2train.release.card import model_card
from gpt2train.release.config import AuditConfig
from gpt2train.release.export import _write_json
from gpt2train.release.hf import hf_config, to_hf_state

WORDS = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body""".split()
PLANTED = {
    1: "the silver heron counted eleven paper lanterns beneath the railway bridge before dawn",
    10: "a quiet engineer from the harbor sold nine wooden clocks to a retired violin teacher",
    100: "every autumn the old baker painted seven green doors along the crooked orchard wall",
}
ADDRESS = "j.winterbottom@orchard-press.org"
FREE = ModelConfig("free", layers=2, channels=64, heads=2, context=96)


def documents() -> list[tuple[str, str]]:
    """(URL, text): sentences of random words, and among them the planted ones and an address."""
    generator = np.random.default_rng(0)
    lines = [sentence for copies, sentence in PLANTED.items() for _ in range(copies)]
    lines += [f"for orders of any size please write to the printer at {ADDRESS} and wait"] * 60
    lines += [f"call {n} or write to {name}@{host}.example" for n, name, host in
              zip(generator.integers(1000, size=20), WORDS[:20], WORDS[20:40], strict=True)]  # fmt: skip
    lines += [" ".join(generator.choice(WORDS, 12)) for _ in range(900)]
    lines = [lines[i] for i in generator.permutation(len(lines))]
    return [(f"https://site{i}.test/", ". ".join(lines[i : i + 8]) + ".") for i in range(0, len(lines), 8)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("tokens"), load_tokenizer()
    with TokenShardWriter(folder, shard_tokens=5000, tokenizer_sha256=tokenizer.sha256) as writer:
        for i, (url, text) in enumerate(documents()):
            ids = np.append(tokenizer.encode(text), END_OF_TEXT).astype(np.uint16)
            writer.append("train", ids, index=i, url=url, digest="0" * 64)
        writer.append("validation", np.array([5, END_OF_TEXT], np.uint16), index=9999, url="v", digest="0" * 64)
        writer.finish(made_from="a test", settings={})
    return folder


def split_of(folder: Path) -> TokenSplit:
    return TokenShards.open(folder).split("train")


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the planted text over its own few tokens, then given GPT-2's whole vocabulary."""
    torch.set_num_threads(1)
    split = split_of(data)
    stream = split.read(0, split.tokens).astype(np.int64)
    used, small = np.unique(stream, return_inverse=True)
    network = GPT(replace(FREE, vocabulary=len(used)), seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.0)
    generator, tokens = np.random.default_rng(1), torch.from_numpy(small.astype(np.int64))
    steps = 400
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, 1.05 - step / steps)
        starts = generator.integers(0, len(tokens) - 97, size=8)
        window = torch.stack([tokens[s : s + 97] for s in starts])
        loss = network(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = GPT(FREE)
    weights = network.state_dict()
    embedding = torch.zeros_like(whole.wte.weight)
    embedding[torch.from_numpy(used)] = weights["wte.weight"][: len(used)]
    whole.load_state_dict({**weights, "wte.weight": embedding})
    folder = tmp_path_factory.mktemp("model")
    _write_json(folder / "config.json", hf_config(FREE))
    save_file(to_hf_state(whole.state_dict(), FREE), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def result(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("audit")
    lines = [*PLANTED.values(), "a sentence that was never in it at all"]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n\n")
    config = AuditConfig(
        run=str(model), data=str(data), windows=150, prompt_tokens=6, continuation_tokens=5, batch=64,
        sentences=str(folder / "sentences.txt"), documents=400, out=str(folder / "a.json"),
    )  # fmt: skip
    assert audit(config) == 0
    found = json.loads((folder / "a.json").read_text())
    assert isinstance(found, dict)
    return found


def test_planted_sentences_are_found_with_their_copies(result: dict[str, Any]) -> None:
    by_copies = {entry["copies"]: entry for entry in result["sentences"]}
    assert [entry["copies"] for entry in result["sentences"]] == [1, 10, 100, 0]
    assert by_copies[100]["by_heart"]
    assert by_copies[10]["by_heart"]
    assert not by_copies[0]["by_heart"]
    assert by_copies[1]["matching_tokens"] < by_copies[1]["target_tokens"]


def test_what_comes_often_is_said_by_heart_more_often(result: dict[str, Any]) -> None:
    shares = {part["copies"][0]: part for part in result["by_copies"]}
    assert shares[64]["copies"] == [64, 127]
    assert shares[64]["share"] > 0.9
    assert shares[1]["share"] < 0.3
    assert sum(part["tried"] for part in result["by_copies"]) > result["windows"]["tried"] == 150
    example = result["examples"][0]
    assert example["copies"] >= 60
    text = dict(documents())[example["urls"][0]]
    assert example["prompt"] + example["continuation"] in text


def test_personal_data_that_the_model_completes_is_told_masked(result: dict[str, Any]) -> None:
    emails = result["personal"]["emails"]
    assert emails["said"] > 20
    assert {e["value"] for e in emails["examples"]} == {"j.w***********@o******-p****.o**"}
    texts = dict(documents())
    assert all(ADDRESS in texts[e["url"]] for e in emails["examples"])
    assert emails["tried"] > emails["said"]  # those that stand there once
    assert ADDRESS not in json.dumps(result["personal"])


def test_the_same_audit_again_is_the_same(result: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
    config = AuditConfig(
        run=str(model), data=str(data), windows=150, prompt_tokens=6, continuation_tokens=5, batch=7,
        documents=400, out=str(tmp_path / "b.json"),
    )  # fmt: skip
    assert audit(config) == 0
    again = json.loads((tmp_path / "b.json").read_text())
    for name in ("windows", "by_copies", "examples", "personal"):
        assert again[name] == result[name]


def test_shards_that_are_not_those_of_the_training_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")  # its versions.json names other token shards
    for trained_on in ("f" * 64, TokenShards.open(data).fingerprint):
        (run / "versions.json").write_text(json.dumps({"data": {"path": str(data), "fingerprint": trained_on}}))
        config = AuditConfig(run=str(run), windows=4, prompt_tokens=6, continuation_tokens=5, documents=4)
        assert audit(config) == 0
        found = json.loads((run / "audit.json").read_text())["data"]
        fingerprint = TokenShards.open(data).fingerprint
        assert (found["fingerprint"], found["trained_on"]) == (fingerprint, trained_on)
        told = [line for line in capsys.readouterr().err.split("\n") if "not the token shards" in line]
        card = model_card(run / "checkpoints" / "step_00000020", read_state(run / "checkpoints" / "step_00000020"))
        assert ("not all that was trained on" in card) == bool(told) == (trained_on != fingerprint)
        assert all(f"fingerprint {fingerprint}, trained on {trained_on}" in line for line in told)


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12))
def test_equal_stretches_and_no_others_have_equal_hashes(ids: list[int], length: int) -> None:
    hashes = repeats.window_hashes(np.array(ids, np.uint16), length)
    stretches = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    assert len(hashes) == len(stretches)
    assert len({*zip(hashes.tolist(), stretches, strict=True)}) == len(set(stretches)) == len(set(hashes.tolist()))


@pytest.mark.parametrize("block", [100, 977, 4_000_000])
def test_counts_are_those_of_a_plain_count(data: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(repeats, "BLOCK_TOKENS", block)
    split = split_of(data)
    stream = split.read(0, split.tokens).tolist()
    length = 9
    plain = Counter(tuple(stream[i : i + length]) for i in range(len(stream) - length + 1))
    positions = list(range(0, len(stream) - length, 37))
    expected = [plain[tuple(stream[p : p + length])] for p in positions]
    assert repeats.count_windows(split, positions, length) == expected
    found = repeats.repeated_windows(split, length, most=10**6, seed=0)
    assert {tuple(stream[p : p + length]) for p in found} == {
        s for s, n in plain.items() if n > 1 and END_OF_TEXT not in s
    }
    texts = [stream[p : p + n] for p in range(5, 2000, 111) for n in (3, 17)] + [[1, 2, 3]]
    strings = [sum(stream[i : i + len(t)] == t for i in range(len(stream) - len(t) + 1)) for t in texts]
    assert repeats.count_texts(split, texts) == strings


def test_few_repeated_windows_are_spread_over_the_numbers_of_copies(data: Path) -> None:
    split = split_of(data)
    found = repeats.repeated_windows(split, 9, most=12, seed=3)
    powers = Counter(n.bit_length() for n in repeats.count_windows(split, found, 9))
    assert len(found) == 12
    assert len(powers) >= 3


# ── small parts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_found_is_what_is_masked() -> None:
    text = "mail a.b@c.org, or (202) 555-0123; not 1234567, not a@b; x@y.example and +44 20 7946 0958."
    found = [(kind, text[start:stop]) for kind, start, stop in personal.find(text)]
    assert found == [("emails", "a.b@c.org"), ("phones", "(202) 555-0123"), ("emails", "x@y.example"),
                     ("phones", "+44 20 7946 0958")]  # fmt: skip
    cleaned, counts = personal.mask(text)
    assert counts["masked_emails"] == counts["masked_phones"] == 2
    assert not any(value in cleaned for _, value in found)


def test_masks_keep_too_little_to_use() -> None:
    assert masked("jane.doe@acme.org") == "j***.d**@a***.o**"
    assert masked("+44 20 7946 0958") == "+4* 2* 7*** 0***"


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 500), (0, 0)])
def test_the_interval_is_wilsons(k: int, n: int) -> None:
    if n:
        expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    else:
        assert wilson(k, n) == (0.0, 1.0)


def test_wrong_settings_are_named_together(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        audit(AuditConfig(run=str(tmp_path / "no"), windows=0, batch=0, sentences="nowhere"))
    assert [fault.split("=")[0] for fault in caught.value.faults] == ["run", "windows", "batch", "sentences"]
    with pytest.raises(ConfigError, match="does not say what it was trained on; give data=corpus/tokens"):
        audit(AuditConfig(run=str(model)))
    (tmp_path / "s").write_text("too short\n")
    with pytest.raises(ConfigError, match="'too short': must have four words or more"):
        audit(AuditConfig(run=str(model), data=str(tmp_path / "x"), sentences=str(tmp_path / "s")))


def test_a_text_without_repeats_has_none(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path, shard_tokens=500, tokenizer_sha256=load_tokenizer().sha256) as writer:
        writer.append("train", np.array([*range(50), END_OF_TEXT], np.uint16), index=0, url="u", digest="0" * 64)
        writer.finish(made_from="a test", settings={})
    split = split_of(tmp_path)
    assert repeats.repeated_windows(split, 10, most=5, seed=0) == []
    assert repeats.count_windows(split, [3], 10) == [1]
