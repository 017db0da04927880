"""Checkpoints to trust: written beside, synced, verified, published by one rename; never loaded unless whole.

    checkpoints/step_00001200/
        weights_00000.safetensors   fp32 weights by parameter name; one file a rank, parameter i with rank i mod ranks
        moments_00000.safetensors   Adam's moments: exp_avg/NAME and exp_avg_sq/NAME, fp32; for Muon the first alone
        state.json                  step, tokens, model, schedule, seeds, data fingerprint
        manifest.json               bytes and sha256 of all of these, parameter → part and shape; written last

Flows in: tensors by name and a state of plain numbers and words. Flows out: the newest checkpoint whose every byte is
what was written. Any number of ranks may read what another number wrote, as parts are only where a name lies. Nothing
is pickled, so nothing can be executed. A manifest carries its own hash and its step, so a folder that was renamed, a
file of another step and a changed manifest are all found.

Saving has two halves: `capture` copies this rank's share into the machine's memory, `write` does the rest and needs
neither the model nor the device, so a thread may do it while training goes on (saving/saver.py).

All ranks write to one filesystem. A kill at any moment leaves the last published checkpoint and at most a folder whose
name starts with a dot, which the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2train.distributed import World, all_rows, on_rank_zero
from gpt2train.errors import CheckpointError, StorageError
from gpt2train.run_folder import CHECKPOINTS, checkpoint_folders, read_json

FORMAT, VERSION = "gpt2train checkpoint", 1
MANIFEST, STATE = "manifest.json", "state.json"
BLOCK_BYTES = 1 << 20

_log = logging.getLogger(__name__)
_ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a newer one is published: those that any of the rules names."""

    last: int = 0
    """The newest ones; 0: all."""
    every_steps: int = 0
    """Those of steps that are multiples of this; 0: none."""
    best: bool = False
    """The one whose state.json has the lowest `validation_loss`."""
    spare: frozenset[int] = frozenset()
    """Steps that are still needed, whatever the rules say."""


@dataclass(frozen=True)
class Captured:
    """What one rank has to write of a checkpoint: copies, fp32, in the machine's memory."""

    parameters: dict[str, dict[str, Any]]
    """Every parameter's part (the rank that writes it) and shape."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def capture(tensors: Iterable[tuple[str, Tensor, Tensor, Tensor | None]], world: World = _ALONE) -> Captured:
    """Copies this rank's share of (name, weight, exp_avg, exp_avg_sq); all ranks run through the same ones together."""
    captured = Captured({}, {}, {})
    for number, (name, weight, exp_avg, exp_avg_sq) in enumerate(tensors):
        part = number % world.size
        captured.parameters[name] = {"part": part, "shape": list(weight.shape)}
        if exp_avg_sq is None:
            captured.parameters[name]["moments"] = ["exp_avg"]
        if part == world.rank:
            captured.weights[name] = _copy(weight)
            captured.moments[f"exp_avg/{name}"] = _copy(exp_avg)
            if exp_avg_sq is not None:
                captured.moments[f"exp_avg_sq/{name}"] = _copy(exp_avg_sq)
    return captured


def write(
    run_dir: Path,
    step: int,
    captured: Captured,
    state: Mapping[str, Any],
    *,
    world: World = _ALONE,
    keep: Keep = Keep(),  # noqa: B008 (frozen)
) -> Path:
    """Writes and publishes the checkpoint of `step`, then removes older ones that `keep` does not name.

    All ranks come here together. Raises StorageError on every rank when one of them cannot write, CheckpointError when
    what was written is not there; checkpoints published before stay as they are.
    """
    folder = run_dir / CHECKPOINTS
    beside, place = folder / f".{folder_name(step)}.tmp", folder / folder_name(step)
    on_rank_zero(world, lambda: _begin(folder, beside))
    files = _write_parts(beside, world, {"weights": captured.weights, "moments": captured.moments})
    on_rank_zero(world, lambda: _publish(beside, place, step, files, captured.parameters, state, keep))
    return place


