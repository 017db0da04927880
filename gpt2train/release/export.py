"""A run → a folder that transformers loads; and such a folder → a run to train on.

Flows in: a run's checkpoint. Flows out: config.json, generation_config.json, model.safetensors, the tokenizer's files
and a model card, README.md; on request model.gguf too. The folder is written beside its place, read back and compared,
synced, and renamed: it is whole or absent. The same checkpoint gives the same bytes.

The other way, a folder in Hugging Face format becomes a run whose only checkpoint stands at step 0, with no moments.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint, claim
from gpt2train.config import ModelConfig
from gpt2train.errors import CheckpointError, ConfigError, write_error
from gpt2train.release import gguf_file, nanochat
from gpt2train.release.card import model_card
from gpt2train.release.config import ExportConfig, ExportFormat, ImportConfig, check_export, check_import
from gpt2train.release.deepspeed_files import as_gpt2, is_deepspeed_folder, read_deepspeed_folder
from gpt2train.release.hf import architecture, hf_config, read_hf_folder, to_hf_state, weight_files
from gpt2train.run_folder import IMPORTED

END_OF_TEXT_TOKEN = "<|endoftext|>"


def export_run(config: ExportConfig) -> int:
    """Writes the run's newest whole checkpoint, or the checkpoint named, to the new folder `to`."""
    faults = check_export(config)
    if faults:
        raise ConfigError(faults)
    target = Path(config.to)
    _refuse_occupied(target)
    source = checkpoint.resolve(config.run)
    state = checkpoint.read_state(source)
    model = ModelConfig.from_json(state["model"])
    try:
        modern = architecture(model) == nanochat.MODEL_TYPE
    except ConfigError as error:
        raise ConfigError([f"run={config.run}: {fault}" for fault in error.faults]) from None
    if modern and config.format is ExportFormat.gguf:
        raise ConfigError([f"run={config.run}: format=gguf takes models with GPT-2's network alone; give format=hf"])
    to_state, hf_settings = (nanochat.to_hf_state, nanochat.hf_config) if modern else (to_hf_state, hf_config)
    ours = checkpoint.read_weights(source)
    weights = to_state(ours, model)
    with _folder_beside(target) as folder:
        _write_json(folder / "config.json", hf_settings(model))
        _write_json(folder / "generation_config.json", generation_config(model))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors keeps it from all others
        if model.vocabulary >= VOCABULARY:
            _write_tokenizer(folder, model)
        if config.format is ExportFormat.gguf:
            gguf_file.write_gguf(folder / gguf_file.FILE, ours, model)
        (folder / "README.md").write_text(model_card(source, state), encoding="utf-8")
        _verify(folder, weights, hf_settings(model))
    print(f"{source} → {target}: {sum(w.numel() for w in weights.values()):,} parameters", file=sys.stderr)
    return 0


def generation_config(model: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json: where a sample starts and ends, nothing about taste."""
    end = END_OF_TEXT if model.vocabulary > END_OF_TEXT else None
    return {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}


def _write_tokenizer(folder: Path, model: ModelConfig) -> None:
    """GPT-2's checked vocabulary under the names that transformers looks for."""
    files = load_tokenizer().files()
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / name).write_bytes(files[source].read_bytes())
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_TOKEN)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.context,
            "tokenizer_class": "GPT2Tokenizer",
            **special,
        },
    )


def _verify(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Reads the folder back; raises CheckpointError when it does not hold exactly what was to be written."""
    read_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read = load_file(folder / "model.safetensors")
    differing = [
        n for n in sorted({*weights, *read}) if n not in read or n not in weights or not _same(read[n], weights[n])
    ]
    if read_config != config:
        differing.append("config.json")
    if differing:
        raise CheckpointError(
            f"{folder}: read back, {', '.join(differing[:5])} differ from what was written; check the disk"
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def import_model(config: ImportConfig) -> int:
    """Writes the model at `path` as a checkpoint of the new run folder `to`, at step 0 or DeepSpeed's own."""
    faults = check_import(config)
    if faults:
        raise ConfigError(faults)
    target = Path(config.to)
    _refuse_occupied(target)
    found = _read_deepspeed(config) if is_deepspeed_folder(config.path) else _read_hugging_face(config)
    model, step = found.model, found.state["step"]
    run_id = secrets.token_hex(8)
    with _folder_beside(target) as folder:
        checkpoint.save(folder, step, found.tensors, found.state | {"model": model.to_json()})
        # The run's record with no identity yet: the first `train` chooses data, batch and seed.
        claim.Claim(folder, run_id=run_id, identity={}, published=step).record()
        _write_json(folder / IMPORTED, {"run_id": run_id, "files": {file.name: _sha256(file) for file in found.files}})
    print(
        f"{config.path} → {target}: go on from step {step} with `gpt2train train run_dir={target} "
        f"model.name={model.name} model.layers={model.layers} model.channels={model.channels} "
        f"model.heads={model.heads} model.context={model.context} model.vocabulary={model.vocabulary} "
        f"model.dropout={model.dropout} data=… steps=…`",
        file=sys.stderr,
    )
    return 0


@dataclass(frozen=True)
class _Found:
    """What is imported: a model, (name, weight, exp_avg, exp_avg_sq) of its parameters, state.json, the files."""

    model: ModelConfig
    tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]
    state: dict[str, Any]
    files: Sequence[Path]


def _read_hugging_face(config: ImportConfig) -> _Found:
    model, weights = read_hf_folder(config.path)
    # Adam's moments before any update: zeros, which take no memory until they are written.
    tensors = ((n, w, torch.zeros(()).expand(w.shape), torch.zeros(()).expand(w.shape)) for n, w in weights.items())
    return _Found(model, tensors, {"step": 0, "tokens": 0}, weight_files(Path(config.path)))


def _read_deepspeed(config: ImportConfig) -> _Found:
    """Its steps count: training goes on with the batch and the learning rate of the step behind them."""
    found = read_deepspeed_folder(config.path)
    model, tensors = as_gpt2(found, heads=config.heads)
    tokens = found.step * found.sequences_per_step * model.context
    # Updates that DeepSpeed or the loop left out are told to Adam as steps without one.
    state: dict[str, Any] = {"step": found.step, "tokens": tokens, "updates": found.updates}
    state["faults"] = {"skipped": list(range(1, found.step - found.updates + 1))}
    return _Found(model, ((name, *triple) for name, triple in tensors.items()), state, found.files)


def _refuse_occupied(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError([f"to={target}: is a file; give a new folder"])
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError([f"to={target}: exists and is not empty; give a new folder"])


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`; synced and renamed to it at the end, removed when anything fails."""
    target = target.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        for path in sorted(folder.rglob("*")):
            _sync(path)
        _sync(folder)
        folder.rename(target)  # takes the place of an empty folder, fails over anything else
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(target, _as_os_error(error), "nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_os_error(error: OSError | SafetensorError) -> OSError:
    """safetensors has the kernel's error as words alone: `I/O error: No space left on device (os error 28)`."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
