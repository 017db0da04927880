"""Generation: transformers' greedy text, whole characters, the same tokens from the same seed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)
from torch.nn import functional as F

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.config import Activation, ModelConfig, Norm, Positions
from gpt2train.errors import ConfigError
from gpt2train.generation.config import GenerateConfig
from gpt2train.generation.decoding import Decoding, sample
from gpt2train.generation.drafting import Drafts
from gpt2train.generation.embedding import hidden_states
from gpt2train.generation.generate import generate
from gpt2train.generation.products import OneRowLinear, lay_for_decoding, numpy_has_openblas, one_row_linear
from gpt2train.generation.sampling import GREEDY as GREEDILY
from gpt2train.generation.sampling import Sampling
from gpt2train.generation.text import TextStream, utf8_stream
from gpt2train.model import GPT, KeyValueCache
from gpt2train.release.export import _write_json
from gpt2train.release.hf import hf_config, to_hf_state

transformers = pytest.importorskip("transformers", reason="transformers is the reference")

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
MIXED = "naïve 日本語 🤷🏽‍♀️ Ελληνικά — العربية"


def always(config: ModelConfig, token: int) -> GPT:
    """A model whose likeliest next token is always `token`."""
    model = GPT(config).eval()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[token] * 100)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lively model in Hugging Face format."""
    path = tmp_path_factory.mktemp("model")
    _write_json(path / "config.json", hf_config(TINY))
    save_file(to_hf_state(lively(TINY).state_dict(), TINY), path / "model.safetensors")
    return path


# -- decoding


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # transformers announces its own changes
def test_greedy_equals_transformers_over_200_tokens(tmp_path: Path) -> None:
    config = replace(TINY, context=256, vocabulary=2000)
    model = lively(config)
    _write_json(tmp_path / "config.json", hf_config(config))
    save_file(to_hf_state(model.state_dict(), config), tmp_path / "model.safetensors")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    prompt = [818, 257, 1934, 389]
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200, pad_token_id=0
    )[0, len(prompt) :].tolist()
    got = list(sample(model, prompt, max_new_tokens=200, **GREEDY))
    assert len(set(got)) > 20, "a text that settles on one token would show nothing"
    assert got == expected


@pytest.mark.parametrize("length", [1, 10, 63, 64, 65, 200])
def test_the_window_slides_by_half_a_context(length: int) -> None:
    """Against a loop without a cache that reads its whole window again for every token."""
    model = lively(replace(TINY, vocabulary=500))
    prompt = torch.randint(500, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    window, expected = prompt[-64:], []
    with torch.no_grad():
        for _ in range(150):
            expected.append(int(model(torch.tensor([window]))[0, -1].argmax()))
            window.append(expected[-1])
            if len(window) > 64:
                window = window[-32:]
    assert len(set(expected)) > 10
    assert list(sample(model, prompt, max_new_tokens=150, **GREEDY)) == expected


@pytest.mark.parametrize(
    ("sampling", "at_once"),
    [
        (GREEDILY, None),
        (Sampling(temperature=1.3, top_k=50, repetition_penalty=1.2), None),
        (GREEDILY, True),
        (Sampling(temperature=1.3, top_k=50, top_p=0.9), True),
        (Sampling(temperature=1.3, top_k=50, repetition_penalty=1.2), True),
    ],
)
def test_a_row_has_the_text_it_would_have_alone(sampling: Sampling, at_once: bool | None) -> None:
    """Prompts from one token to more than a context, rows that end early, and the window sliding twice."""
    model = lively(replace(TINY, vocabulary=500))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(500, (n,), generator=generator).tolist() for n in (1, 5, 5, 63, 64, 65, 130)]
    alone = []
    for seed, prompt in enumerate(prompts):
        rows = Decoding(model, [prompt], sampling, seeds=[seed], max_new_tokens=90)
        alone.append([token for _, token in rows])
    rows = Decoding(model, prompts, sampling, seeds=range(7), max_new_tokens=90, at_once=at_once)
    together: list[list[int]] = [[] for _ in prompts]
    for row, token in rows:
        together[row].append(token)
        if row == 2 and len(together[2]) == 7:
            rows.finish(2)
    alone[2] = alone[2][:7]
    assert together == alone
    assert rows.reasons == {0: "length", 1: "length", 2: "stop", 3: "length", 4: "length", 5: "length", 6: "length"}
    assert len(set(together[6])) > 10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0])
