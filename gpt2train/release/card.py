"""The model card of an exported checkpoint: what it is, what it was made from, how well it does, what it is not.

Flows in: a checkpoint's state and its run's records. Flows out: README.md, Markdown behind a YAML front matter that the
Hugging Face Hub reads. It says only what is recorded; what nobody measured it calls unknown. The same checkpoint and
records give the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2train import mup
from gpt2train.claim import RUN
from gpt2train.config import (
    VOCABULARY,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    TrainConfig,
    flops_per_token,
    parameter_count,
)
from gpt2train.errors import ConfigError
from gpt2train.evaluation import table
from gpt2train.release import nanochat
from gpt2train.release.hf import architecture
from gpt2train.run_folder import (
    AUDIT,
    EVALUATION,
    IMPORTED,
    VERSIONS,
    data_folder,
    read_json,
    read_metrics,
    read_run_config,
    run_dir_of,
    series,
)

REASONS_SHOWN = 5
"""Reasons of a stage that the card names, the commonest first."""


def model_card(checkpoint: Path, state: Mapping[str, Any]) -> str:
    """README.md of the checkpoint in `checkpoint`, whose state.json is `state`."""
    model = ModelConfig.from_json(state["model"])
    step, tokens = int(state["step"]), int(state["tokens"])
    run_dir = run_dir_of(checkpoint)
    config = _config(run_dir)
    metrics = read_metrics(run_dir) if run_dir else []
    evaluation = read_json(run_dir / EVALUATION) if run_dir else {}
    if evaluation.get("source") != checkpoint.name:
        evaluation = {}  # of another checkpoint
    validation = dict(series(metrics, "validation_loss")).get(step)
    name = run_dir.name if run_dir else model.name
    imported = _imported(run_dir)
    sections = [
        _front_matter(name, validation, architecture(model)),
        f"# {_escaped(name)}\n\n{_what_it_is(model, step, imported)}",
        _use(model),
        "## Training\n\n"
        + _rows(_training_rows(model, state, config, step, tokens) + _compute_rows(metrics, state, config)),
        "## Training data\n\n" + _rows(_data_rows(run_dir, state)),
        "## Evaluation\n\n" + _results(dict(series(metrics, "loss")).get(step), validation, evaluation),
        "## Learned by heart\n\n" + _audit(read_json(run_dir / AUDIT) if run_dir else {}, checkpoint),
        _LIMITATIONS,
        "## What made it\n\n" + _rows(_origin_rows(state, imported, read_json(run_dir / VERSIONS) if run_dir else {})),
    ]
    return "\n\n".join(sections) + "\n"


def _config(run_dir: Path | None) -> TrainConfig | None:
    try:
        return read_run_config(run_dir) if run_dir else None
    except ConfigError:
        return None


def _front_matter(name: str, validation_loss: float | None, architecture: str) -> str:
    """YAML whose strings are written as JSON, which YAML contains: no name can break out of its place."""
    tags = ["tags:", f"- {architecture}", "- gpt2train"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", *tags]
    if validation_loss is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            "      type: token-shards",
            '      name: "validation split of the training corpus"',
            "    metrics:",
            "    - type: loss",
            f"      value: {validation_loss!r}",
            '      name: "nats per token"',
        ]
    return "\n".join([*lines, "---"])


def _what_it_is(model: ModelConfig, step: int, imported: Mapping[str, Any]) -> str:
    modern = architecture(model) == nanochat.MODEL_TYPE
    kind = "language model in the manner of GPT-2" if modern else "GPT-2 language model"
    text = (
        f"A {kind} of {parameter_count(model):,} parameters: {model.layers} layers, "
        f"{model.channels} channels, {model.heads} heads, a context of {model.context:,} tokens "
        f"and a vocabulary of {model.vocabulary:,}."
    )
    head = "the embedding as output matrix" if model.tied_head else "an output matrix of its own"
    if modern:
        text += (
            f" Its network is not GPT-2's of 2019 but what transformers calls NanoChat, from version "
            f"{nanochat.MIN_TRANSFORMERS} on: rotary positions, queries and keys normed, squared ReLU, "
            f"root-mean-square norms without gains, no biases, {head}"
        )
        text += f", logits capped at ±{model.logit_softcap:g}." if model.logit_softcap else "."
    if imported and step:
        text += " Its training went on from imported weights, named below; what they were trained on is unknown."
    elif imported:
        text += " Its weights were imported, as named below, and not trained further."
    return text


def _imported(run_dir: Path | None) -> dict[str, Any]:
    """What `import` recorded, unless the run was started from nothing since, which gives it a new id."""
    found = read_json(run_dir / IMPORTED) if run_dir else {}
    return found if run_dir and found.get("run_id") == read_json(run_dir / RUN).get("id") else {}


def _use(model: ModelConfig) -> str:
    if model.vocabulary < VOCABULARY:
        return "## Use\n\nIts vocabulary is not GPT-2's, so no tokenizer comes with it."
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("In a shocking finding,", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


def _training_rows(
    model: ModelConfig, state: Mapping[str, Any], config: TrainConfig | None, step: int, tokens: int
) -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{step:,}"),
        ("tokens", f"{tokens:,}"),
        ("FLOPs", f"{flops_per_token(model) * tokens:.3g}"),
    ]
    if config is not None and step:
        o = config.optimizer
        rows += [
            ("steps planned", f"{config.steps:,}"),
            ("recipe", config.recipe),
            ("batch", f"{config.batch.sequences} sequences of {model.context:,} tokens"),
            ("optimizer", _optimizer(o)),
            *(("parametrization", line) for line in mup.words(model, o)),
            ("learning rate", f"{o.lr}, {o.schedule.value}, down to {o.min_lr_ratio} of it"),
            ("gradient clipping", f"norm {o.clip_grad_norm}" if o.clip_grad_norm else "none"),
            ("dropout", str(model.dropout)),
            ("precision", config.precision.value),
            ("seed", str(config.seed)),
        ]
    if layout := state.get("layout"):
        rows.append(("processes", f"{layout['processes']}, ZeRO stage {layout['zero_stage']}"))
    return rows


def _compute_rows(
    metrics: Sequence[dict[str, Any]], state: Mapping[str, Any], config: TrainConfig | None
) -> list[tuple[str, str]]:
    """Hours of all processes in training steps alone, and at the rated power of the cluster's devices the energy."""
    rates, before, seconds = dict(series(metrics, "tokens_per_s")), 0.0, 0.0
    for step, tokens in series(metrics, "tokens"):
        if step > int(state["step"]):
            break
        if rates.get(step):
            seconds += (tokens - before) / rates[step]
        before = tokens
    hours = seconds / 3600 * state.get("layout", {}).get("processes", 0)
    if not hours:
        return []
    rows = [("hours of all processes in steps", f"{hours:.3g}")]
    if config is not None and config.cluster.watts:
        rated = f"{config.cluster.watts:g} W, {config.cluster.device}; the rest of the machine not counted"
        rows.append(("energy estimate", f"{hours * config.cluster.watts / 1000:.3g} kWh ({rated})"))
    else:
        rows.append(("energy estimate", "none: no cluster with a rated power was named"))
    return rows


