"""What lies where in a run's folder, and reading it back.

Flows in: a folder that `train` wrote (config.yaml, metrics.jsonl, versions.json, checkpoints/). Flows out: its settings
as a TrainConfig, its metrics as dictionaries. Nothing here needs torch, so reports and tables start fast, and nothing
here writes: a run that is still going on can be read at any moment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf lets PyYAML's errors through

from gpt2train.compose import literal
from gpt2train.config import TrainConfig
from gpt2train.errors import STORAGE_ERRNOS, ConfigError, write_error

CONFIG = "config.yaml"
"""The resolved settings."""
RUN = "run.json"
"""The run's id, what may not change while it goes on, and the step of its newest checkpoint."""
METRICS = "metrics.jsonl"
"""One JSON object a line: a step's (`step`, `loss`, …) or an evaluation's (`validation_loss`, or `TASK/SCORE`)."""
VERSIONS = "versions.json"
"""Versions of Python and of the packages, the git commit, the hashes of the input."""
CHECKPOINTS = "checkpoints"
"""One folder a checkpoint, `step_00001200`."""
EVALUATION = "evaluation.json"
"""What the last `evaluate` measured."""
EVALUATION_WORK = "evaluation"
"""What makes an evaluation that was killed go on; empty and gone after one that was not."""
FORECAST = "forecast.json"
"""What the run was expected to take, and what it took."""
AUDIT = "audit.json"
"""What the last `audit` found."""
REPORT = "report.html"
TENSORBOARD = "tensorboard"
"""TensorBoard's event files."""
PROFILE = "profile"
"""Traces of torch's profiler."""
IMPORTED = "imported.json"
"""In a run that `import` made: the sha256 of the files that its first weights came from, and the run's id."""

_log = logging.getLogger(__name__)


def config_text(config: TrainConfig) -> str:
    """The settings as YAML that `read_run_config` reads back letter by letter: a `${` in a path stays one."""
    return OmegaConf.to_yaml(OmegaConf.create(literal(asdict(config))))


def read_run_config(run_dir: str | Path) -> TrainConfig:
    """The settings of a run, with the types and defaults that YAML forgets.

    Raises ConfigError when `run_dir` has no config.yaml or when it is none of this version's.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise ConfigError([f"run={run_dir}: has no {CONFIG}; give the folder that `train` got as run_dir"])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            [f"{path}: cannot be read as settings ({reason}); restore the file that `train` wrote"]
        ) from None
    assert isinstance(config, TrainConfig)
    return config


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl in the order written; none when there is no such file.

    A last line that is cut short (a write in progress, or a kill) is left out. Any other line that is not a JSON
    object is left out too, and a warning names it.
    """
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate([*lines, torn], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            metrics.append(entry)
        elif number <= len(lines):
            _log.warning("%s:%d is not a JSON object and is left out", path, number)
    return metrics


def series(metrics: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has `name`, by step; of a step that was done again, what was written last."""
    latest = {
        int(entry["step"]): float(entry[name])
        for entry in metrics
        if isinstance(entry.get("step"), int) and isinstance(entry.get(name), (int, float))
    }
    return sorted(latest.items())


def last_value(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    """The value of `name` at the highest step that has one."""
    points = series(metrics, name)
    return points[-1][1] if points else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} when the file is missing or is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """The run's published checkpoints by step, oldest first; by name alone, nothing is verified."""
    folder = Path(run_dir) / CHECKPOINTS
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def run_dir_of(checkpoint: str | Path) -> Path | None:
    """The run's folder that a checkpoint folder lies in; None when it was taken out of its run."""
    parent = Path(checkpoint).resolve().parent
    return parent.parent if parent.name == CHECKPOINTS else None


def data_folder(run_dir: str | Path) -> Path | None:
    """The token shards that the run trains on: as recorded when it started, else as config.yaml names them, if at all.

    The record is absolute, so it holds from any working directory.
    """
    recorded = read_json(Path(run_dir) / VERSIONS).get("data", {}).get("path")
    if recorded:
        return Path(recorded)
    named = read_run_config(run_dir).data.path if (Path(run_dir) / CONFIG).is_file() else ""
    return Path(named) if named else None


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path` whole: whoever reads it sees the content before or this one.

    Raises StorageError where there is no room or the storage fails, and OSError for a place that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in STORAGE_ERRNOS:
            raise write_error(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # of a file system that is read-only, or broken
            temporary.unlink(missing_ok=True)
