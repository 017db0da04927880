"""µP: the standard parametrization at the base's width, and one that does not change with the width beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import lively, make_run
from training import TINY, Ranks, read_metrics, write_tokens

from data_pipeline.token_shards import TokenShards
from gpt2train.bounds import check
from gpt2train.config import (
    Activation,
    ModelConfig,
    Norm,
    OptimizerConfig,
    OptimizerName,
    Positions,
    TrainConfig,
)
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.errors import ConfigError
from gpt2train.generation.decoding import sample
from gpt2train.model import GPT, KeyValueCache
from gpt2train.mup import words
from gpt2train.optim import learning_rate, make_optimizer, parameter_groups, set_learning_rate
from gpt2train.optimizers.muon import Muon, share_whole
from gpt2train.release import nanochat
from gpt2train.release.config import ExportConfig
from gpt2train.release.export import export_run
from gpt2train.release.hf import architecture, load_model

BASE = ModelConfig(layers=2, channels=32, heads=4, context=16, vocabulary=128)
MODERN: dict[str, Any] = {
    "positions": Positions.rotary,
    "activation": Activation.relu2,
    "norm": Norm.rms,
    "biases": False,
    "qk_norm": True,
    "embedding_norm": True,
    "tied_head": False,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(config: ModelConfig, optimizer_config: OptimizerConfig, steps: int) -> GPT:
    """After `steps` updates on one batch, all at the peak rate."""
    model = GPT(config, seed=1)
    optimizer = make_optimizer(model, optimizer_config, torch.device("cpu"))
    if isinstance(optimizer, Muon):
        share_whole(optimizer, model.named_parameters())
    set_learning_rate(optimizer.param_groups, optimizer_config.lr)
    for _ in range(steps):
        rows = batch(config)
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def batch(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.vocabulary, (16, config.context + 1), generator=generator)


@pytest.mark.parametrize("name", OptimizerName)
@pytest.mark.parametrize("network", [{}, MODERN], ids=["gpt2", "modern"])
def test_at_the_base_s_width_it_is_the_standard_bit_for_bit(name: OptimizerName, network: dict[str, Any]) -> None:
    plain = replace(BASE, **network)
    with_mup = replace(plain, mup_base=32, mup_base_head=8)
    settings = OptimizerConfig(name=name, lr=0.01)
    one, other = trained(plain, settings, 3), trained(with_mup, settings, 3)
    for (name_of, weight), again in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, again), name_of
    assert torch.equal(one(batch(plain)[:, :-1]), other(batch(plain)[:, :-1]))
    assert not torch.equal(one.h[0].mlp.c_fc.weight, trained(plain, settings, 2).h[0].mlp.c_fc.weight), "it learned"


@pytest.mark.parametrize("heads_grow", [False, True], ids=["more heads", "larger heads"])
@pytest.mark.parametrize("network", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("name", OptimizerName)
def test_what_a_few_steps_make_of_activations_does_not_follow_the_width(
    name: OptimizerName, network: dict[str, Any], heads_grow: bool
) -> None:
    """The coordinate check of Yang et al. 2022, appendix D.1: mean |x| of what each block and the head give."""

    def coordinates(width: int, mup: bool) -> list[float]:
        config = replace(BASE, channels=16 * width, heads=2 if heads_grow else 2 * width, **network)
        config = replace(config, mup_base=16 if mup else 0, mup_base_head=8 if mup and heads_grow else 0)
        model = trained(config, OptimizerConfig(name=name, lr=0.02), 4)
        found: list[float] = []
        hooks = [b.register_forward_hook(lambda *a: found.append(a[2].abs().mean().item())) for b in model.h]
        with torch.no_grad():
            found.append(model(batch(config)[:, :-1]).abs().mean().item())
        for hook in hooks:
            hook.remove()
        return found

    widths = (1, 2, 4, 8)
    flat = [coordinates(width, True) for width in widths]
    growing = [coordinates(width, False) for width in widths]
    for place, sizes in enumerate(zip(*flat, strict=True)):
        assert max(sizes) / min(sizes) < 2.5, f"{place}: {sizes}"
        assert sizes[-1] < 1.1 * sizes[0], f"{place}: {sizes}"
    *blocks, logits = zip(*growing, strict=True)
    assert logits[-1] > 2.5 * logits[0], f"without µP they grow, or this check says nothing: {logits}"
    for sizes in [] if network else blocks:  # a norm of the embedding hides their growth
        assert sizes[-1] > 1.5 * sizes[0], sizes


def test_rates_and_decay_of_each_kind_of_parameter() -> None:
    model = GPT(replace(BASE, channels=128, tied_head=False, mup_base=32))
    for name, factor in ((OptimizerName.adamw, 4.0), (OptimizerName.muon, 2.0)):
        groups = parameter_groups(model.named_parameters(), OptimizerConfig(name=name, weight_decay=0.1), 4.0)
        by_kind = {(g["lr_ratio"], round(g["weight_decay"], 9)): len(g["params"]) for g in groups}
        assert by_kind == {
            (1 / factor, 0.1 * factor): 8,  # decay times rate stays
            (1.0, 0.1): 3,
            (1.0, 0.0): len(list(model.parameters())) - 11,
        }
    # An embedding that happens to learn at the blocks' rate keeps a decay of its own.
    settings = OptimizerConfig(embedding_lr_ratio=0.25)
    groups = parameter_groups(model.named_parameters(), settings, 4.0)
    assert sorted(g["weight_decay"] for g in groups if g["lr_ratio"] == 0.25) == pytest.approx([0.1, 0.4])


def test_initial_values() -> None:
    standard, wide = GPT(replace(BASE, channels=512)), GPT(replace(BASE, channels=512, mup_base=32))
    for (name, one), other in zip(standard.named_parameters(), wide.parameters(), strict=True):
        factor = 0.25 if name.startswith("h.") and one.ndim == 2 else 1.0
        torch.testing.assert_close(other, one * factor, rtol=1e-6, atol=0, msg=name)


LARGER_HEADS = replace(BASE, channels=48, heads=2, mup_base=16, mup_base_head=6, vocabulary=50_257, context=24)


def test_scores_and_logits_with_the_cache_are_those_without() -> None:
    model = lively(LARGER_HEADS)
    x = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        whole = model(x)
        cache = KeyValueCache(LARGER_HEADS, batch=2)
        parts = [model(piece, cache=cache) for piece in x.split([10, 1, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # transformers announces its own changes
@pytest.mark.parametrize(
    "config",
    [
        LARGER_HEADS,
        ModelConfig("x", 2, 48, 2, 24, tied_head=False, logit_softcap=15.0, mup_base=16, **nanochat.NETWORK),
    ],
    ids=["gpt2", "nanochat"],
)
def test_an_export_holds_the_multipliers_in_its_weights(config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference", minversion="5.0")
    out = tmp_path / "out"
    assert export_run(ExportConfig(run=str(make_run(tmp_path / "run", config)), to=str(out))) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    x = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(7))
    model = lively(config)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-4)
        assert (model(x) - lively(replace(config, mup_base=0, mup_base_head=0))(x)).abs().max() > 0.01
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    prompt = x[0, :8].tolist()
    assert list(sample(load_model(out), prompt, **options)) == list(sample(model, prompt, **options))


def test_what_no_weight_can_hold_is_not_exported(tmp_path: Path) -> None:
    modern = ModelConfig("x", 2, 48, 2, 24, mup_base=16, mup_base_head=6, **nanochat.NETWORK)
    with pytest.raises(ConfigError) as caught:
        architecture(modern)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["model.mup_base=16", "model.mup_base_head=6"]
    assert architecture(replace(modern, tied_head=False, mup_base_head=0)) == "nanochat"


def test_wrong_settings_and_what_is_told() -> None:
    config = TrainConfig(model=replace(BASE, mup_base=-1, mup_base_head=-2))
    assert len([f for f in check(config) if f.startswith("model.mup_base")]) == 2
    config.model = replace(BASE, mup_base_head=8)
    assert [f for f in check(config) if "needs model.mup_base" in f]
    config.model = replace(BASE, mup_base=16, mup_base_head=32)
    assert [f for f in check(config) if f.startswith("model.mup_base_head=32: a head of")]
    assert words(BASE, OptimizerConfig()) == []
    (line,) = words(replace(BASE, channels=128, mup_base=32, mup_base_head=8), OptimizerConfig(lr=0.004))
    assert line == (
        "µP from 32 channels: the blocks' matrices learn at 0.25 × optimizer.lr = 0.001 and start at 0.5 × their "
        "size, logits × 0.25, attention scores × 0.5"
    )


# -------------------------------------------------------------------------------------------------- through DeepSpeed

STEPS, CUT = 8, 4
MUP = {"model.mup_base": 8, "model.mup_base_head": 4, "optimizer.lr": 1e-2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`z1n2` is ZeRO 1 on 2 ranks, `m` with Muon; a `+` went on from step CUT, at the stage and ranks named last."""
    folder = tmp_path_factory.mktemp("mup")
    tokens = write_tokens(folder / "tokens")

    def job(name: str, stage: int, **more: Any) -> dict[str, Any]:
        settings = {"data.path": str(tokens), "run_dir": str(folder / name), "steps": STEPS, "zero.stage": stage}
        fast = {"evaluate.every_steps": 0, "checkpoint.every_steps": CUT}
        return {"train": TINY | MUP | settings | fast | more}

    def again(name: str, of: str, stage: int) -> list[dict[str, Any]]:
        return [{"cut": [str(folder / of), str(folder / name), CUT]}, job(name, stage)]

    two = [job("z1n2", 1), job("z2n2", 2), job("z3n2", 3), *again("z1n2+z3", "z1n2", 3), *again("z3n2+", "z3n2", 3)]
    one = [
        job("z0n1", 0),
        *again("z3n2+z1n1", "z3n2", 1),
        job("m0n1", 0, **{"optimizer.name": "muon"}),
        {"cut": [str(folder / "z0n1"), str(folder / "other"), CUT]},
        job("other", 0, **{"model.mup_base": 4}),
    ]
    for ranks, jobs in ((2, two), (1, one)):
        started = Ranks(folder / f"ranks{ranks}", jobs, ranks)
        codes = started.wait(280)
        assert set(codes) == {0 if ranks == 2 else 2}, started.stderr()[-3000:]
        assert [a["code"] for a in started.answers()] == [0] * (len(jobs) - (ranks == 1)) + [2] * (ranks == 1)
    (folder / "refused").write_text(started.answers()[-1]["message"])
    return folder


