"""Muon: against torch's own, against a loop written by hand, on any number of ranks and any ZeRO stage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)
from torch import Tensor
from training import TINY, Ranks, read_metrics, write_tokens

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import VOCABULARY
from gpt2train.bounds import check
from gpt2train.config import ModelConfig, OptimizerConfig, OptimizerName, Positions, TrainConfig
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.model import GPT
from gpt2train.optim import learning_rate, make_optimizer, parameter_groups
from gpt2train.optimizers.muon import Muon, orthogonalize, orthogonalize_all, share_whole
from gpt2train.optimizers.sharing import Matrix, Part, Sharing, matrices_of

MODERN: dict[str, Any] = {
    "recipe": "modern",
    "model.positions": "rotary",
    "model.activation": "relu2",
    "model.norm": "rms",
    "model.biases": False,
    "model.qk_norm": True,
    "model.embedding_norm": True,
    "model.tied_head": False,
    "model.logit_softcap": 15.0,
    "optimizer.name": "muon",
    "optimizer.lr": 1e-2,
    "optimizer.schedule": "wsd",
    "optimizer.head_lr_ratio": 0.5,
}
STEPS, CUT = 10, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 32), (96, 24), (24, 96)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    (got,) = orthogonalize(matrix[None])
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.6, "what the five steps of these coefficients reach"
    assert values.max() < 1.3
    assert before.max() / before.min() > 1.5
    within = u.T @ got @ v.T
    assert (within - within.diagonal().diag()).abs().max() < 1e-3, "in the basis of the singular vectors it is diagonal"


def test_shapes_are_batched_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [random(*shape, seed=n) for n, shape in enumerate([(8, 8), (4, 12), (8, 8), (12, 4), (8, 8)])]
    alone = [orthogonalize(m[None])[0] for m in matrices]
    for numbers in (1, 128, 1 << 20):
        monkeypatch.setattr("gpt2train.optimizers.muon.BATCH_NUMBERS", numbers)
        for one, other in zip(alone, orthogonalize_all(matrices), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon comes with torch 2.9")
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (20, 20)])
def test_updates_are_those_of_torch_s_muon(shape: tuple[int, int]) -> None:
    """torch's works in bf16, whole parameters, with the same momentum and the scale of Liu et al."""
    ours, theirs = (torch.nn.Parameter(random(*shape)) for _ in range(2))
    group = {"params": [ours], "muon": True, "weight_decay": 0.1}
    mine = Muon([group], lr=0.02, betas=(0.9, 0.95), eps=1e-8, momentum=0.9, dtype=torch.bfloat16)
    share_whole(mine, [("h.0.mlp.c_fc.weight", ours)])
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        ours.grad, theirs.grad = (random(*shape, seed=step + 1) for _ in range(2))
        before = theirs.detach().clone()
        mine.step()
        other.step()
        torch.testing.assert_close(mine.state[ours]["exp_avg"], other.state[theirs]["momentum_buffer"])
        difference = (ours - theirs).norm() / (theirs - before).norm()
        assert difference < 0.02, "bf16 has three digits, and five steps of products round differently in batches"


def test_all_but_matrices_get_adamw() -> None:
    """Bit for bit torch's AdamW, and every parameter is in one group."""
    config = ModelConfig(layers=2, channels=16, heads=2, context=8, vocabulary=100)
    settings = OptimizerConfig(name=OptimizerName.muon, lr=1e-2, embedding_lr_ratio=3.0)
    model, reference = GPT(config, seed=1), GPT(config, seed=1)
    groups = parameter_groups(model.named_parameters(), settings)
    assert sorted(len(g["params"]) for g in groups if g["muon"]) == [4 * config.layers]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    assert isinstance(optimizer, Muon)
    share_whole(optimizer, model.named_parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [reference.wte.weight, reference.wpe.weight], "lr": 3e-2, "weight_decay": 0.1},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_ratio"]
    for step in range(3):
        for place, (one, other) in enumerate(zip(model.parameters(), reference.parameters(), strict=True)):
            one.grad = other.grad = random(*one.shape, seed=100 * step + place)
        optimizer.step()
        plain.step()
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, reference.get_parameter(name))
        assert same == (not (name.startswith("h.") and parameter.ndim == 2)), name


