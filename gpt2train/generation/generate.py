"""`gpt2train generate`: samples from a run, or the hidden states of texts.

Flows in: a run, a checkpoint or a Hugging Face folder, and prompts. Flows out: text on standard output as it comes,
always valid UTF-8, or JSON lines in a file; everything else on standard error. Several samples are made at once and
printed one after another: the first that is not finished is the one that streams.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.errors import ConfigError, write_error
from gpt2train.generation.config import GenerateConfig, SamplingConfig, WatermarkConfig, check_generate
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.embedding import hidden_states
from gpt2train.generation.products import lay_for_decoding
from gpt2train.generation.sampling import Sampling
from gpt2train.generation.text import TextStream
from gpt2train.generation.watermark import Watermark, read_key
from gpt2train.model import GPT
from gpt2train.release.hf import choose_device, load_model


@dataclass(frozen=True)
class _Wanted:
    """One sample to make."""

    prompt: str
    ids: list[int]
    seed: int


def generate(config: GenerateConfig) -> int:
    """Writes the samples; the i-th has the seed `seed` + i."""
    faults = check_generate(config)
    if faults:
        raise ConfigError(faults)
    sampling = sampling_of(config, config.watermark)
    model = lay_for_decoding(load_model(config.run, choose_device(config.device)))
    refuse_fewer_tokens(model, config.run)
    tokenizer = load_tokenizer()
    if config.embed:
        return _embed(config, model, tokenizer)
    wanted = list(_wanted(config, model.config.context, tokenizer))
    if config.out:
        _write_lines(Path(config.out), _samples(wanted, config, model, sampling, tokenizer))
        return 0
    out = sys.stdout.buffer
    for first in range(0, len(wanted), config.batch):
        _print_batch(out, wanted, first, config, model, sampling, tokenizer)
    return 0


def sampling_of(config: SamplingConfig, watermark: WatermarkConfig) -> Sampling:
    """The settings as `sampling` takes them; reads the key. Raises ConfigError where it cannot be used."""
    key = read_key(watermark.key_file) if watermark.key_file else b""
    return Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        watermark=Watermark(key, watermark.green_fraction, watermark.bias) if key else None,
    )


def refuse_fewer_tokens(model: GPT, run: str) -> None:
    """Raises ConfigError for a model that does not know all of GPT-2's tokens."""
    if model.config.vocabulary < VOCABULARY:
        raise ConfigError(
            [f"run={run}: its {model.config.vocabulary} tokens are fewer than GPT-2's {VOCABULARY}; train anew"]
        )


def _wanted(config: GenerateConfig, context: int, tokenizer: Tokenizer) -> Iterator[_Wanted]:
    prompts = _read_prompts(Path(config.prompts)) if config.prompts else [_from_standard_input(config.prompt)]
    seed = config.seed
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer.encode(prompt).tolist() or [END_OF_TEXT]
        if len(ids) > context:
            which = f"prompt {number}" if config.prompts else "the prompt"
            _say(f"{which} has {len(ids)} tokens; the last {context} (model.context) are used")
        for _ in range(config.samples):
            yield _Wanted(prompt, ids, seed)
            seed += 1


def _from_standard_input(text: str) -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace") if text == "-" else text


def _read_prompts(path: Path) -> list[str]:
    """Raises ConfigError for a file without prompts, or a line that is none."""
    lines = path.read_bytes().decode("utf-8-sig", "replace").split("\n")
    if path.suffix != ".jsonl":
        prompts = [line.rstrip("\r") for line in lines if line.strip()]
    else:
        prompts, faults = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError):
                faults.append(f'prompts={path}: line {number}: expected {{"prompt": …}}')
                continue
            if not isinstance(prompts[-1], str):
                faults.append(f"prompts={path}: line {number}: `prompt` must be a text")
        if faults:
            raise ConfigError(faults)
    if not prompts:
        raise ConfigError([f"prompts={path}: holds no prompt; give one in each line"])
    return prompts