def test_guesses_change_no_text_and_save_passes(temperature: float, seed: int) -> None:
    """A model that repeats itself, with the window sliding, and ends of every kind within a guess."""
    model = GPT(replace(TINY, vocabulary=60, context=32), seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    sampling = Sampling(temperature=temperature, repetition_penalty=1.02)
    for prompt, most in (([5, 6, 7] * 4, 120), ([9], 50), ([5, 6] * 30, 33)):
        passes, texts = 0, []
        for draft_tokens in (0, 8, 3):
            rows = Decoding(model, [prompt], sampling, seeds=[seed], max_new_tokens=most, draft_tokens=draft_tokens)
            texts.append([token for _, token in rows])
            if not draft_tokens:
                assert passes == len(texts[0]) == most
                passes = 0
        assert texts[0] == texts[1] == texts[2]
        if temperature == 0:
            assert passes < 1.7 * most  # for both
    rows = Decoding(model, [[5, 6, 7] * 4], sampling, seeds=[seed], max_new_tokens=120)
    for n, (row, _) in enumerate(rows, 1):
        if n == 17:
            rows.finish(row)
    assert n == 17
    assert rows.new_tokens(0) == 17


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_a_guess_is_what_followed_the_last_time(tokens: list[int], room: int) -> None:
    drafts = Drafts(tokens, 6)
    ending = tokens[-3:]
    earlier = [i for i in range(3, len(tokens)) if tokens[i - 3 : i] == ending] if len(tokens) > 2 else []
    expected = tokens[earlier[-1] :][: min(6, room)] if earlier else []
    assert drafts.guess(room) == expected


def test_wrong_guesses_are_followed_by_pauses_that_grow() -> None:
    drafts, pauses = Drafts([1, 2, 3] * 3, 6), []
    for _ in range(5):
        assert drafts.guess(6)
        drafts.learn(6, 2)
        pauses.append(0)
        while not drafts.guess(6):
            pauses[-1] += 1
            drafts.add(1 + pauses[-1] % 3)
            for token in (1, 2, 3) if not drafts.guess(1) and pauses[-1] > 100 else ():
                drafts.add(token)
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1] <= 66
    drafts.learn(6, 6)
    assert drafts.guess(6)
    drafts.learn(6, 0)
    assert not drafts.guess(6)


MODERN = replace(
    TINY, positions=Positions.rotary, qk_norm=True, activation=Activation.relu2, norm=Norm.rms, biases=False,
    tied_head=False, embedding_norm=True, logit_softcap=15.0,
)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("config", [TINY, MODERN], ids=["2019", "modern"])
def test_a_model_laid_for_decoding_is_the_same_model(config: ModelConfig, threads: int) -> None:
    """One position, several, several rows: logits, weights and greedy text, with numpy's products and with torch's."""
    plain, laid = lively(config), lively(config)
    torch.set_num_threads(threads)
    lay_for_decoding(laid)
    torch.set_num_threads(1)
    assert isinstance(laid.h[0].mlp.c_fc, OneRowLinear) == (threads == 1 and numpy_has_openblas())
    assert laid.h[0].mlp.c_fc.weight.stride() == (1, 128)
    state = laid.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    with torch.no_grad():
        for rows, lengths in ((1, (1, 1, 5, 1)), (3, (7, 1, 2))):
            caches = [KeyValueCache(config, batch=rows) for _ in range(2)]
            for length in lengths:
                tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
                expected, got = (m(tokens, cache=c) for m, c in zip((plain, laid), caches, strict=True))
                assert (got - expected).abs().max() < 2e-6 * expected.abs().max()
    expected_text = list(sample(plain, [5, 6, 7], max_new_tokens=70, **GREEDY))
    assert list(sample(laid, [5, 6, 7], max_new_tokens=70, **GREEDY)) == expected_text