def test_queries_keys_and_values_are_three_matrices() -> None:
    found = matrices_of(["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"], [(12, 4), (4, 4)])
    assert found == [Matrix(0, 0, 4, 4), Matrix(0, 16, 4, 4), Matrix(0, 32, 4, 4), Matrix(1, 0, 4, 4)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("by_parameter", [False, True])
def test_matrices_come_together_and_go_back(ranks: int, by_parameter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as ZeRO 1 and 2 cut (end to end) or as ZeRO 3 does (each parameter), letters passed by hand."""
    names, shapes = ["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"], [(9, 3), (8, 2), (2, 7)]
    matrices = matrices_of(names, shapes)
    values = [random(*shape, seed=n) for n, shape in enumerate(shapes)]
    flats, parts = cut(values, ranks, by_parameter)
    letters: dict[tuple[int, int], Tensor] = {}
    everyone = [Sharing(matrices, parts, rank) for rank in range(ranks)]

    def exchange(calls: list[Any]) -> list[Tensor]:
        """Runs what each rank does up to the exchange, passes the letters, runs it again to the end."""
        rank_now = [0]

        def post(received: Tensor, send: Tensor, sizes_in: list[int], sizes_out: list[int]) -> None:
            for to, letter in enumerate(send.split(sizes_out)):
                letters[rank_now[0], to] = letter.clone()
            pieces = [letters.get((of, rank_now[0]), torch.zeros(n)) for of, n in enumerate(sizes_in)]
            received.copy_(torch.cat(pieces))

        monkeypatch.setattr(torch.distributed, "all_to_all_single", post)
        letters.clear()
        for _ in range(2):
            done = []
            for rank, call in enumerate(calls):
                rank_now[0] = rank
                done.append(call())
        return done

    whole = exchange([lambda s=s, f=f: s.gather(f) for s, f in zip(everyone, flats, strict=True)])
    expected = [*values[0].view(3, 3, 3), values[1], values[2]]
    together = [m for of_rank in whole for m in of_rank]
    assert len(together) == len(expected), "each matrix is on one rank"
    assert all(any(torch.equal(m, e) for m in together) for e in expected)
    back = exchange(
        [
            lambda s=s, w=w, f=f: s.scatter([m * 2 for m in w], like=f)
            for s, w, f in zip(everyone, whole, flats, strict=True)
        ]
    )
    for flat, twice in zip(flats, back, strict=True):
        torch.testing.assert_close(twice, flat * 2, rtol=0, atol=0)


def cut(values: list[Tensor], ranks: int, by_parameter: bool) -> tuple[list[Tensor], list[list[Part]]]:
    if by_parameter:
        flats: list[list[Tensor]] = [[] for _ in range(ranks)]
        parts: list[list[Part]] = [[] for _ in range(ranks)]
        for place, value in enumerate(values):
            piece = -(-value.numel() // ranks)
            padded = torch.cat([value.flatten(), torch.zeros(piece * ranks - value.numel())])
            for rank in range(ranks):
                offset = sum(len(f) for f in flats[rank])
                numbers = min(max(value.numel() - rank * piece, 0), piece)
                parts[rank].append(Part(place, rank * piece, numbers, offset))
                flats[rank].append(padded[rank * piece : (rank + 1) * piece])
        return [torch.cat(f) for f in flats], parts
    whole = torch.cat([value.flatten() for value in values])
    piece = -(-len(whole) // ranks)
    starts = [0, *itertools.accumulate(value.numel() for value in values)]
    parts = []
    for rank in range(ranks):
        mine = []
        for place, (start, stop) in enumerate(itertools.pairwise(starts)):
            first, last = max(start, rank * piece), min(stop, (rank + 1) * piece)
            if first < last:
                mine.append(Part(place, first - start, last - first, first - rank * piece))
        parts.append(mine)
    padded = torch.cat([whole, torch.zeros(piece * ranks - len(whole))])
    return list(padded.split(piece)), parts


# ----------------------------------------------------------------------------------------------- through DeepSpeed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a modern model by name: `z1n2` is ZeRO 1 on 2 ranks in fp32, `b2n1` bf16; a `+` went on from step CUT."""
    folder = tmp_path_factory.mktemp("muon")
    tokens = write_tokens(folder / "tokens")

    def job(name: str, stage: int, **more: Any) -> dict[str, Any]:
        settings = {"data.path": str(tokens), "run_dir": str(folder / name), "steps": STEPS, "zero.stage": stage}
        fast = {"evaluate.every_steps": STEPS, "checkpoint.every_steps": CUT}
        return {"train": TINY | MODERN | settings | fast | more}

    def again(name: str, of: str, stage: int, **more: Any) -> list[dict[str, Any]]:
        return [{"cut": [str(folder / of), str(folder / name), CUT]}, job(name, stage, **more)]

    text = write_tokens(folder / "text", vocabulary=VOCABULARY)  # where documents end, the model sees by GPT-2's token
    low = {"precision": "bf16", "data.document_mask": True, "activation_checkpointing": "full"}
    low |= {"data.path": str(text), "model.vocabulary": VOCABULARY}
    two = [
        *(job(f"z{stage}n2", stage) for stage in (1, 2, 3)),
        job("b1n2", 1, **low),
        *again("z1n2+", "z1n2", 1),
        *again("z1n2+z3", "z1n2", 3),
        *again("b1n2+", "b1n2", 1, **low),
    ]
    one = [job("z0n1", 0), job("b2n1", 2, **low), *again("z3n2+z1n1", "z3n2", 1)]
    for ranks, jobs in ((2, two), (1, one)):
        started = Ranks(folder / f"ranks{ranks}", jobs, ranks)
        assert started.wait(280) == [0] * ranks, started.stderr()[-3000:]
    return folder


def losses(folder: Path) -> list[float]:
    found, _ = read_metrics(folder)
    assert list(found) == list(range(1, STEPS + 1))
    return list(found.values())


@pytest.fixture(scope="module")
def by_hand(runs: Path) -> list[float]:
    """Losses of a plain PyTorch loop whose Muon is written out: one matrix at a time, nothing shared with ours."""
    merged = OmegaConf.structured(TrainConfig)
    for name, value in (TINY | MODERN).items():
        OmegaConf.update(merged, name, value)
    config: TrainConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    o = config.optimizer
    windows = TokenWindows(TokenShards.open(str(runs / "tokens")).split("train"), config.model.context)
    order = BatchOrder(config.seed, len(windows), config.batch.sequences)
    model = GPT(config.model, seed=config.seed)
    rest = [(name, p) for name, p in model.named_parameters() if not name.startswith("h.")]
    adam = torch.optim.AdamW(
        [{"params": [p], "ratio": o.head_lr_ratio if name == "lm_head.weight" else 1.0} for name, p in rest],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
    )
    momenta: dict[str, Tensor] = {}
    found = []
    for step in range(1, STEPS + 1):
        rows = torch.from_numpy(windows.read(order.indices(step - 1)))
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        lr = learning_rate(o, step, STEPS)
        for group in adam.param_groups:
            group["lr"] = lr * group["ratio"]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith("h."):
                    continue
                assert p.grad is not None
                momentum = momenta.setdefault(name, torch.zeros_like(p))
                momentum.mul_(o.muon_momentum).add_(p.grad, alpha=1 - o.muon_momentum)
                ahead = (1 - o.muon_momentum) * p.grad + o.muon_momentum * momentum
                p.mul_(1 - lr * o.weight_decay)
                for target, matrix in zip(*(t.chunk(3) if "c_attn" in name else [t] for t in (p, ahead)), strict=True):
                    x = matrix / matrix.norm()
                    for _ in range(5):
                        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
                    target.sub_(lr * 0.2 * math.sqrt(max(x.shape)) * x)
        adam.step()
        model.zero_grad()
        adam.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z0n1", "z1n2", "z2n2", "z3n2"])
def test_losses_are_those_of_a_plain_loop(runs: Path, by_hand: list[float], name: str) -> None:
    assert losses(runs / name) == pytest.approx(by_hand, abs=1e-5)
    assert by_hand[0] - by_hand[-1] > 0.03, "it learns, or this says nothing"


@pytest.mark.slow
def test_bf16_is_within_its_noise(runs: Path) -> None:
    assert losses(runs / "b2n1") == pytest.approx(losses(runs / "b1n2"), abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z1n2", "b1n2"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(runs: Path, name: str) -> None:
    assert losses(runs / f"{name}+") == losses(runs / name)
    last = f"checkpoints/step_{STEPS:08d}"
    hashes = [json.loads((runs / run / last / "manifest.json").read_text())["files"] for run in (name, f"{name}+")]
    for file in hashes[0]:
        if file.endswith(".safetensors"):
            assert hashes[0][file] == hashes[1][file], file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z1n2+z3", "z3n2+z1n1"])
def test_a_checkpoint_loads_at_any_layout(runs: Path, name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / name.split("+")[0]), abs=1e-5)


@pytest.mark.slow
def test_checkpoints_hold_one_moment_for_muon(runs: Path) -> None:
    from safetensors import safe_open

    folder = runs / "z1n2" / "checkpoints" / f"step_{STEPS:08d}"
    held = set()
    for path in folder.glob("moments_*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= set(file.keys())
    assert {"exp_avg/h.0.mlp.c_fc.weight", "exp_avg/wte.weight", "exp_avg_sq/wte.weight"} <= held
    assert not [name for name in held if name.startswith("exp_avg_sq/h.")]


def test_wrong_settings_are_told_together() -> None:
    config = TrainConfig()
    config.data.path, config.run_dir = "tokens", "run"
    o, m = config.optimizer, config.model
    o.muon_momentum, o.embedding_lr_ratio, o.head_lr_ratio, o.cooldown = 1.0, 0.0, 2.0, 0.0
    m.logit_softcap, m.channels, m.heads = -1.0, 27, 9
    m.positions = Positions.rotary
    faults = "\n".join(check(config))
    for name in (
        "muon_momentum=1.0",
        "embedding_lr_ratio=0.0",
        "head_lr_ratio=2.0",
        "cooldown=0.0",
        "logit_softcap=-1.0",
    ):
        assert name in faults
    assert "model.positions=rotary: turns pairs" in faults
