"""Checkpoints under fire: no torn, changed or swapped file is ever loaded without a word."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2train import checkpoint
from gpt2train.checkpoint import newest_whole, read_state, read_weights, resolve, save
from gpt2train.errors import CheckpointError

SHAPES = {"wte.weight": (12, 4), "h.0.ln_1.weight": (4,), "h.0.attn.c_attn.weight": (12, 4), "ln_f.bias": (4,)}


def tensors(seed: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        yield name, *(torch.randn(shape, generator=generator) for _ in range(3))


def write(run_dir: Path, *steps: int, keep_last: int = 0) -> Path:
    for step in steps:
        save(run_dir, step, tensors(step), {"step": step, "model": {}}, keep=checkpoint.Keep(last=keep_last))
    return run_dir / "checkpoints"


def holds(folder: Path, step: int) -> bool:
    """Whether a checkpoint gives back exactly what was saved."""
    with checkpoint.Reader(folder) as read:
        same = all(
            torch.equal(got, saved)
            for name, *triple in tensors(step)
            for got, saved in zip(read(name), triple, strict=True)
        )
    weights = read_weights(folder)
    return (
        same
        and read_state(folder)["step"] == step
        and weights.keys() == SHAPES.keys()
        and all(torch.equal(weights[name], weight) for name, weight, *_ in tensors(step))
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 1200)
    assert newest_whole(tmp_path) == resolve(tmp_path) == resolve(folder / "step_00001200") == folder / "step_00001200"
    assert holds(folder / "step_00001200", 1200)
    assert sorted(os.listdir(folder)) == ["step_00001200"]
    # The files are plain safetensors, for anybody's reader.
    moments = load_file(folder / "step_00001200" / "moments_00000.safetensors")
    assert moments.keys() == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in SHAPES}
    assert all(tensor.dtype == torch.float32 for tensor in moments.values())


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path)


def test_the_newest_stay(tmp_path: Path) -> None:
    folder = write(tmp_path, 10, 20, 30, 40, keep_last=2)
    assert sorted(os.listdir(folder)) == ["step_00000030", "step_00000040"]
    # A checkpoint of a later step that could not be resumed from does not push out the one just written.
    (folder / "step_00000040" / "state.json").write_text("{}")
    save(tmp_path, 35, tensors(35), {"step": 35, "model": {}}, keep=checkpoint.Keep(last=1))
    assert sorted(os.listdir(folder)) == ["step_00000035", "step_00000040"]
    assert newest_whole(tmp_path) == folder / "step_00000035"


def test_a_torn_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path, 10, 20)
    (folder / "step_00000020" / "weights_00000.safetensors").write_bytes(b"")
    write(tmp_path, 20)
    assert holds(folder / "step_00000020", 20)
    write(tmp_path, 30)
    assert sorted(os.listdir(folder)) == ["step_00000010", "step_00000020", "step_00000030"]


FAULTS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "missing": lambda file, other, rng: file.unlink(),
    "empty": lambda file, other, rng: file.write_bytes(b""),
    "truncated": lambda file, other, rng: os.truncate(file, rng.randrange(1, file.stat().st_size)),
    "one bit": lambda file, other, rng: file.write_bytes(flipped(file.read_bytes(), rng)),
    "one byte": lambda file, other, rng: file.write_bytes(with_byte(file.read_bytes(), rng)),
    "longer": lambda file, other, rng: file.write_bytes(file.read_bytes() + bytes([rng.randrange(256)])),
    "of another step": lambda file, other, rng: shutil.copy(other, file),
    "zeros": lambda file, other, rng: file.write_bytes(bytes(file.stat().st_size)),
    "a folder": lambda file, other, rng: (file.unlink(), file.mkdir()),
    "a link": lambda file, other, rng: (file.unlink(), file.symlink_to(other)),
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]


def with_byte(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    other = rng.choice([b for b in range(256) if b != content[position]])
    return content[:position] + bytes([other]) + content[position + 1 :]


def loaded_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture, *, of_each: int, seed: int) -> int:
    """Every kind of fault at every file of the newest checkpoint, `of_each` times; gives how many were made.

    Fails where the damaged checkpoint is taken, or where no line names it.
    """
    original = tmp_path / "original"
    write(original, 10, 20)
    files = sorted(path.name for path in (original / "checkpoints" / "step_00000020").iterdir())
    assert files == ["manifest.json", "moments_00000.safetensors", "state.json", "weights_00000.safetensors"]
    rng = random.Random(seed)
    done = 0
    for kind, fault in FAULTS.items():
        for file in files:
            for _ in range(of_each):
                run_dir = tmp_path / "run"
                shutil.copytree(original, run_dir)
                newest, before = (run_dir / "checkpoints" / f"step_000000{n}" for n in (20, 10))
                fault(newest / file, before / file, rng)
                caplog.clear()
                with caplog.at_level(logging.WARNING):
                    found = newest_whole(run_dir)
                assert found == before, f"{kind} {file}, seed {seed}"
                assert "step_00000020 is not whole and is passed over" in caplog.text
                assert file in caplog.text or "cannot be read" in caplog.text, f"{kind} {file}: {caplog.text}"
                with pytest.raises(CheckpointError, match="give another checkpoint"):
                    resolve(newest)
                shutil.rmtree(run_dir)
                done += 1
    return done


def test_no_single_fault_is_loaded_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest checkpoint is damaged; the one before is found, and a line says why."""
    assert loaded_silently(tmp_path, caplog, of_each=6, seed=0) == 240


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_single_fault_of_ten_thousand_is_loaded_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT2TRAIN_FAULTS: as many, in multiples of the 40 kinds and files."""
    seed = int.from_bytes(os.urandom(4), "big")
    of_each = int(os.environ.get("GPT2TRAIN_FAULTS", "10000")) // 40
    print(loaded_silently(tmp_path, caplog, of_each=of_each, seed=seed), "faults, none loaded silently")


def test_swaps_within_and_between_checkpoints_are_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 10, 20)
    newest = folder / "step_00000020"
    os.rename(newest / "weights_00000.safetensors", newest / "x")
    os.rename(newest / "moments_00000.safetensors", newest / "weights_00000.safetensors")
    os.rename(newest / "x", newest / "moments_00000.safetensors")
    assert newest_whole(tmp_path) == folder / "step_00000010"
    # A whole checkpoint under another step's name is not that step's.
    shutil.rmtree(newest)
    shutil.copytree(folder / "step_00000010", newest)
    with pytest.raises(CheckpointError, match="is of step_00000010"):
        resolve(newest)


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    folder = write(tmp_path, 10, 20)
    for step in folder.iterdir():
        (step / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*step_00000020.*step_00000010.*overwrite=true"):
        newest_whole(tmp_path)


class Explosive:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "file", ["weights_00000.safetensors", "moments_00000.safetensors", "state.json", "manifest.json"]
)
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, file: str) -> None:
    """Even when whoever planted it made every hash right."""
    bomb, payload = tmp_path / "exploded", pickle.dumps({"wte.weight": Explosive(tmp_path / "exploded")})
    pickle.loads(payload)  # the payload does work
    assert bomb.exists()
    bomb.unlink()

    newest = write(tmp_path, 10, 20) / "step_00000020"
    (newest / file).write_bytes(payload)
    if file != "manifest.json":
        forge(newest, file)
    torch.save(Explosive(bomb), newest / "optimizer.pt")
    assert newest_whole(tmp_path) == newest.with_name("step_00000010")
    for read in (read_weights, read_state):
        with contextlib.suppress(Exception):  # whatever they make of it, nothing is executed
            read(newest)
    with pytest.raises(CheckpointError):
        resolve(newest)
    assert not bomb.exists()


def forge(folder: Path, file: str) -> None:
    """Makes the manifest agree with a changed file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / file).read_bytes()
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, object]) -> None:
    manifest.pop("sha256", None)
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../escape": {"bytes": 1, "sha256": ""}}), "no plain file"),
        (lambda m: m["parameters"].update({"new.weight": {"part": 0, "shape": [4]}}), "does not hold new.weight"),
        (lambda m: m["parameters"]["ln_f.bias"].update(shape=[5]), r"does not hold ln_f.bias as fp32 \[5\]"),
        (lambda m: m["parameters"]["ln_f.bias"].update(part=1), "weights_00001.safetensors is not in"),
        (lambda m: m["files"].pop("state.json"), "state.json is not what"),
        (lambda m: m.update(version=2), "this program reads gpt2train checkpoint 1"),
        (lambda m: m.update(files=[]), "are no tables"),
        (lambda m: m["files"].update({"state.json": 3}), "does not say what it was"),
        (lambda m: m.pop("parameters"), "cannot be read"),
    ],
)
def test_manifests_that_are_well_sealed_but_wrong(tmp_path: Path, change: Callable[..., object], message: str) -> None:
    newest = write(tmp_path, 20) / "step_00000020"
    manifest = json.loads((newest / "manifest.json").read_text())
    change(manifest)
    seal(newest, manifest)
    with pytest.raises(CheckpointError, match=message):
        resolve(newest)