def save(
    run_dir: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor, Tensor, Tensor | None]],
    state: Mapping[str, Any],
    *,
    keep: Keep = Keep(),  # noqa: B008 (frozen)
) -> Path:
    """`capture` and `write` in one, by one process."""
    return write(run_dir, step, capture(tensors), state, keep=keep)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _begin(folder: Path, beside: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        beside.mkdir()
    except OSError as error:
        raise _cannot_write(beside, error) from error
    return 0


def _remove_leftovers(folder: Path) -> None:
    """Half-written and half-removed checkpoints of a killed run."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)


def _write_parts(beside: Path, world: World, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Writes this rank's files; gives name → bytes and sha256 of all ranks' files. Raises on all ranks together."""
    failure: OSError | None = None
    rows = []
    for kind, tensors in parts.items():
        content = to_safetensors(dict(tensors), metadata={"format": "pt"})
        digest = hashlib.sha256(content)
        if failure is None:
            try:
                _write(_part(beside, kind, world.rank), content)
            except OSError as error:
                failure = error
        rows.append(len(content).to_bytes(8, "big") + digest.digest())
    answers = all_rows(world, bytes([failure is not None]) + b"".join(rows))
    failed = [rank for rank, answer in enumerate(answers) if answer[0]]
    if failure is not None:
        raise _cannot_write(beside, failure) from failure
    if failed:
        raise StorageError(f"{beside}: rank {failed[0]} could not write; its line says why")
    files = {}
    for rank, answer in enumerate(answers):
        for position, kind in enumerate(parts):
            row = answer[1 + 40 * position : 41 + 40 * position]
            size, digest_hex = int.from_bytes(row[:8], "big"), row[8:].hex()
            files[_part(beside, kind, rank).name] = {"bytes": size, "sha256": digest_hex}
    return files


def _part(folder: Path, kind: str, part: int) -> Path:
    return folder / f"{kind}_{part:05d}.safetensors"


def _publish(
    beside: Path,
    place: Path,
    step: int,
    files: dict[str, dict[str, Any]],
    parameters: dict[str, dict[str, Any]],
    state: Mapping[str, Any],
    keep: Keep,
) -> int:
    content = _json_bytes(dict(state))
    files = files | {STATE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "parameters": parameters}
    manifest["sha256"] = hashlib.sha256(_json_bytes(manifest)).hexdigest()
    try:
        _write(beside / STATE, content)
        _write(beside / MANIFEST, _json_bytes(manifest))
        _sync_folder(beside)
        wrong = defects(beside, step=step)
        if wrong:
            raise CheckpointError(
                f"{beside}: was not stored as written ({'; '.join(wrong)}); check the disk, and that run_dir is on "
                f"one filesystem for all ranks; earlier checkpoints are intact"
            )
        publish(beside, place)
        if keep.last:
            _prune(place, keep)
    except OSError as error:
        raise _cannot_write(place, error) from error
    return 0


def publish(beside: Path, place: Path) -> None:
    """One rename, on the disk when this returns."""
    if place.exists():  # a torn one of this step, or it would have been resumed from
        os.rename(place, place.with_name(f".{place.name}.torn"))
    os.rename(beside, place)
    _sync_folder(place.parent)


def _prune(newest: Path, keep: Keep) -> None:
    """Removes checkpoints before `newest` that `keep` does not name; renamed first, so none is half there."""
    folders = {int(path.name[5:]): path for path in checkpoint_folders(newest.parent.parent)}
    step = int(newest.name[5:])
    losses = {at: _validation_loss(path) for at, path in folders.items() if keep.best}
    for at in superfluous([at for at in folders if at <= step], losses, keep):
        path = folders[at]
        aside = path.with_name(f".{path.name}.pruned")
        os.rename(path, aside)
        shutil.rmtree(aside)


def superfluous(steps: Iterable[int], losses: Mapping[int, float | None], keep: Keep) -> list[int]:
    """Those of `steps` that `keep` does not name; `losses` are the validation losses of those that have one."""
    by_age = sorted(steps)
    known = {step: loss for step, loss in losses.items() if loss is not None and step in by_age}
    best = min(known, key=lambda step: known[step], default=None) if keep.best else None
    older = by_age[: -keep.last] if keep.last else []
    return [
        step
        for step in older
        if step != best and step not in keep.spare and not (keep.every_steps and step % keep.every_steps == 0)
    ]


def _validation_loss(checkpoint: Path) -> float | None:
    """What the run measured at this checkpoint's step; None where it did not, or where the file is no longer whole."""
    loss = read_json(checkpoint / STATE).get("validation_loss")
    return float(loss) if isinstance(loss, (int, float)) else None


def _write(path: Path, content: bytes) -> None:
    """Writes, syncs, and reads back from the disk what was written; raises OSError when it differs."""
    with open(path, "xb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
        if hasattr(os, "posix_fadvise"):  # forget the cached pages, so that the next read asks the disk
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _sha256(path) != hashlib.sha256(content).hexdigest():
        raise OSError(f"{path.name} reads back differently")


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); earlier checkpoints are intact, "
        f"make room and run the same command again"
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------- reading


def newest_whole(run_dir: Path, *, multiples_of: int = 1) -> Path | None:
    """The newest checkpoint that is whole, after reading every byte of it; None where there has never been one.

    Only those of steps that are `multiples_of` a number count. A line is logged for each newer one that is passed over.
    Raises CheckpointError when there are checkpoints and none is whole: starting from nothing then is for the user to
    say.
    """
    torn = []
    for folder in reversed(checkpoint_folders(run_dir)):
        if int(folder.name[5:]) % multiples_of:
            continue
        wrong = defects(folder)
        if not wrong:
            return folder
        torn.append(f"{folder.name}: {'; '.join(wrong)}")
        _log.warning("%s is not whole and is passed over: %s", folder, "; ".join(wrong))
    if torn:
        raise CheckpointError(
            f"{Path(run_dir) / CHECKPOINTS}: no checkpoint is whole ({' | '.join(torn)}); restore one, or start from "
            f"nothing with overwrite=true"
        )
    return None


def resolve(run: str | Path) -> Path:
    """A run folder (its newest whole checkpoint) or one checkpoint folder → the checkpoint's folder, verified.

    Raises CheckpointError, naming what is wrong.
    """
    path = Path(run)
    if (path / MANIFEST).exists() or path.parent.name == CHECKPOINTS:
        wrong = defects(path)
        if wrong:
            raise CheckpointError(f"{path}: {'; '.join(wrong)}; give another checkpoint or the run's folder")
        return path
    found = newest_whole(path)
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give the folder that `train` got as run_dir")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint that was verified: `step`, `tokens`, `model`, and what fixes the order of data."""
    state = json.loads((checkpoint / STATE).read_bytes())
    assert isinstance(state, dict)
    return state


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint that was verified, by parameter name: fp32, on the CPU."""
    with _Tensors(checkpoint) as tensors:
        return {name: tensors.get("weights", name) for name in tensors.parameters}


class Reader:
    """One parameter at a time of a checkpoint that was verified.

        with Reader(checkpoint) as reader:
            weight, exp_avg, exp_avg_sq = reader("h.0.ln_1.weight")

    Raises CheckpointError for a name that it does not hold.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._tensors = _Tensors(checkpoint)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def __call__(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        get = self._tensors.get
        both = "exp_avg_sq" in _moments(self._tensors.parameters.get(name, {}))
        second = get("moments", name, "exp_avg_sq/") if both else None
        return get("weights", name), get("moments", name, "exp_avg/"), second


def _moments(entry: Mapping[str, Any]) -> Sequence[str]:
    """Names of a parameter's moments, of its entry in the manifest."""
    found = entry.get("moments", ("exp_avg", "exp_avg_sq"))
    if not isinstance(found, (list, tuple)) or not {"exp_avg"} <= {*found} <= {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"moments {found!r}")
    return found


class _Tensors:
    """Open safetensors files of a checkpoint; each is mapped when the first tensor is asked of it."""

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint
        self._open: dict[Path, Any] = {}
        self.parameters: dict[str, dict[str, Any]] = json.loads((checkpoint / MANIFEST).read_bytes())["parameters"]

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def get(self, kind: str, name: str, prefix: str = "") -> Tensor:
        if name not in self.parameters:
            raise CheckpointError(f"{self._folder}: holds no parameter {name}; it is of another model")
        path = _part(self._folder, kind, self.parameters[name]["part"])
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(prefix + name)


# -------------------------------------------------------------------------------------------------------- verifying


def defects(folder: Path, *, step: int | None = None) -> list[str]:
    """What is wrong with a checkpoint, one entry each; empty when every byte is as written.

    `step` is the step that it must be of; by default its folder's name says so.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        claimed = manifest.pop("sha256")
        if hashlib.sha256(_json_bytes(manifest)).hexdigest() != claimed:
            return [f"{MANIFEST} does not match its own sha256"]
        if content != _json_bytes(manifest | {"sha256": claimed}):
            return [f"{MANIFEST} was changed"]
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            return [
                f"{MANIFEST} says {manifest['format']} {manifest['version']}, this program reads {FORMAT} {VERSION}"
            ]
        files, parameters = manifest["files"], manifest["parameters"]
        if not (isinstance(files, dict) and isinstance(parameters, dict)):
            return [f"{MANIFEST} cannot be read (files and parameters are no tables)"]
        if manifest["step"] != step and folder.name != folder_name(manifest["step"]):
            return [f"{MANIFEST} is of {folder_name(manifest['step'])}"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    with ThreadPoolExecutor(min(8, max(len(files), 1))) as pool:  # hashing lets go of the interpreter's lock
        found = [defect for defect in pool.map(lambda item: _file_defect(folder, *item), files.items()) if defect]
    return found or _content_defects(folder, files, parameters)


def _file_defect(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    path = folder / name
    if path.name != name or path.is_symlink():
        return f"{name} is no plain file of the checkpoint"
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes, written were {entry['bytes']:,}"
        got = _sha256(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (KeyError, TypeError, ValueError) as error:
        return f"{name}: {MANIFEST} does not say what it was ({error})"
    return None if got == entry["sha256"] else f"{name} has sha256 {got[:12]}…, written was {entry['sha256'][:12]}…"


def _content_defects(folder: Path, files: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Whether the files hold each parameter in its shape: a manifest that is right in itself may be wrong here."""
    try:
        if STATE not in files or not isinstance(json.loads((folder / STATE).read_bytes()), dict):
            return [f"{STATE} is not what a checkpoint needs"]
        for kind in ("weights", "moments"):
            for part in sorted({entry["part"] for entry in parameters.values()}):
                path = _part(folder, kind, part)
                if path.name not in files:
                    return [f"{path.name} is not in {MANIFEST}"]
                with safe_open(path, framework="pt") as file:
                    held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                    for name, entry in parameters.items():
                        prefixes = [f"{moment}/" for moment in _moments(entry)] if kind == "moments" else [""]
                        if entry["part"] == part and not _holds(held, prefixes, name, entry["shape"]):
                            return [f"{path.name} does not hold {name} as fp32 {entry['shape']}"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return [f"the content cannot be read ({error})"]
    return []


def _holds(held: Mapping[str, Any], prefixes: Sequence[str], name: str, shape: Sequence[int]) -> bool:
    slices = [held.get(prefix + name) for prefix in prefixes]
    return all(s is not None and s.get_dtype() == "F32" and list(s.get_shape()) == list(shape) for s in slices)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
