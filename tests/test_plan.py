"""The plan: parameter counts that are exact, bytes that torch really takes, a choice that is used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2train import engine, model
from gpt2train.bounds import check
from gpt2train.cli import main
from gpt2train.compose import CONFIG_FOLDER, choices, compose
from gpt2train.config import (
    ActivationCheckpointing,
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerName,
    Precision,
    TrainConfig,
    flops_per_token,
    parameter_count,
)
from gpt2train.errors import ConfigError
from gpt2train.network import loss
from gpt2train.optimizers import muon
from gpt2train.planning import memory as planned_memory
from gpt2train.planning.choose import applied, best, host_bytes, misfit, options, planned_ranks, with_kept
from gpt2train.planning.config import PlanConfig
from gpt2train.planning.forecast import forecast, utilization
from gpt2train.planning.memory import GIB, memory
from gpt2train.planning.outcome import Outcome
from gpt2train.planning.table import summary
from tests.allocations import Allocations

GROUPS = CONFIG_FOLDER / "train"
PAPER = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "full": 1_557_611_200}


def settings(*overrides: str) -> TrainConfig:
    config: TrainConfig = compose(TrainConfig, overrides, groups=GROUPS)
    return config


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_sizes_to_the_parameter(name: str) -> None:
    config = settings(f"model={name}").model
    with torch.device("meta"):
        blocks = [model.Block(config) for _ in range(config.layers)]
    body = sum(p.numel() for block in blocks for p in block.parameters())
    embeddings = (config.vocabulary + config.context) * config.channels
    assert parameter_count(config) == embeddings + body + 2 * config.channels == PAPER[name]


@pytest.mark.parametrize("pad", [1, 64, 128])
def test_padding_counts_in_memory_alone(pad: int) -> None:
    config = ModelConfig(layers=2, channels=64, heads=2, context=32, vocabulary=1001, pad_vocabulary_to=pad)
    held = sum(p.numel() for p in model.GPT(config).parameters())
    assert parameter_count(config, padded=True) == held
    assert held - parameter_count(config) == (-1001 % pad) * 64


def test_what_is_kept_equal_by_hand() -> None:
    """The plan cannot import torch, so it repeats what model.py and engine.py say."""
    assert planned_memory.LOSS_CHUNK_POSITIONS == loss.CHUNK_POSITIONS
    assert planned_memory.MUON_BATCH == muon.BATCH_NUMBERS
    mine = (planned_memory.BUCKETS, planned_memory.MIN_BUCKET, planned_memory.MAX_BUCKET)
    assert mine == (engine.BUCKETS, engine.MIN_BUCKET, engine.MAX_BUCKET)
    config = settings("model=medium")
    made = engine.deepspeed_config(config, 8)["zero_optimization"]["reduce_bucket_size"]
    assert planned_memory.reduce_bucket(config) == made


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", ActivationCheckpointing)
@pytest.mark.parametrize(
    ("layers", "channels", "context", "micro", "vocabulary"),
    [(2, 64, 256, 12, 512), (6, 96, 128, 8, 2000), (3, 64, 256, 10, 8000)],
)
def test_a_pass_takes_what_is_planned(
    layers: int,
    channels: int,
    context: int,
    micro: int,
    vocabulary: int,
    policy: ActivationCheckpointing,
    precision: torch.dtype,
) -> None:
    pass_as_planned(ModelConfig("x", layers, channels, channels // 32, context, vocabulary), micro, policy, precision)


def pass_as_planned(shape: ModelConfig, micro: int, policy: ActivationCheckpointing, precision: torch.dtype) -> None:
    """Forward and backward of the model alone, by torch's own allocator; the optimizer's part is left out."""
    config = TrainConfig(model=shape, activation_checkpointing=policy, batch=BatchConfig(sequences=micro, micro=micro))
    config.zero.stage = 0
    config.precision = Precision.bf16 if precision is torch.bfloat16 else Precision.fp32
    expected = memory(config, 1, on_gpu=False)
    network = model.GPT(shape, activation_checkpointing=policy).to(precision)
    tokens = torch.randint(0, shape.vocabulary, (micro, shape.context + 1))
    with Allocations() as made:
        network(tokens[:, :-1], tokens[:, 1:]).backward()
    assert made.peak == pytest.approx(expected.total - expected.weights - expected.master - expected.moments, rel=0.05)


@pytest.mark.parametrize("policy", ActivationCheckpointing)
@pytest.mark.parametrize(
    ("shape", "micro", "precision"),
    [
        (ModelConfig("x", 4, 64, 2, 256, 512), 6, torch.float32),
        pytest.param(ModelConfig("x", 4, 64, 2, 256, 512), 12, torch.bfloat16, marks=pytest.mark.soak),
        (ModelConfig("x", 6, 96, 3, 128, 2000), 4, torch.bfloat16),
    ],
)
def test_a_pass_of_a_modern_network_takes_what_is_planned(
    shape: ModelConfig, micro: int, precision: torch.dtype, policy: ActivationCheckpointing
) -> None:
    sizes = {name: getattr(shape, name) for name in ("layers", "channels", "heads", "context", "vocabulary")}
    pass_as_planned(replace(settings("recipe=modern").model, **sizes), micro, policy, precision)


def test_muon_keeps_one_moment() -> None:
    config = settings("model=large", "optimizer.name=muon", "cluster=8xh100")
    adamw = replace(config, optimizer=replace(config.optimizer, name=OptimizerName.adamw))
    hidden = config.model.layers * 12 * config.model.channels**2
    assert memory(adamw, 8).moments - memory(config, 8).moments == 4 * hidden / 8
    smaller, larger = forecast(config, 8), forecast(adamw, 8)
    assert smaller is not None
    assert larger is not None
    assert larger.checkpoint_bytes - smaller.checkpoint_bytes == 4 * 4 * hidden


ADAMW, MUON = settings(), settings("recipe=modern")
ENGINE_CASES = [
    (0, Precision.fp32, ActivationCheckpointing.none, 2, 4, ADAMW),
    (2, Precision.bf16, ActivationCheckpointing.selective, 2, 4, ADAMW),
    (3, Precision.bf16, ActivationCheckpointing.none, 2, 1, MUON),
    *(
        pytest.param(*case, marks=pytest.mark.soak)
        for case in (
            (1, Precision.bf16, ActivationCheckpointing.full, 2, 4, ADAMW),
            (3, Precision.bf16, ActivationCheckpointing.none, 2, 4, ADAMW),
            (1, Precision.fp32, ActivationCheckpointing.selective, 2, 4, ADAMW),
            (1, Precision.fp32, ActivationCheckpointing.none, 2, 1, MUON),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when its compiler is first imported
@pytest.mark.parametrize(("stage", "precision", "policy", "accumulated", "micro", "recipe"), ENGINE_CASES)
def test_a_step_of_the_engine_takes_what_is_planned(
    stage: int,
    precision: Precision,
    policy: ActivationCheckpointing,
    accumulated: int,
    micro: int,
    recipe: TrainConfig,
) -> None:
    """Everything that DeepSpeed holds at the worst moment of a step, on one rank."""
    from gpt2train import distributed

    sizes = {"layers": 6, "channels": 256, "heads": 8, "context": 256, "vocabulary": 2000}
    config = TrainConfig(model=replace(recipe.model, **sizes), precision=precision, optimizer=recipe.optimizer)
    config.zero.stage, config.activation_checkpointing = stage, policy
    config.batch = BatchConfig(sequences=micro * accumulated, micro=micro)
    world = distributed.start(config.device, 60.0)
    tokens = torch.randint(0, 2000, (micro, 257))

    def step() -> None:
        for _ in range(accumulated):
            loss = made_engine(tokens[:, :-1], tokens[:, 1:])
            made_engine.backward(loss)
            del loss
            made_engine.step()

    with Allocations() as before:
        made_engine = engine.build(config, world)
        step()  # DeepSpeed makes some of what it keeps only now
    with Allocations() as during:
        step()
    expected = memory(config, 1, on_gpu=False).total
    assert before.live + during.peak == pytest.approx(expected, rel=0.05)


def test_memory_grows_and_shrinks_where_it_must() -> None:
    config = settings("model=large", "batch.micro=8")
    total = {}
    for stage in (1, 2):
        for policy in ActivationCheckpointing:
            tried = replace(config, zero=replace(config.zero, stage=stage), activation_checkpointing=policy)
            total[stage, policy] = memory(tried, 8)
    none, selective, full = (
        ActivationCheckpointing.none,
        ActivationCheckpointing.selective,
        ActivationCheckpointing.full,
    )
    assert total[1, none].total > total[1, selective].total > total[1, full].total
    assert total[1, none].total > total[2, none].total
    larger = replace(config, batch=replace(config.batch, micro=16))
    assert memory(larger, 8).activations == pytest.approx(2 * total[1, none].activations, rel=1e-6)
    assert memory(config, 16).moments == total[1, none].moments / 2
    assert sum(total[1, none].parts().values()) == total[1, none].total


# --------------------------------------------------------------------------------------------------------------- speed


def test_tokens_a_second_are_peak_times_utilization_over_flops() -> None:
    config = settings("model=full", "cluster=8xh100", "plan.mfu=0.487", "zero.stage=2", "batch.micro=16")
    found = forecast(config, 8)
    assert found is not None
    # llm.c's 1558M on 8 H100, from which 48.7 % was derived: 46.8K tokens/s a GPU (ANCHORS in the docs).
    assert found.tokens_per_s / 8 == pytest.approx(46_800, rel=0.01)
    assert found.tokens == 20 * 1_557_611_200
    assert found.seconds == pytest.approx(found.tokens / found.tokens_per_s)
    again = forecast(replace(config, activation_checkpointing=ActivationCheckpointing.full), 8)
    assert again is not None
    assert 1.25 < found.tokens_per_s / again.tokens_per_s < 4 / 3


def test_cost_energy_and_disk() -> None:
    config = settings("model=small", "cluster=8xa100", "steps=1000", "plan.mfu=0.5", "cluster.gpu_hour_price=2.0")
    found = forecast(config, 8)
    assert found is not None
    hours = found.seconds / 3600
    assert found.cost == pytest.approx(2.0 * 8 * hours)
    assert found.kilowatt_hours == pytest.approx(0.4 * 8 * hours)
    assert found.data_bytes == 1000 * 512 * 1024 * 2
    assert found.checkpoint_bytes == 4 * 12 * parameter_count(config.model, padded=True)
    free = forecast(settings("model=small", "cluster=8xa100"), 8)
    assert free is not None
    assert free.cost is None
    assert forecast(settings("model=small"), 8) is None, "nothing is known of the machine"


def test_a_measured_run_is_planned_with(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    ran = settings("model=nano", "run_dir=x")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(ran)))
    (tmp_path / "versions.json").write_text(json.dumps({"processes": 2}))
    rates = [1.0, 900.0, 1000.0, 1100.0]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "tokens_per_s": r}) + "\n" for i, r in enumerate(rates))
    )
    config = settings("model=nano", "cluster=cpu", f"plan.measured={tmp_path}")
    found = utilization(config)
    assert found is not None
    assert found[0] == pytest.approx(1000 * flops_per_token(ran.model) / (107e9 * 2))
    for device, cluster, refused in (
        ("cpu", "8xh100", True),
        ("NVIDIA H100 80GB HBM3", "cpu", True),
        ("NVIDIA A100-SXM4-80GB", "8xh100", True),
        ("NVIDIA H100 80GB HBM3", "8xh100", False),
        ("cpu", "cpu", False),
    ):
        (tmp_path / "versions.json").write_text(json.dumps({"processes": 2, "device": device}))
        config = settings("model=nano", f"cluster={cluster}", f"plan.measured={tmp_path}")
        if refused:
            with pytest.raises(ConfigError, match=rf"was measured on {device}, cluster={cluster} is .*plan\.mfu="):
                utilization(config)
        else:
            assert utilization(config) is not None
    (tmp_path / "gpu.json").write_text(
        json.dumps({"rows": [{"model": "small", "mfu": 0.5}, {"model": "full", "mfu": 0.6}]})
    )
    for name, mfu in (("full", 0.6), ("large", 0.55)):
        assert utilization(settings(f"model={name}", f"plan.measured={tmp_path / 'gpu.json'}")) == (
            pytest.approx(mfu),
            f"measured: {tmp_path / 'gpu.json'}",
        )
    for bad in ("nothing.json", "bad.json"):
        (tmp_path / "bad.json").write_text("{}")
        with pytest.raises(ConfigError, match=r"plan\.measured="):
            utilization(settings("model=full", f"plan.measured={tmp_path / bad}"))


@pytest.mark.parametrize(("mfu", "told"), [(0.45, "45.0%"), (0.01, "1.0%"), (0.0000312, "0.0031%")])
def test_a_small_utilization_is_told_with_its_digits(mfu: float, told: str) -> None:
    made = forecast(settings("model=small", "cluster=8xh100", f"plan.mfu={mfu}"), 8)
    assert made is not None
    assert f" at MFU {told} (as stated" in summary(made, settings("cluster=8xh100"), 8)[0]


# -------------------------------------------------------------------------------------------------------------- choice


def test_every_cluster_is_described_whole() -> None:
    names = choices(GROUPS, "cluster")
    assert set(names) == {"1xa100", "8xa100", "1xh100", "8xh100", "8xh200", "cpu"}
    for name in names:
        cluster = settings(f"cluster={name}").cluster
        assert cluster.name == name
        assert cluster.memory_bytes > 1e9
        assert cluster.peak_fp32_flops > 0
        assert 0 < cluster.mfu < 1
        assert cluster.mfu_source
        assert cluster.on_gpu == (name != "cpu") == (cluster.peak_bf16_flops > 0)
        assert planned_ranks(settings(f"cluster={name}")) == cluster.gpus


def test_the_largest_micro_batch_that_fits() -> None:
    config = settings("model=full", "cluster=8xh100")
    for option in options(config, 8):
        room = config.cluster.memory_bytes
        assert option.fits
        assert memory(option.config, 8).total <= room
        share = config.batch.sequences // 8
        larger = [m for m in range(option.micro + 1, share + 1) if share % m == 0]
        if larger:
            more = replace(option.config, batch=replace(option.config.batch, micro=larger[0]))
            assert memory(more, 8).total > room
        assert not [f for f in check(option.config, world_size=8) if f.startswith(("zero.", "activation", "batch."))]
    stages = {o.config.zero.stage for o in options(config, 8)}
    assert stages == {1, 2, 3}, "ZeRO 0 does not go with bf16"


def test_the_pick_fits_is_fastest_and_keeps_what_was_given() -> None:
    config = settings("model=full", "cluster=8xh100")
    pick = best(options(config, 8))
    assert pick is not None
    assert pick.forecast is not None
    rates = [o.forecast.tokens_per_s for o in options(config, 8) if o.fits and o.forecast]
    assert pick.forecast.tokens_per_s >= 0.99 * max(rates)
    kept = settings(*with_kept(["model=full", "cluster=8xh100", "zero.stage=3", "batch.micro=4"]))
    chosen = applied(kept, 8)
    assert (chosen.zero.stage, chosen.batch.micro) == (3, 4)
    assert with_kept(["model=full"]) == ["model=full"]
    tight = replace(config, cluster=replace(config.cluster, memory_bytes=10 * GIB))
    assert applied(tight, 8).activation_checkpointing is not ActivationCheckpointing.none


def test_what_does_not_fit_is_told_with_what_would() -> None:
    config = settings("model=full", "cluster=8xh100", "batch.micro=64")
    (line,) = misfit(config, 8, 80 * GIB)
    assert line.startswith(
        "model.name=full: with batch.micro=64 zero.stage=1 activation_checkpointing=none a GPU needs"
    )
    remedy = line.split("; give ")[1].split(" (")[0].split()
    fixed = settings("model=full", "cluster=8xh100", *remedy)
    assert misfit(fixed, 8, 80 * GIB) == []
    (line,) = misfit(config, 8, 1 * GIB)
    assert "nothing fits on 8 of them" in line
    with pytest.raises(ConfigError, match="nothing fits"):
        applied(replace(config, cluster=replace(config.cluster, memory_bytes=GIB)), 8)
    assert misfit(replace(config, plan=PlanConfig(refuse=False)), 8, GIB) == []
    assert misfit(config, 8, 0) == [], "nothing is known of the room"


def test_the_memory_of_a_container(tmp_path: Path) -> None:
    assert host_bytes(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemFree: 1 kB\nMemTotal:       24000000 kB\n")
    assert host_bytes(tmp_path) == 24_000_000 * 1024
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    limit = tmp_path / "sys" / "fs" / "cgroup" / "memory.max"
    limit.write_text("max\n")
    assert host_bytes(tmp_path) == 24_000_000 * 1024
    limit.write_text("1073741824\n")
    assert host_bytes(tmp_path) == GIB


# ------------------------------------------------------------------------------------------------------------- command


def test_the_table_without_torch_in_a_moment() -> None:
    """CPU time, since a wall clock would measure the neighbors."""
    code = """