def _data_rows(run_dir: Path | None, state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the corpus says of itself, as long as it is the one that was trained on."""
    folder, trained_on = data_folder(run_dir) if run_dir else None, state.get("data", {}).get("fingerprint")
    manifest = read_json(folder / "manifest.json") if folder else {}
    if folder is None or not trained_on or manifest.get("fingerprint") != trained_on:
        return [("records", "the corpus is not where it was; its fingerprint stands below")]
    rows = [
        (f"{name} split", f"{split['tokens']:,} tokens of {split['documents']:,} documents")
        for name, split in manifest["splits"].items()
    ]
    summary = read_json(folder.parent / "summary.json")
    if summary.get("tokens", {}).get("fingerprint") != trained_on:
        return rows
    rows += [("source", str(summary.get("source"))), ("filters", f"recipe {summary.get('recipe')}")]
    for stage in summary.get("stages", []):
        counts = f"{stage['in']:,} in, {stage['kept']:,} kept, {stage['dropped']:,} dropped, {stage['failed']:,} failed"
        reasons = sorted(stage.get("reasons", {}).items(), key=lambda reason: -reason[1])[:REASONS_SHOWN]
        shown = "; " + ", ".join(f"{name} {count:,}" for name, count in reasons) if reasons else ""
        rows.append((f"stage {stage['stage']}", counts + shown))
    return rows


def _audit(found: Mapping[str, Any], checkpoint: Path) -> str:
    """What `gpt2train audit` found for this very checkpoint."""
    if found.get("checkpoint") != checkpoint.name:
        return "Not looked at: `gpt2train audit` was not run on this checkpoint."
    windows = found["windows"]
    low, high = windows["interval"]
    rows = [
        (
            f"windows of the training text, {found['continuation_tokens']} tokens said after {found['prompt_tokens']}",
            f"{windows['said']:,} of {windows['tried']:,} ({low:.2%} to {high:.2%})",
        )
    ]
    data = found.get("data", {})
    if data.get("trained_on") not in (None, data.get("fingerprint")):
        rows.append(("the text looked at", "not all that was trained on: the token shards were changed since"))
    for kind, part in found["personal"].items():
        rows.append((f"{kind} in the training text, said", f"{part['said']:,} of {part['tried']:,}"))
    return _rows(rows)


def _optimizer(o: OptimizerConfig) -> str:
    adamw = f"AdamW, betas {o.beta1} and {o.beta2}, epsilon {o.eps}"
    if o.name is OptimizerName.muon:
        adamw = f"Muon, momentum {o.muon_momentum}, for the matrices of the blocks; for all else {adamw}"
    rates = [
        f"{name} at {ratio} of the learning rate"
        for name, ratio in (("embeddings", o.embedding_lr_ratio), ("the head", o.head_lr_ratio))
        if ratio != 1
    ]
    return ", ".join([adamw, f"weight decay {o.weight_decay}", *rates])


def _results(train_loss: float | None, validation_loss: float | None, evaluation: Mapping[str, Any]) -> str:
    rows = []
    if train_loss is not None:
        rows.append(("training loss of the last step, nats per token", f"{train_loss:.4f}"))
    if validation_loss is not None:
        rows.append(("validation loss during training, nats per token", f"{validation_loss:.4f}"))
    for result in evaluation.get("results", []):
        for key, words in (
            ("loss", "nats per token"),
            ("perplexity", "perplexity per token"),
            ("word_perplexity", "perplexity per word"),
            ("bits_per_byte", "bits per byte"),
        ):
            if result.get(key) is not None:
                rows.append((f"{result['name']} ({result['tokens']:,} tokens), {words}", f"{result[key]:.4f}"))
    for record in evaluation.get("tasks", []):
        metric, seen = record["metric"], record.get("contamination")
        overlap = f", {seen['share']:.2%} of its {seen['ngram']}-grams in the training data" if seen else ""
        score = record["scores"][metric]
        value = f"{table.shown(metric, score['value'])} ± {table.shown(metric, score['stderr'])}"
        rows.append((f"{record['title']}, {metric} ({record['items']:,} items{overlap})", value))
    if not rows:
        return "Nothing was measured for this checkpoint."
    return _rows(rows) + (
        "\n\nThe validation split is held out from the corpus of the training data: it shares its sources and biases."
    )


def _origin_rows(
    state: Mapping[str, Any], imported: Mapping[str, Any], versions: Mapping[str, Any]
) -> list[tuple[str, str]]:
    rows = [(f"imported {file}, sha256", digest) for file, digest in sorted(imported.get("files", {}).items())]
    if data := state.get("data", {}):
        rows.append(("token shards, fingerprint", data["fingerprint"]))
        rows.append(("tokenizer, sha256", data["tokenizer_sha256"]))
    if versions.get("git_commit"):
        rows.append(("git commit", versions["git_commit"]))
    rows += [(name, str(value)) for name, value in sorted(versions.get("versions", {}).items())]
    return rows or [("records", "none were kept")]


def _rows(rows: list[tuple[str, str]]) -> str:
    """A Markdown table of two columns; what a value holds is shown, not read as Markdown's own signs."""
    lines = ["| | |", "|---|---|"]
    return "\n".join(lines + [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows])


def _escaped(text: str) -> str:
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


_LIMITATIONS = """## Limitations

The model continues text as its training pages would. It does not know what is true, was not taught to follow
instructions or to refuse any, and repeats the biases, errors and offensive or private content of the pages it was
trained on. It was not evaluated for safety. Whatever is published from it should be read by a person first.

No license is stated here: it is for whoever publishes the model to choose one, and to check what the sources of the
training data allow."""
