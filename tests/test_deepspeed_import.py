"""Checkpoints that a plain DeepSpeed loop wrote: every number arrives, nothing is executed, training goes on."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import TINY, Ranks, read_metrics, write_tokens

from data_pipeline.tokenizer import VOCABULARY
from gpt2train import checkpoint
from gpt2train.errors import CheckpointError, ConfigError
from gpt2train.release.config import ImportConfig
from gpt2train.release.deepspeed_files import is_deepspeed_folder, read_deepspeed_folder
from gpt2train.release.export import import_model

LOOPS = {"hf zero1": ("hf", 1, "fp32"), "linear zero2 bf16": ("linear", 2, "bf16"), "hf zero3": ("hf", 3, "fp32")}
STEPS = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks, one a loop; beside each, what DeepSpeed says the whole state is."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("deepspeed")
    jobs = [
        {"loop": {"kind": kind, "stage": stage, "precision": precision, "steps": STEPS, "to": str(folder / name)}}
        for name, (kind, stage, precision) in LOOPS.items()
    ]
    ranks = Ranks(folder / "start", jobs, 2)
    assert ranks.wait(400) == [0, 0], ranks.stderr()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LOOPS)
def test_every_number_arrives(saved: Path, tmp_path: Path, name: str) -> None:
    assert is_deepspeed_folder(saved / name)
    assert import_model(ImportConfig(path=str(saved / name), to=str(tmp_path / "run"), heads=2)) == 0
    folder = checkpoint.resolve(tmp_path / "run")
    assert folder.name == f"step_{STEPS:08d}"
    state = checkpoint.read_state(folder)
    assert (state["step"], state["updates"], state["tokens"]) == (STEPS, STEPS, STEPS * 4 * 16)
    assert (state["model"]["layers"], state["model"]["heads"], state["model"]["vocabulary"]) == (2, 2, VOCABULARY)
    whole = load_file(saved / name / "whole.safetensors")
    names = {key.partition("/")[2] for key in whole}
    seen = 0
    with checkpoint.Reader(folder) as read:
        for theirs in names:
            ours = theirs.removeprefix("transformer.")
            for kind, got in zip(("weight", "exp_avg", "exp_avg_sq"), read(ours), strict=True):
                expected = whole[f"{kind}/{theirs}"]
                if name.startswith("hf") and expected.ndim == 2 and ".c_" in ours:
                    expected = expected.T
                rows = min(len(got), len(expected))
                assert torch.equal(got[:rows], expected[:rows]), (kind, ours)
                assert not got[VOCABULARY:].any()
                seen += 1
        assert seen == 3 * len(read._tensors.parameters)
    assert any(whole[f"exp_avg/{n}"].any() for n in names), "moments that are all zero would show nothing"


@pytest.mark.slow
def test_training_goes_on_from_the_step_it_was_saved_at(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_model(ImportConfig(path=str(saved / "hf zero3"), to=str(run), heads=2))
    tokens = write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    settings = {**TINY, "model.name": "imported", "model.vocabulary": VOCABULARY, "data.path": str(tokens)}
    settings |= {"run_dir": str(run), "steps": STEPS + 2}
    ranks = Ranks(tmp_path / "start", [{"train": settings}], 1)
    assert ranks.wait(240) == [0], ranks.stderr()
    losses, _ = read_metrics(run)
    assert list(losses) == [STEPS + 1, STEPS + 2]
    assert all(9 < loss < 12 for loss in losses.values())
    state = json.loads((run / "checkpoints" / f"step_{STEPS + 2:08d}" / "state.json").read_text())
    assert state["updates"] == STEPS + 2


class Explosive:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def small(folder: Path) -> Path:
    """The least that looks like DeepSpeed's: one rank, one parameter."""
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    torch.save(
        {"param_shapes": [{"wte.weight": torch.Size([2])}], "global_steps": 1, "dp_world_size": 1},
        tag / "mp_rank_00_model_states.pt",
    )
    flat = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    state = {"fp32_flat_groups": [torch.ones(2)], "optimizer_state_dict": {"state": {0: flat}}}
    torch.save({"optimizer_state_dict": state}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return tag


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    tag, bomb = small(tmp_path / "ds"), tmp_path / "exploded"
    assert read_deepspeed_folder(tmp_path / "ds").weights["wte.weight"].tolist() == [1.0, 1.0]
    pickle.loads(pickle.dumps(Explosive(bomb)))  # the payload does work
    bomb.unlink()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        whole = (tag / name).read_bytes()
        torch.save({"optimizer_state_dict": Explosive(bomb)}, tag / name)
        with pytest.raises(CheckpointError, match="nothing of it was executed"):
            read_deepspeed_folder(tmp_path / "ds")
        (tag / name).write_bytes(pickle.dumps(Explosive(bomb)))
        with pytest.raises(CheckpointError, match="mp_rank_00"):
            read_deepspeed_folder(tmp_path / "ds")
        (tag / name).write_bytes(whole)
    assert not bomb.exists()


@pytest.mark.parametrize(
    "fault", ["no optimizer", "a rank lost", "truncated", "latest escapes", "split by tensor", "empty"]
)
def test_folders_that_cannot_be_read_say_why(tmp_path: Path, fault: str) -> None:
    tag = small(tmp_path / "ds")
    optimizer = tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    expected = {
        "no optimizer": (ConfigError, "as ZeRO 0 writes it"),
        "a rank lost": (CheckpointError, r"1 ranks wrote it, and the optimizer files are of ranks \[1\]"),
        "truncated": (CheckpointError, "is damaged"),
        "latest escapes": (CheckpointError, "which is no folder beside it"),
        "split by tensor": (ConfigError, "split over several GPUs"),
        "empty": (ConfigError, r"holds no \*_model_states.pt"),
    }[fault]
    if fault == "no optimizer":
        optimizer.unlink()
    elif fault == "a rank lost":
        optimizer.rename(tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    elif fault == "truncated":
        optimizer.write_bytes(optimizer.read_bytes()[:300])
    elif fault == "latest escapes":
        (tmp_path / "ds" / "latest").write_text("../ds/global_step1")
    elif fault == "split by tensor":
        shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    else:
        shutil.rmtree(tag)
        tag.mkdir()
    with pytest.raises(expected[0], match=expected[1]):
        read_deepspeed_folder(tmp_path / "ds")
