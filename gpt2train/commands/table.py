"""The table of commands: what each is for, which dataclass holds its settings, which function runs it.

Rooms are named by text, so that reading the table imports none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2train.compose import CONFIG_FOLDER


@dataclass(frozen=True)
class Command:
    """A command's schema and entry point by name, so that naming a command imports neither."""

    summary: str
    schema: str
    run: str
    groups: str = ""
    positional: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[str, ...] = ()


DATA = {"data": "data.path"}

COMMANDS: dict[str, Command] = {
    "corpus": Command(
        "URL list, WARC files or text dataset → documents and token shards",
        "data_pipeline.config:CorpusConfig",
        "gpt2train.commands.joined:build_corpus",
        groups="corpus",
        examples=(
            "gpt2train corpus urls=list.txt out=corpus/ fetch.contact=https://example.org/crawler",
            "gpt2train corpus source=warc path=crawl/ out=corpus/",
            "gpt2train corpus source=dataset path=texts/ out=corpus/ recipe=extract_only",
            "gpt2train corpus what_if=[quality.min_words=400,language.min_score=0.8] out=corpus/",
            "gpt2train corpus forget=domains.txt out=corpus/ runs=[runs/small]",
        ),
    ),
    "train": Command(
        "token shards → a model; run again, it resumes by itself",
        "gpt2train.config:TrainConfig",
        "gpt2train.train:train",
        groups="train",
        aliases=DATA,
        examples=("gpt2train train model=small data=corpus/tokens run_dir=runs/small steps=10000",),
    ),
    "plan": Command(
        "memory, speed, days and cost of a run, before it starts",
        "gpt2train.config:TrainConfig",
        "gpt2train.commands.planned:plan_run",
        groups="train",
        aliases=DATA,
        examples=(
            "gpt2train plan model=full cluster=8xh100",
            "gpt2train plan model=small cluster=8xa100 steps=20000 plan.mfu=0.55 cluster.gpu_hour_price=1.50",
            "gpt2train plan model=full cluster=8xh100 plan.apply=true",
        ),
    ),
    "launch": Command(
        "starts `train` on one machine, on several over ssh, or as a Slurm job; restarts what fails",
        "gpt2train.config:TrainConfig",
        "gpt2train.commands.joined:launch_training",
        groups="train",
        aliases=DATA,
        examples=(
            "gpt2train launch model=small data=corpus/tokens run_dir=runs/small steps=20000",
            "gpt2train launch processes=2 device=cpu model=nano data=corpus/tokens run_dir=runs/nano steps=300",
            "gpt2train launch launcher=hosts hosts.file=hosts.txt model=full data=tokens run_dir=runs/full steps=9000",
            "gpt2train launch launcher=slurm slurm.nodes=4 processes=8 slurm.time=8:00:00 model=full …   dry_run=true",
        ),
    ),
    "sweep": Command(
        "trains a ladder of sizes, or any settings, and tabulates loss over size",
        "gpt2train.config:TrainConfig",
        "gpt2train.commands.joined:sweep_training",
        groups="train",
        aliases=DATA,
        examples=("gpt2train sweep model=ladder data=corpus/tokens out=runs/ladder steps=1000",),
    ),
    "evaluate": Command(
        "validation loss, perplexity of texts, and the paper's zero-shot tasks",
        "gpt2train.evaluation.config:EvaluateCommandConfig",
        "gpt2train.evaluate:evaluate",
        examples=(
            "gpt2train evaluate run=runs/small texts=[book.txt]",
            "gpt2train evaluate run=runs/small tasks=[table3,reasoning] task_data=[eval/,hub]",
            "gpt2train evaluate run=runs/small harness=[lambada_openai]",
        ),
    ),
    "generate": Command(
        "samples from a run, on standard output",
        "gpt2train.generation.config:GenerateConfig",
        "gpt2train.generation.generate:generate",
        examples=(
            'gpt2train generate run=runs/small prompt="In a shocking finding,"',
            "gpt2train generate run=runs/small prompts=prompts.txt samples=4 out=samples.jsonl",
            'gpt2train generate run=runs/small embed=["a text"] embed_to=embeddings/',
        ),
    ),
    "serve": Command(
        "a local page with live text, and an OpenAI-compatible completions endpoint",
        "gpt2train.generation.config:ServeConfig",
        "gpt2train.generation.serve:serve",
        examples=("gpt2train serve run=runs/small port=8000",),
    ),
    "export": Command(
        "a run → a folder that transformers loads, with a model card",
        "gpt2train.release.config:ExportConfig",
        "gpt2train.release.export:export_run",
        examples=("gpt2train export run=runs/small to=out/",),
    ),
    "import": Command(
        "a folder in Hugging Face format, or DeepSpeed's checkpoint → a run to train on from",
        "gpt2train.release.config:ImportConfig",
        "gpt2train.release.export:import_model",
        examples=("gpt2train import path=gpt2/ to=runs/gpt2",),
    ),
    "release": Command(
        "several sizes, exported one stage after another, each card saying what is withheld and why",
        "gpt2train.release.config:ReleaseConfig",
        "gpt2train.release.staged:release",
        examples=("gpt2train release runs=[runs/small,runs/medium] to=release/ stage=1 reason='…'",),
    ),
    "audit": Command(
        "what of its training text a model says by heart, with the URLs",
        "gpt2train.release.config:AuditConfig",
        "gpt2train.release.audit:audit",
        examples=("gpt2train audit run=runs/small windows=1000",),
    ),
    "detect": Command(
        "was a text generated by this model?",
        "gpt2train.release.config:DetectConfig",
        "gpt2train.release.detect:detect",
        examples=(
            "gpt2train detect run=runs/small texts=texts.txt html=ranks.html",
            "gpt2train detect run=runs/small pairs=known.json classifier=detector.npz",
        ),
    ),
    "why": Command(
        "what became of a URL",
        "data_pipeline.account.why:WhyConfig",
        "data_pipeline.account.why:why",
        positional="url",
        examples=("gpt2train why https://example.org/page corpus=corpus/",),
    ),
    "trace": Command(
        "the documents and URLs that a step saw",
        "gpt2train.config:TraceConfig",
        "gpt2train.trace:trace",
        examples=("gpt2train trace run=runs/small step=1200",),
    ),
    "report": Command(
        "one HTML file of a corpus or a run",
        "gpt2train.config:ReportConfig",
        "gpt2train.commands.joined:write_report",
        positional="path",
        examples=("gpt2train report corpus/", "gpt2train report runs/small"),
    ),
}

LADDER = ("nano", "micro", "mini", "little", "small")
"""Models that `model=ladder` stands for in a sweep, smallest first."""


def groups_of(command: Command) -> Path | None:
    """The folder of a command's Hydra groups."""
    return CONFIG_FOLDER / command.groups if command.groups else None


def load(name: str) -> Any:
    """The object that `module:attribute` names; this is where a room is imported."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