def losses(folder: Path) -> list[float]:
    found, _ = read_metrics(folder)
    assert list(found) == list(range(1, STEPS + 1))
    return list(found.values())


@pytest.fixture(scope="module")
def by_hand(runs: Path) -> list[float]:
    """Losses of a plain PyTorch loop: initial values, rates and decay of µP written out for twice the width."""
    shards = TokenShards.open(str(runs / "tokens"))
    config = ModelConfig("tiny", layers=2, channels=16, heads=2, context=16, vocabulary=shards.vocabulary)
    o = OptimizerConfig(lr=1e-2, warmup_steps=5)
    windows = TokenWindows(shards.split("train"), config.context)
    order = BatchOrder(1337, len(windows), 8)
    model = GPT(config, seed=1337)
    hidden = [p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2]
    with torch.no_grad():
        for parameter in hidden:
            parameter.div_(math.sqrt(2))
    for block in model.h:
        block.attn.scale = math.sqrt(4) / 8
    rest = [p for name, p in model.named_parameters() if not name.startswith("h.") and p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": hidden, "weight_decay": 0.2, "part": 0.5},
            {"params": rest, "weight_decay": 0.1, "part": 1.0},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "part": 1.0},
        ],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
    )
    found = []
    for step in range(1, STEPS + 1):
        rows = torch.from_numpy(windows.read(order.indices(step - 1)))
        logits = model(rows[:, :-1]) / 2
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, STEPS) * group["part"]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.soak
@pytest.mark.parametrize("name", ["z0n1", "z1n2", "z2n2", "z3n2", "z1n2+z3", "z3n2+", "z3n2+z1n1"])
def test_losses_are_those_of_a_plain_loop(runs: Path, by_hand: list[float], name: str) -> None:
    assert losses(runs / name) == pytest.approx(by_hand, abs=1e-5)
    assert by_hand[0] - by_hand[-1] > 0.03, "it learns, or this says nothing"


@pytest.mark.soak
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(runs: Path) -> None:
    assert losses(runs / "z3n2+") == losses(runs / "z3n2")
    assert losses(runs / "m0n1") != losses(runs / "z0n1")
    assert "model.mup_base: 8" not in (runs / "refused").read_text()
    assert "model.mup_base=4: the run in" in (runs / "refused").read_text(), "another base is another run"
    assert "mup_base: 8" in (runs / "z0n1" / "config.yaml").read_text()
