"""`gpt2train audit`: what of its training text a model says by heart.

Flows in: a run and the token shards it was trained on. Flows out: audit.json and a table:

    windows    given `prompt_tokens` of a training window, does it go on greedily with the window's next
               `continuation_tokens`, each the same? By how often the text holds the window (Carlini et al. 2023,
               "Quantifying Memorization Across Neural Language Models", arXiv:2202.07646), with the URLs
    sentences  the same for sentences that are asked for, given their first half
    personal   e-mail addresses and telephone numbers of the training text that it completes, masked

Cost: a forward pass a token for each batch, and three readings of the train split.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.clean import personal
from data_pipeline.token_shards import TokenShards, TokenSplit
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.errors import ConfigError, write_error
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.generate import refuse_fewer_tokens
from gpt2train.generation.products import lay_for_decoding
from gpt2train.generation.sampling import GREEDY
from gpt2train.model import GPT
from gpt2train.release.config import AuditConfig, check_audit
from gpt2train.release.hf import choose_device, is_hf_folder, load_model
from gpt2train.release.repeats import count_texts, count_windows, repeated_windows
from gpt2train.run_folder import AUDIT, VERSIONS, data_folder, read_json, replace_file, run_dir_of

SHOWN = 20
"""Windows said by heart that are listed with their text and URLs."""
MIN_PERSONAL_PROMPT_TOKENS = 5
SPARE_TOKENS = 3
"""Tokens beyond a value's own that the model may take to say it, as it may write it in other pieces."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and what the training text goes on with."""

    prompt: list[int]
    target: list[int]