import resource, sys
from gpt2train.cli import main
assert main(["plan", "model=full", "cluster=8xh100", "plan.apply=true"]) == 0
assert not {"torch", "deepspeed", "matplotlib", "scipy"} & set(sys.modules), "heavy"
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "1,557,611,200 parameters" in lines[0]
    assert lines[-1] == "batch.micro=16 zero.stage=1 activation_checkpointing=none", "alone, for a script to take"
    assert sum("►" in line for line in lines) == 2
    assert max(map(len, lines)) <= 140
    assert "…" not in done.stdout, "cut"
    assert float(done.stderr.splitlines()[-1]) < 2.0


def test_the_parts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=large", "cluster=8xa100", "steps=1000"]) == 0
    out = capsys.readouterr().out
    head = out.splitlines()[0].replace(",", "").split()
    embedding, positions = int(head[3]), int(head[8])
    blocks, each = int(head[10]), int(head[13])
    assert embedding + positions + blocks * each == PAPER["large"] == int(head[1])
    for line in out.splitlines():
        cells = line.replace("►", "").replace("✗", "").split()
        if len(cells) > 8 and cells[1] in ("none", "selective", "full"):
            assert sum(map(float, cells[2:9])) == pytest.approx(float(cells[9]), abs=0.4)


def test_a_plan_for_a_cpu_speaks_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=nano", "cluster=cpu", "cluster.gpu_hour_price=1"]) == 0
    out = capsys.readouterr().out
    assert "GPU" not in out
    for part in ("GiB a process at", " process hours, ", " at 1 a process hour"):
        assert part in out