def _print_batch(
    out: BinaryIO, wanted: Sequence[_Wanted], first: int, config: GenerateConfig, model: GPT, sampling: Sampling,
    tokenizer: Tokenizer,
) -> None:  # fmt: skip
    """Samples `first` … `first + batch - 1`, in their order, the one at the head as it comes."""
    batch = wanted[first : first + config.batch]
    rows = Decoding(
        model, [w.ids for w in batch], sampling, seeds=[w.seed for w in batch], max_new_tokens=config.max_new_tokens
    )
    streams = [TextStream(tokenizer, _stops(config)) for _ in batch]
    held = ["" for _ in batch]
    head = -1

    def next_head() -> None:
        nonlocal head
        head += 1
        if head < len(batch) and len(wanted) > 1:
            _say(f"sample {first + head + 1} of {len(wanted)}, seed {batch[head].seed}")
        if head < len(batch) and config.echo:
            _write(out, batch[head].prompt)

    def show() -> None:
        """All that is there of the sample at the head, and of those behind it once it has ended."""
        while head < len(batch):
            _write(out, held[head])
            held[head] = ""
            if head not in rows.reasons:
                return
            _write(out, streams[head].end() + "\n")
            next_head()

    next_head()
    for row, token in rows:
        held[row] += streams[row].add(token)
        if streams[row].stopped:
            rows.finish(row)
        if row == head:
            show()
    show()


def _samples(
    wanted: Sequence[_Wanted], config: GenerateConfig, model: GPT, sampling: Sampling, tokenizer: Tokenizer
) -> Iterator[dict[str, object]]:
    for first in range(0, len(wanted), config.batch):
        batch = wanted[first : first + config.batch]
        rows = Decoding(
            model, [w.ids for w in batch], sampling, seeds=[w.seed for w in batch], max_new_tokens=config.max_new_tokens
        )
        streams = [TextStream(tokenizer, _stops(config)) for _ in batch]
        texts = ["" for _ in batch]
        for row, token in rows:
            texts[row] += streams[row].add(token)
            if streams[row].stopped:
                rows.finish(row)
        for row, (sample, stream, text) in enumerate(zip(batch, streams, texts, strict=True)):
            yield {
                "prompt": sample.prompt,
                "text": text + stream.end(),
                "seed": sample.seed,
                "new_tokens": rows.new_tokens(row),
                "ended_by": rows.reasons[row],
            }
        _say(f"{min(first + config.batch, len(wanted))} of {len(wanted)} samples")


def _stops(config: GenerateConfig) -> list[str]:
    return [text.replace("\\n", "\n") for text in config.stop]


def _write_lines(path: Path, samples: Iterator[dict[str, object]]) -> None:
    """Line by line, so that what was made is there whatever happens next."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise write_error(f"out={path}", error) from error


def _embed(config: GenerateConfig, model: GPT, tokenizer: Tokenizer) -> int:
    """text_00000.npy … and texts.jsonl, which says what each is, into the new folder `embed_to`."""
    texts = _from_standard_input("-").splitlines() if config.embed == ["-"] else config.embed
    folder, context = Path(config.embed_to), model.config.context
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"embed_to={folder}: exists and is not empty; give a new folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "texts.jsonl", "w", encoding="utf-8") as index:
            for number, text in enumerate(texts):
                ids = tokenizer.encode(text).tolist() or [END_OF_TEXT]
                if len(ids) > context:
                    _say(f"text {number + 1} has {len(ids)} tokens; the first {context} (model.context) are used")
                name = f"text_{number:05d}.npy"
                np.save(folder / name, hidden_states(model, ids[:context]).numpy())
                line = {"file": name, "text": text, "tokens": ids[:context]}
                index.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise write_error(f"embed_to={folder}", error) from error
    _say(f"{len(texts)} texts → {folder}, fp32 [{model.config.layers + 1}, tokens, {model.config.channels}] each")
    return 0


def _write(out: BinaryIO, text: str) -> None:
    if text:
        out.write(text.encode("utf-8", "replace"))
        out.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