def audit(config: AuditConfig) -> int:
    """Writes the result and prints the table."""
    faults = check_audit(config)
    if faults:
        raise ConfigError(faults)
    sentences = _sentences(config.sentences)
    folder = config.data or _recorded_data(config.run)
    shards = TokenShards.open(folder, verify=False)
    split, trained_on = shards.split("train"), _trained_on(config.run)
    if trained_on not in (None, shards.fingerprint):
        print(
            f"data={folder}: not the token shards that run={config.run} was trained on (fingerprint "
            f"{shards.fingerprint}, trained on {trained_on}); text that was taken out since, as by corpus forget=, is "
            f"not tested: give data= the folder of then, or sentences= what was taken out",
            file=sys.stderr,
        )
    model = lay_for_decoding(load_model(config.run, choose_device(config.device)))
    refuse_fewer_tokens(model, config.run)
    tokenizer = load_tokenizer()
    result: dict[str, Any] = {
        "run": config.run,
        "checkpoint": None if is_hf_folder(config.run) else checkpoint.resolve(config.run).name,
        "data": {
            "folder": str(folder),
            "tokens": split.tokens,
            "fingerprint": shards.fingerprint,
            "trained_on": trained_on,
        },
        "prompt_tokens": config.prompt_tokens,
        "continuation_tokens": config.continuation_tokens,
        "seed": config.seed,
        **audit_windows(model, split, tokenizer, config),
        "sentences": audit_sentences(model, split, tokenizer, sentences, config.batch),
        "personal": audit_personal(model, split, tokenizer, config),
    }
    out = Path(config.out) if config.out else _default_out(config.run)
    try:
        replace_file(out, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise write_error(f"out={out}", error, "give another place") from error
    _print(result)
    print(f"{out}: the whole of it", file=sys.stderr)
    return 0


def audit_windows(model: GPT, split: TokenSplit, tokenizer: Tokenizer, config: AuditConfig) -> dict[str, Any]:
    """`windows` (drawn evenly: share with interval), `by_copies`, `examples`."""
    length = config.prompt_tokens + config.continuation_tokens
    even = _even_windows(split, length, config.windows, config.seed)
    repeated = repeated_windows(split, length, most=config.windows, seed=config.seed)
    if not even and not repeated:
        return {"windows": _share(0, 0), "by_copies": [], "examples": []}
    positions = even + repeated
    copies = count_windows(split, positions, length)
    asked = []
    for position in positions:
        tokens = split.read(position, position + length).tolist()
        asked.append(Asked(tokens[: config.prompt_tokens], tokens[config.prompt_tokens :]))
    matched = matching_tokens(model, asked, config.batch)
    by_heart = [n == config.continuation_tokens for n in matched]
    by_power: dict[int, list[bool]] = {}
    for count, said in zip(copies, by_heart, strict=True):
        by_power.setdefault(count.bit_length() - 1, []).append(said)
    said_positions = sorted(
        {p: c for p, c, said in zip(positions, copies, by_heart, strict=True) if said}.items(), key=lambda pc: -pc[1]
    )
    return {
        "windows": _share(sum(by_heart[: len(even)]), len(even)),
        "by_copies": [
            {"copies": [2**power, 2 ** (power + 1) - 1], **_share(sum(said), len(said))}
            for power, said in sorted(by_power.items())
        ],
        "examples": [
            {
                "copies": count,
                "urls": [document.url for document in split.documents(position, position + length)],
                "prompt": tokenizer.decode(split.read(position, position + config.prompt_tokens).tolist()),
                "continuation": tokenizer.decode(
                    split.read(position + config.prompt_tokens, position + length).tolist()
                ),
            }
            for position, count in said_positions[:SHOWN]
        ],
    }


def audit_sentences(
    model: GPT, split: TokenSplit, tokenizer: Tokenizer, sentences: Sequence[str], batch: int
) -> list[dict[str, Any]]:
    """For each sentence its copies in the text, and how much of its second half the model says after the first.

    The first token is left out of the count, since it depends on what stands before it.
    """
    ids = [tokenizer.encode(" " + sentence).tolist() for sentence in sentences]
    copies = count_texts(split, [i[1:] for i in ids])
    asked = [Asked(i[: len(i) // 2], i[len(i) // 2 :]) for i in ids]
    matched = matching_tokens(model, asked, batch)
    return [
        {
            "sentence": sentence,
            "copies": count,
            "target_tokens": len(a.target),
            "matching_tokens": n,
            "by_heart": n == len(a.target),
        }
        for sentence, count, a, n in zip(sentences, copies, asked, matched, strict=True)
    ]


def audit_personal(model: GPT, split: TokenSplit, tokenizer: Tokenizer, config: AuditConfig) -> dict[str, Any]:
    """By kind: values tried, values said, and the URLs of those said, with the value masked.

    A value that its own prompt holds already is not tried: to repeat it shows no memory.
    """
    tried: list[tuple[str, str, str, Asked]] = []
    for document in _some_documents(split, config.documents, config.seed):
        tokens = split.read(document.start, document.stop - 1).tolist()
        text = tokenizer.decode(tokens)
        spans = personal.find(text)
        if not spans:
            continue
        starts = np.cumsum([0, *(len(tokenizer.decode_bytes([t])) for t in tokens)])
        for kind, start, stop in spans:
            first = int(np.searchsorted(starts, len(text[:start].encode()), side="right")) - 1
            prompt = tokens[max(first - config.prompt_tokens, 0) : first]
            value = text[start:stop]
            if len(prompt) < MIN_PERSONAL_PROMPT_TOKENS or value in tokenizer.decode(prompt):
                continue
            room = len(tokenizer.encode(" " + value)) + SPARE_TOKENS
            tried.append((kind, value, document.url, Asked(prompt, [0] * room)))
    texts = continuations(model, [asked for *_, asked in tried], tokenizer, config.batch)
    result: dict[str, Any] = {}
    for kind in personal.KINDS:
        of_kind = [(value, url, text) for (k, value, url, _), text in zip(tried, texts, strict=True) if k == kind]
        said = [{"value": masked(value), "url": url} for value, url, text in of_kind if value in text]
        result[kind] = {"tried": len(of_kind), "said": len(said), "examples": said[:SHOWN]}
    return result


def matching_tokens(model: GPT, asked: Sequence[Asked], batch: int) -> list[int]:
    """How many tokens of each target the model says in a row, greedily; a row ends with the first other one."""
    matched = [0] * len(asked)
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        rows = Decoding(
            model, [a.prompt for a in part], GREEDY, seeds=[0] * len(part),
            max_new_tokens=max(len(a.target) for a in part),
        )  # fmt: skip
        for row, token in rows:
            target, at = part[row].target, matched[first + row]
            if at < len(target) and token == target[at]:
                matched[first + row] += 1
            if matched[first + row] != rows.new_tokens(row) or matched[first + row] == len(target):
                rows.finish(row)
    return matched


def continuations(model: GPT, asked: Sequence[Asked], tokenizer: Tokenizer, batch: int) -> list[str]:
    """What the model says greedily after each prompt, as many tokens as its target has."""
    texts = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        said: list[list[int]] = [[] for _ in part]
        rows = Decoding(
            model, [a.prompt for a in part], GREEDY, seeds=[0] * len(part),
            max_new_tokens=max(len(a.target) for a in part),
        )  # fmt: skip
        for row, token in rows:
            said[row].append(token)
            if len(said[row]) == len(part[row].target):
                rows.finish(row)
        texts += [tokenizer.decode(tokens) for tokens in said]
    return texts


def masked(value: str) -> str:
    """The first letter or digit of each part, the rest as asterisks: enough to find it again, not to use it."""
    shown, begins = [], True
    for letter in value:
        plain = letter.isalnum()
        shown.append(letter if begins or not plain else "*")
        begins = not plain
    return "".join(shown)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not trials:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _share(said: int, tried: int) -> dict[str, Any]:
    return {
        "tried": tried,
        "said": said,
        "share": said / tried if tried else 0.0,
        "interval": list(wilson(said, tried)),
    }


def _even_windows(split: TokenSplit, length: int, most: int, seed: int) -> list[int]:
    """Positions drawn evenly among those whose window lies in one document."""
    if split.tokens < length:
        return []
    generator = np.random.default_rng(seed)
    found: set[int] = set()
    for position in generator.integers(0, split.tokens - length + 1, size=20 * most).tolist():
        if len(found) == most:
            break
        (document, *others) = split.documents(position, position + length)
        if not others and position + length < document.stop:  # its last token is the end of text
            found.add(position)
    return sorted(found)


def _some_documents(split: TokenSplit, most: int, seed: int) -> list[Any]:
    """Documents at positions drawn evenly, so long ones come more often; each once."""
    if not split.tokens:
        return []
    positions = np.random.default_rng(seed + 1).integers(0, split.tokens, size=most)
    found = {d.start: d for p in sorted(positions.tolist()) for d in split.documents(p, p + 1)}
    return list(found.values())


def _sentences(path: str) -> list[str]:
    if not path:
        return []
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")]
    sentences = [line for line in lines if line]
    short = [line for line in sentences if len(line.split()) < 4]
    if short:
        raise ConfigError([f"sentences={path}: {line!r}: must have four words or more" for line in short])
    return sentences


def _recorded_data(run: str) -> str:
    folder = None if is_hf_folder(run) else data_folder(run_dir_of(run) or run)
    if folder is None:
        raise ConfigError([f"data='': run={run} does not say what it was trained on; give data=corpus/tokens"])
    return str(folder)


def _trained_on(run: str) -> str | None:
    """Fingerprint of the token shards that a run was trained on; None where it does not say."""
    if is_hf_folder(run):
        return None
    found = read_json((run_dir_of(run) or Path(run)) / VERSIONS).get("data", {}).get("fingerprint")
    return found if isinstance(found, str) else None


def _default_out(run: str) -> Path:
    return (run_dir_of(run) or Path(run)) / AUDIT


def _print(result: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Said by heart")
    for column in ("what", "copies", "tried", "said", "share", "95 %"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, copies: str, share: dict[str, Any]) -> None:
        low, high = share.get("interval") or wilson(share["said"], share["tried"])
        part = share["said"] / share["tried"] if share["tried"] else 0.0
        table.add_row(what, copies, f"{share['tried']:,}", f"{share['said']:,}", f"{part:.2%}", f"{low:.2%}–{high:.2%}")

    row("windows, drawn evenly", "", result["windows"])
    for part in result["by_copies"]:
        low, high = part["copies"]
        row("windows, by copies", f"{low}" if low == high else f"{low}–{high}", part)
    for kind, part in result["personal"].items():
        row(kind, "", part)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for sentence in result["sentences"]:
        verdict = "by heart" if sentence["by_heart"] else (
            f"{sentence['matching_tokens']} of {sentence['target_tokens']} tokens"
        )  # fmt: skip
        console.print(f"{sentence['copies']:>6} copies  {verdict:<16}  {sentence['sentence']}", markup=False)
    for example in result["examples"][:3]:
        console.print(f"\n{', '.join(example['urls'])} ({example['copies']} copies)", markup=False)
        console.print(f"  … {example['continuation']!r}", markup=False)
