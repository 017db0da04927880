"""DeepSpeed's dictionary, read by DeepSpeed itself; how a run ends when a peer does not answer."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from gpt2train.config import (
    BatchConfig,
    DeepspeedConfig,
    Device,
    ModelConfig,
    Precision,
    TrainConfig,
    ZeroConfig,
    parameter_count,
)
from gpt2train.distributed import World, all_rows, all_sum, on_rank_zero, peer_error, start
from gpt2train.engine import deepspeed_config
from gpt2train.errors import ConfigError, GPT2TrainError

ALONE = World(0, 1, 0, torch.device("cpu"))


def config(**changes: object) -> TrainConfig:
    return TrainConfig(batch=BatchConfig(sequences=512, micro=8), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_batch_is_what_was_asked_for(ranks: int) -> None:
    made = deepspeed_config(config(), ranks)
    assert made["train_batch_size"] == 512
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * ranks == 512


def test_buckets_leave_something_to_overlap() -> None:
    for layers, channels, heads in ((12, 768, 12), (48, 1600, 25)):
        model = ModelConfig(layers=layers, channels=channels, heads=heads)
        bucket = deepspeed_config(config(model=model), 8)["zero_optimization"]["reduce_bucket_size"]
        assert bucket == parameter_count(model, padded=True) // 8


def test_extra_goes_through_untouched() -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}},
        "communication_data_type": "fp32",
        "bf16": {"immediate_grad_update": True},
        "my_list": [1, {"a": None}],
    }
    plain = deepspeed_config(config(), 8)
    made = deepspeed_config(config(deepspeed=DeepspeedConfig(extra)), 8)
    assert made["zero_optimization"] == {**plain["zero_optimization"], **extra["zero_optimization"]}  # type: ignore[dict-item]
    assert made["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert (made["communication_data_type"], made["my_list"]) == ("fp32", [1, {"a": None}])
    assert {k: v for k, v in made.items() if k not in extra} == {k: v for k, v in plain.items() if k not in extra}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", Precision)
def test_gradients_are_added_up_in_fp32_unless_told(stage: int, precision: Precision) -> None:
    made = deepspeed_config(config(zero=ZeroConfig(stage), precision=precision), 8)
    assert made["zero_optimization"]["stage"] == stage
    assert made["bf16"]["enabled"] == (precision is Precision.bf16)
    if precision is Precision.bf16:
        assert made["data_types"] == {"grad_accum_dtype": "fp32"}
        told = deepspeed_config(config(zero=ZeroConfig(stage, accumulate=Precision.bf16), precision=precision), 8)
        assert told["data_types"] == {"grad_accum_dtype": "bf16"}
    else:
        assert "data_types" not in made


def test_deepspeed_reads_every_key() -> None:
    """DeepSpeed's own parser takes the dictionary and understands it as it is meant."""
    code = (
        "import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "from gpt2train.config import TrainConfig, BatchConfig, ZeroConfig\n"
        "from gpt2train.engine import deepspeed_config\n"
        "c = DeepSpeedConfig(deepspeed_config(TrainConfig(batch=BatchConfig(64, 4), zero=ZeroConfig(2)), 1))\n"
        "print(c.train_batch_size, c.gradient_accumulation_steps, c.zero_optimization_stage,\n"
        "      c.bfloat16_config.enabled, c.grad_accum_dtype, c.gradient_clipping, c.zero_config.reduce_bucket_size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    bucket = parameter_count(ModelConfig(), padded=True) // 8
    assert done.stdout.split() == ["64", "16", "2", "True", "fp32", "1.0", str(bucket)], done.stderr


def test_a_world_of_one_agrees_with_itself() -> None:
    assert all_sum(ALONE, [1.5, 2.0]) == [1.5, 2.0]
    assert all_rows(ALONE, b"abc") == [b"abc"]
    assert on_rank_zero(ALONE, lambda: 41) == 41

    def refuse() -> int:
        raise ConfigError(["no"])

    with pytest.raises(ConfigError, match="no"):
        on_rank_zero(ALONE, refuse)


def test_environments_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT must be set too"):
        start(Device.cpu, 5)
    monkeypatch.setenv("WORLD_SIZE", "1")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: torch sees no GPU here"):
            start(Device.cuda, 5)


def test_peers_that_never_come_end_the_start() -> None:
    code = (
        "from gpt2train.distributed import start\nfrom gpt2train.config import Device\n"
        "try: start(Device.cpu, 2)\nexcept Exception as e: print(type(e).__name__, e.exit_code, e)\n"
    )
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
    assert "PeerError 7 rank 0: not all 2 processes met at 127.0.0.1:" in done.stdout, done.stderr
    assert time.monotonic() - begin < 60


def test_only_a_collective_s_error_is_a_peer_s() -> None:
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    found = peer_error(lost, ALONE, "step 3")
    assert isinstance(found, GPT2TrainError)
    assert "rank 0: step 3: another rank died, stopped or cannot be reached" in str(found)
    assert peer_error(RuntimeError("shapes cannot be multiplied"), ALONE, "step 3") is None


WATCHED = """
import sys, time, torch
from gpt2train.distributed import Watchdog, World
dog = Watchdog(World(1, 2, 1, torch.device("cpu")), 0.5)
{body}
print("alive", flush=True)
dog.close()
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("dog.watch('step 57'); time.sleep(30)", 7),
        ("for n in range(8):\n    dog.watch(f'step {n}'); time.sleep(0.2)", 0),
        ("dog.watch('step 57'); dog.rest(); time.sleep(1.5)", 0),
    ],
)
def test_the_watchdog(body: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED.format(body=body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("alive" in done.stdout) == (code == 0)
    if code:
        assert (
            "rank 1: step 57 did not end within distributed.timeout_s=0.5: another rank died or stopped" in done.stderr
        )
        assert "most recent call first" in done.stderr
        assert "Traceback" not in done.stderr