def test_one_row_is_multiplied_as_torch_does_it() -> None:
    """Also a view, a matrix in either order, and with and without a bias; more rows than one go to torch."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(s, generator=generator).requires_grad_() for s in ((48, 32), (48,)))
    many = torch.randn(2, 3, 64, generator=generator)[..., ::2]
    for x in (many, many[:1, :1], many[0, 0], many[:, :1]):
        for matrix in (weight, weight.t().contiguous().t()):
            for added in (bias, None):
                with torch.inference_mode():
                    got = one_row_linear(x, matrix, added)
                expected = F.linear(x.double(), matrix.double(), None if added is None else added.double())
                assert got.shape == expected.shape
                assert not got.requires_grad
                assert (got - expected).abs().max() < 1e-5


def test_of_a_prompt_one_position_has_logits() -> None:
    """The product with the vocabulary, made of every position, would cost more than the rest of a small model."""
    model, positions = lively(TINY), []
    product = model.product
    model.product = lambda x, weight: positions.append(x.shape[:-1].numel()) or product(x, weight)
    for _ in Decoding(model, [[1, 2, 3, 4], [1, 2, 3]], GREEDILY, seeds=[0, 0], max_new_tokens=3):
        pass
    assert positions == [2, 2, 2, 1]  # the longer prompt is a token ahead, and ends first


def test_a_row_that_meets_the_end_leaves_the_others_alone() -> None:
    """The end of text is the likeliest after one prompt only."""
    model = lively(TINY)
    prompts = [[4, 5], [6, 7], [8, 9]]
    expected = [list(sample(model, prompt, max_new_tokens=9, **GREEDY)) for prompt in prompts]
    ends = expected[1][3]
    with torch.no_grad():  # the two tokens change places, so that the second row says the end of text there
        rows = model.wte.weight[[ends, END_OF_TEXT]].clone()
        model.wte.weight[[END_OF_TEXT, ends]] = rows
    expected = [list(sample(model, prompt, max_new_tokens=9, **GREEDY)) for prompt in prompts]
    assert [len(e) for e in expected][1] < 9
    got: list[list[int]] = [[], [], []]
    decoding = Decoding(model, prompts, GREEDILY, seeds=[0, 0, 0], max_new_tokens=9)
    for row, token in decoding:
        got[row].append(token)
    assert got == expected
    assert decoding.reasons[1] == "stop"


def test_hidden_states_are_those_of_transformers(folder: Path) -> None:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = [818, 257, 1934, 389, 50256, 7]
    with torch.no_grad():
        expected = torch.cat(theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states)
    got = hidden_states(lively(TINY), ids)
    assert got.shape == (3, 6, 32)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not lively(TINY).h[0]._forward_hooks


def test_a_context_of_one_token_still_samples() -> None:
    model = lively(replace(TINY, context=1))
    assert len(list(sample(model, [5, 6], max_new_tokens=5, **GREEDY))) == 5


def test_the_seed_alone_decides() -> None:
    model = lively(TINY)
    options = {"max_new_tokens": 40, "temperature": 1.5, "top_k": 0, "top_p": 0.95}
    first = list(sample(model, [1, 2, 3], seed=7, **options))
    torch.manual_seed(99)
    torch.rand(5)
    assert list(sample(model, [1, 2, 3], seed=7, **options)) == first
    assert list(sample(model, [1, 2, 3], seed=8, **options)) != first


def test_stops_before_the_end_of_text() -> None:
    assert list(sample(always(TINY, END_OF_TEXT), [1], max_new_tokens=9, **GREEDY)) == []
    assert list(sample(always(TINY, 17), [1], max_new_tokens=9, **GREEDY)) == [17] * 9


def test_ids_that_are_no_token_are_never_sampled() -> None:
    """A vocabulary of 50,304 whose surplus rows would be the likeliest by far."""
    model = always(replace(TINY, vocabulary=50_304), 50_300)
    assert int(model(torch.tensor([[1]]))[0, -1].argmax()) >= VOCABULARY
    for temperature in (0.0, 3.0):
        got = list(sample(model, [1], max_new_tokens=20, temperature=temperature, top_k=0, top_p=1.0, seed=0))
        assert got
        assert max(got) < VOCABULARY


# -- text


def test_a_stream_never_tears_a_character() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(MIXED).tolist()
    torn = [i for i in ids if "\ufffd" in tokenizer.decode([i])]
    assert len(torn) > 5, "the text has characters of several tokens"
    pieces = list(utf8_stream(ids, tokenizer))
    assert "".join(pieces) == MIXED
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, VOCABULARY - 1)), max_size=30))
def test_a_stream_of_any_tokens_is_their_text(ids: list[int]) -> None:
    tokenizer = load_tokenizer()
    assert "".join(utf8_stream(ids, tokenizer)) == tokenizer.decode(ids)


def test_a_character_comes_out_once_it_is_whole() -> None:
    """Each piece is there before the next token is asked for: streaming, not collecting."""
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("a語b").tolist()
    asked: list[int] = []

    def tokens() -> Iterator[int]:
        for token in ids:
            asked.append(token)
            yield token

    stream = utf8_stream(tokens(), tokenizer)
    assert next(stream) == "a"
    assert asked == ids[:1]
    assert next(stream) == "語"
    assert asked == ids[:-1]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab\né", max_size=30), st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_wherever_it_lies(text: str, stop: list[str]) -> None:
    """Token by token, a byte each, against a plain search in the whole text."""
    tokenizer = load_tokenizer()
    stream, pieces = TextStream(tokenizer, stop), []
    for byte in text.encode():
        token = next(i for i in range(256) if tokenizer.decode_bytes([i]) == bytes([byte]))
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    # The first to be complete ends the text; of those complete at one character, the one that began first.
    complete = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(complete)[1]] if complete else text
    assert "".join(pieces) == expected
    assert stream.stopped == bool(complete)


def test_nothing_is_held_back_that_no_stop_string_can_take() -> None:
    tokenizer = load_tokenizer()
    stream = TextStream(tokenizer, ["END"])
    given = [stream.add(int(t)) for t in tokenizer.encode("xE yEN zEN")]
    assert "".join(given) == "xE yEN z"
    assert stream.end() == "EN"


# -- the command


def run_generate(capsysbinary: pytest.CaptureFixture[bytes], **options: object) -> tuple[bytes, bytes]:
    assert generate(GenerateConfig(**options)) == 0
    captured = capsysbinary.readouterr()
    return captured.out, captured.err


def test_samples_differ_and_repeat(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    options = {"run": str(folder), "prompt": "One", "max_new_tokens": 12, "seed": 3}
    out, err = run_generate(capsysbinary, samples=2, **options)
    assert err.decode().split("\n")[:2] == ["sample 1 of 2, seed 3", "sample 2 of 2, seed 4"]
    first, _ = run_generate(capsysbinary, **options)
    second, _ = run_generate(capsysbinary, **(options | {"seed": 4}))
    assert out == first + second
    assert first != second


def test_without_echo_only_the_continuation_is_printed(
    folder: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    options = {"run": str(folder), "prompt": MIXED, "max_new_tokens": 8, "temperature": 0.0}
    with_prompt, _ = run_generate(capsysbinary, **options)
    without, _ = run_generate(capsysbinary, echo=False, **options)
    assert with_prompt == MIXED.encode() + without
    assert without.strip()


def test_an_empty_prompt_starts_a_text(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    out, _ = run_generate(capsysbinary, run=str(folder), max_new_tokens=10, temperature=0.0)
    expected = list(sample(lively(TINY), [END_OF_TEXT], max_new_tokens=10, **GREEDY))
    assert out.decode() == load_tokenizer().decode(expected) + "\n"


def test_a_prompt_beyond_the_context_is_cut_and_told(
    folder: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " word" * 100
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    out, err = run_generate(capsysbinary, run=str(folder), prompt="-", max_new_tokens=3, temperature=0.0)
    assert b"the prompt has 100 tokens; the last 64 (model.context) are used" in err
    prompt = load_tokenizer().encode(text).tolist()[-64:]
    expected = list(sample(lively(TINY), prompt, max_new_tokens=3, **GREEDY))
    assert out.decode() == text + load_tokenizer().decode(expected) + "\n"


def test_prompts_of_a_file_in_batches(folder: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    prompts = ["One", "Two and a longer one", MIXED]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\n")
    (tmp_path / "p.txt").write_text("\r\n".join(prompts) + "\r\n\r\n")
    options = {"run": str(folder), "max_new_tokens": 8, "seed": 5, "top_k": 5, "stop": ["e"]}
    one_by_one = b"".join(
        run_generate(capsysbinary, prompt=p, **(options | {"seed": 5 + 2 * i + j}))[0]
        for i, p in enumerate(prompts)
        for j in range(2)
    )
    for name in ("p.jsonl", "p.txt"):
        for batch in (1, 2, 6):
            out, err = run_generate(capsysbinary, prompts=str(tmp_path / name), samples=2, batch=batch, **options)
            assert out == one_by_one
            assert [line.split(", ")[1] for line in err.decode().strip().split("\n")] == [
                f"seed {s}" for s in range(5, 11)
            ]
    out, _ = run_generate(
        capsysbinary, prompts=str(tmp_path / "p.txt"), samples=2, out=str(tmp_path / "o.jsonl"), batch=4, **options
    )
    assert out == b""
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().split("\n")[:-1]]
    assert "".join(line["prompt"] + line["text"] + "\n" for line in lines).encode() == one_by_one
    assert {line["ended_by"] for line in lines} <= {"stop", "length"}
    assert all(line["new_tokens"] == 8 for line in lines if line["ended_by"] == "length")


def test_embeddings_lie_in_a_folder(folder: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    to = tmp_path / "e"
    out, err = run_generate(capsysbinary, run=str(folder), embed=["a text", " word" * 99], embed_to=str(to))
    assert out == b""
    assert b"text 2 has 99 tokens; the first 64" in err
    index = [json.loads(line) for line in (to / "texts.jsonl").read_text().split("\n")[:-1]]
    assert [line["text"] for line in index] == ["a text", " word" * 99]
    for line in index:
        got = np.load(to / line["file"])
        assert got.dtype == np.float32
        assert np.allclose(got, hidden_states(lively(TINY), line["tokens"]).numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"embed_to=.*: exists and is not empty; give a new folder"):
        generate(GenerateConfig(run=str(folder), embed=["x"], embed_to=str(to)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no prompt"),
        ('{"prompt": 5}\n', "line 1: `prompt` must be a text"),
        ('\n{"text": "x"}\nnonsense\n', "line 2: expected .*\n.*line 3: expected"),
    ],
)
def test_a_file_without_prompts_is_refused(folder: Path, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=says):
        generate(GenerateConfig(run=str(folder), prompts=str(tmp_path / "p.jsonl")))


def test_all_faults_are_reported_together() -> None:
    wrong = GenerateConfig(
        max_new_tokens=0, temperature=-1, top_k=-1, top_p=0, samples=0, seed=-1, repetition_penalty=0, stop=[""],
        batch=0, prompt="x", prompts="nowhere", embed=["x"],
    )  # fmt: skip
    wrong.watermark.green_fraction, wrong.watermark.bias = 1.0, 0.0
    with pytest.raises(ConfigError) as caught:
        generate(wrong)
    names = [fault.split("=")[0] for fault in caught.value.faults]
    assert names == [
        "run", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed",
        "watermark.green_fraction", "watermark.bias", "samples", "batch", "prompts", "prompts", "embed", "embed_to",
    ]  # fmt: skip


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    config = replace(TINY, vocabulary=300)
    _write_json(tmp_path / "config.json", hf_config(config))
    save_file(to_hf_state(GPT(config).state_dict(), config), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="its 300 tokens are fewer than GPT-2's 50257"):
        generate(GenerateConfig(run=str(tmp_path)))


def test_a_model_is_loaded_without_torch_s_compiler(folder: Path) -> None:
    """It takes as long to import as torch itself."""
    code = "import sys; from gpt2train.release.hf import load_model; load_model(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, timeout=120, check=True, text=True)
    imported = set(done.stdout.split())
    assert "torch.nn" in imported
    assert not imported & {"torch._dynamo", "sympy"}


def test_a_process_writes_utf_8_whatever_the_locale(folder: Path) -> None:
    command = [sys.executable, "-m", "gpt2train", "generate", f"run={folder}", "max_new_tokens=60", "temperature=0"]
    done = subprocess.run(
        [*command, "prompt=-"],
        input=MIXED.encode(),
        capture_output=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    text = done.stdout.decode("utf-8")
    assert text.startswith(MIXED)
    assert len(text) > len(MIXED) + 60
    assert done.stderr == b""