def test_leftovers_of_a_kill_are_swept_and_never_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    shutil.copytree(folder / "step_00000010", folder / ".step_00000020.tmp")
    shutil.copytree(folder / "step_00000010", folder / ".step_00000005.pruned")
    assert newest_whole(tmp_path) == folder / "step_00000010"
    write(tmp_path, 20)
    assert sorted(os.listdir(folder)) == ["step_00000010", "step_00000020"]


def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path: Path) -> None:
    """A real write error: the kernel refuses to let any file of the child grow beyond 300 bytes."""
    write(tmp_path, 10)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import torch; from gpt2train.checkpoint import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "t = torch.ones(500)\n"
        "try: save(Path(sys.argv[1]), 20, [('w', t, t, t)], {'step': 20})\n"
        "except Exception as e: print(type(e).__name__, e.exit_code, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "StorageError 4" in done.stdout, done.stderr
    assert "File too large); earlier checkpoints are intact, make room" in done.stdout
    found = newest_whole(tmp_path)
    assert found is not None
    assert found.name == "step_00000010"
    assert holds(found, 10)
    write(tmp_path, 20)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000010", "step_00000020"]


def test_reading_needs_no_deepspeed() -> None:
    code = "import sys, gpt2train.checkpoint; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_nth_and_the_best_stay(tmp_path: Path) -> None:
    losses = {10: 3.5, 20: 3.0, 30: 3.2, 40: None, 50: 3.1, 60: 3.3}
    for step, loss in losses.items():
        state = {"step": step, "model": {}, "validation_loss": loss}
        save(tmp_path, step, tensors(step), state, keep=checkpoint.Keep(last=1, every_steps=30, best=True))
        kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()}
        past = {s: v for s, v in losses.items() if s <= step}
        best = min((s for s, v in past.items() if v is not None), key=lambda s: losses[s])  # type: ignore[arg-type,return-value]
        assert kept == {step, best} | {s for s in past if s % 30 == 0}
    assert newest_whole(tmp_path, multiples_of=20) == tmp_path / "checkpoints" / "step_00000060"
    assert newest_whole(tmp_path, multiples_of=40) is None