def test_a_plan_asked_for_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=full", "cluster=9xh100", "model.heads=7", "plan.mfu=1.5"]) == 2
    told = capsys.readouterr().err
    for part in ("cluster=9xh100: must be among", "model.channels=1600", "plan.mfu=1.5"):
        assert part in told
    assert main(["plan", "model=full", "cluster.gpus=0", "cluster.watts=-1", "plan.keep=[lr]", "plan.tokens=-1"]) == 2
    told = capsys.readouterr().err
    for part in ("cluster.gpus=0", "cluster.watts=-1", "plan.keep=[lr]", "plan.tokens=-1"):
        assert part in told
    assert main(["plan", "model=full", "cluster=8xh100", "cluster.memory_bytes=1e9"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_a_plan_reaches_the_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """launch writes the choice out, and its dry run shows it; what was given stays."""
    asked = ["launch", "model=full", "cluster=8xh100", "plan.apply=true", "zero.stage=3", "processes=8", "gpus=none"]
    assert main([*asked, "data=x", f"run_dir={tmp_path}", "steps=10", "dry_run=true"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "batch.micro=16 zero.stage=3 activation_checkpointing=none" in line
    assert "plan." not in line
    assert main(["launch", "model=full", "device=cpu", "data=x", f"run_dir={tmp_path}", "steps=1", "batch.micro=512",
                 "processes=1", "dry_run=true"]) == 2  # fmt: skip
    assert "a process needs" in capsys.readouterr().err


def test_apply_needs_a_cluster() -> None:
    faults = check(replace(settings("model=nano"), plan=PlanConfig(apply=True), data=DataConfig("x")), world_size=1)
    assert any(f.startswith("plan.apply=true: ") for f in faults)


def test_the_memory_of_steps_is_compared_with_the_forecast_and_saves_are_told_beside_it(tmp_path: Path) -> None:
    outcome = Outcome(settings("model=nano", "cluster=cpu", f"run_dir={tmp_path}"), 1)
    outcome.begin()
    lines = [json.dumps({"step": i, "tokens_per_s": 100.0}) + "\n" for i in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    told = outcome.end(first_step=0, peak_bytes=1 * GIB, whole_peak_bytes=2 * GIB)
    assert any(re.match(r"peak memory of a rank: forecast .*, measured 1.00 GiB", line) for line in told)
    assert "peak memory of a rank, its saves' copies included: forecast unknown, measured 2.00 GiB" in told
    alike = outcome.end(first_step=0, peak_bytes=1 * GIB, whole_peak_bytes=1 * GIB)
    assert len(alike) == len(told) - 1
