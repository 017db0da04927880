"""`torch.compile`, by `make soak`: a compiled run has the losses of the plain one, and goes on like any other.

Inductor makes C++ of each block and calls a compiler, which takes minutes in all; `make test` has everything else.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import cut, largest_difference, losses_of, play, settings, write_tokens

from gpt2train.config import AttentionKernel, ModelConfig
from gpt2train.model import GPT
from gpt2train.network import documents

STEPS, CUT = 20, 10


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor on a CPU needs g++")
def test_compiled_runs_have_the_losses_of_plain_ones_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    tokens = write_tokens(tmp_path / "tokens")
    often = {"steps": STEPS, "checkpoint__every_steps": CUT, "evaluate__every_steps": CUT}

    def job(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "train": settings(tokens, tmp_path / name, **often, **changes)}

    def again(name: str, **changes: Any) -> list[dict[str, Any]]:
        return [cut(tmp_path, name, f"{name} again", CUT), job(f"{name} again", **changes)]

    blocks, whole = {"compile": "blocks"}, {"compile": "model"}
    modern = {
        "model__positions": "rotary", "model__norm": "rms", "model__biases": False, "model__qk_norm": True,
        "model__activation": "relu2", "optimizer__name": "muon",
    }  # fmt: skip
    two = [
        *(job(f"plain{stage}", zero__stage=stage) for stage in (1, 3)),
        *(job(f"blocks{stage}", zero__stage=stage, **blocks) for stage in (1, 2, 3)),
        job("model1", zero__stage=1, **whole),
        # On a CPU there are no graphs to replay: that the way there works is all that is seen.
        job("graphs low", precision="bf16", compile_mode="reduce_overhead", **whole),
        job("plain low", precision="bf16", activation_checkpointing="full"),
        job("blocks low", precision="bf16", activation_checkpointing="full", **blocks),
        job("plain modern", **modern),
        job("blocks modern", **modern, **blocks),
        *again("blocks1", zero__stage=1, **blocks),
        *again("blocks3", zero__stage=3, **blocks),
    ]
    answers = play(tmp_path, [(2, two)], timeout_s=3000)
    assert all(answer["codes"] == [0, 0] for answer in answers.values()), answers
    for name, plain, near in (
        ("blocks1", "plain1", 1e-5), ("blocks2", "plain1", 1e-5), ("blocks3", "plain3", 1e-5),
        ("model1", "plain1", 1e-5), ("graphs low", "plain low", 5e-3),
        ("blocks low", "plain low", 5e-3), ("blocks modern", "plain modern", 1e-4),
    ):  # fmt: skip
        difference = largest_difference(losses_of(tmp_path / name), losses_of(tmp_path / plain))
        print(f"{name} and {plain} differ by {difference:.2g} at most")
        assert difference < near, name
    for name in ("blocks1", "blocks3"):
        assert losses_of(tmp_path / f"{name} again") == losses_of(tmp_path / name), name
    assert list((tmp_path / "inductor").rglob("*.so")), "nothing was compiled"


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor on a CPU needs g++")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when its compiler is first imported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and where it reads a Function
@pytest.mark.parametrize("how", ["model", "blocks"])
@pytest.mark.parametrize("within", [False, True])
def test_flex_attention_compiled_is_the_same_attention(
    how: str, within: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward alone: torch has no backward pass of it for a CPU. The mask is made within what is compiled, or not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(documents, "END_OF_TEXT", 7)
    config = ModelConfig(layers=2, channels=64, heads=2, context=256, vocabulary=301)
    x = torch.randint(0, 301, (3, 257), generator=torch.Generator().manual_seed(1))
    x[:, ::29] = 7
    plain = GPT(config, document_mask=within)
    flexible = GPT(config, document_mask=within, attention_kernel=AttentionKernel.flex)
    with torch.no_grad():
        for model in (plain, flexible):
            for parameter in model.parameters():
                parameter.mul_(4)
        if how == "model":
            loss = torch.compile(flexible)(x[:, :-1], x[:, 1:])
        else:
            for block in flexible.h:
                block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
            loss = flexible(x[:, :-1], x[:, 1:])
        torch.testing.assert_close(loss, plain(x[:, :-1], x[:, 1:]), rtol=1e-5, atol=1e-6)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
