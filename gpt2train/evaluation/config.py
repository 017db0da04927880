"""Settings of `evaluate`, and their bounds. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gpt2train.bounds import run_faults
from gpt2train.config import Device, Precision
from gpt2train.evaluation.asked import task_faults


@dataclass
class EvaluateCommandConfig:
    """`gpt2train evaluate`: a run → validation loss, perplexity of texts, and the zero-shot tasks of GPT-2's paper."""

    run: str = ""
    """Run folder, checkpoint folder, or a folder in Hugging Face format."""
    data: str = ""
    """Folder of token shards whose validation split is used; empty: the run's own."""
    validation: bool = True
    """Measure the validation loss, where there is data."""
    texts: list[str] = field(default_factory=list)
    """Text files to give the perplexity of (sliding window)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks and groups of them: table3 (the paper's), reasoning, generation, all; docs/evaluation.md lists them."""
    task_data: list[str] = field(default_factory=list)
    """Folders that hold the tasks' files under their usual names, searched in this order; `hub`: fetch with the
    datasets library what no folder before it has."""
    limit: int = 0
    """First items of each task alone, for a quick look; 0: all."""
    contamination: bool = True
    """Count which 8-grams of each test set the training shards hold; reads all of them, once for given data."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, run by it on this model; needs `pip install gpt2train[harness]`."""
    harness_path: str = ""
    """Folder with task files (YAML) of lm-evaluation-harness, beside its own."""
    sequences: int = 0
    """Validation sequences; 0: all."""
    stride: int = 512
    """Step of the sliding window over a text, in tokens; at most the model's context. 1: each token sees a full
    context, and the text costs as many passes as it has tokens."""
    batch: int = 4
    """Sequences of full context at once, or as many shorter ones as have as many tokens."""
    precision: Precision = Precision.fp32
    """Of texts and tasks: fp32, or bf16 by autocast, which is faster on a GPU and rounds."""
    out: str = ""
    """Folder for evaluation.json and for what makes a killed evaluation go on; empty: the run's own."""
    again: bool = False
    """Measure tasks anew that evaluation.json has of the same weights, data and settings."""
    device: Device = Device.auto


def check_evaluate(config: EvaluateCommandConfig) -> list[str]:
    """All faults of `config` that a look at names and folders finds, one line each; empty when it can run."""
    faults = run_faults(config.run)
    for name, least in (("limit", 0), ("sequences", 0), ("stride", 1), ("batch", 1)):
        if getattr(config, name) < least:
            faults.append(f"{name}={getattr(config, name)}: must be at least {least}; leave it out")
    for path in config.texts:
        if not Path(path).is_file():
            faults.append(f"texts={path}: there is no such file; name a text file in UTF-8")
    measured = config.texts or config.data or config.tasks or config.harness
    if config.run and not measured and (Path(config.run) / "config.json").is_file():
        faults.append(
            "data='': a Hugging Face folder has no data of its own; give data=corpus/tokens, texts=[FILE] or tasks=[…]"
        )
    if config.harness_path and not Path(config.harness_path).is_dir():
        faults.append(f"harness_path={config.harness_path}: there is no such folder; give one with YAML task files")
    if config.out and Path(config.out).exists() and not Path(config.out).is_dir():
        faults.append(f"out={config.out}: is a file; give a folder")
    return faults + task_faults(config.tasks, config.task_data, "tasks", "task_data", writing=True)
