"""One command on any NVIDIA machine: is the whole path right, and how fast is it?

    python -m benchmarks.gpu [--minutes 8] [--models small full] [--out gpu.json]
    python -m benchmarks.gpu --cpu          # a rehearsal at nano size, to see that every part runs

In this order, each in a process of its own with what is left of the time, so that one that fails or hangs costs none of
the others:

    kernels   the attention kernels and the loss kernels, forward and backward at GPT-2 small's shapes: equal? how long?
    losses    50 steps through DeepSpeed as `train` makes them, beside a plain PyTorch loop on the same device (SDPA,
              compile, torch's AdamW) and beside fp32 on the CPU, from the same weights and the same batches
    speed     each model, ours and the plain loop in turn: tokens/s, MFU, peak memory, time by part

It needs torch, triton, deepspeed, hydra-core, omegaconf and what these bring, nothing else of this project's packages.

Tokens/s of a step of 512 sequences (the paper's batch) come from steps of two lengths: their difference is the cost of
a micro batch, and the rest that of the update. MFU is (6N + 12·layers·channels·context) · tokens/s over the card's bf16
peak; `MFU exact` counts the products alone, and of attention only the half below the diagonal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn import functional as F

from gpt2train.compose import CONFIG_FOLDER, compose
from gpt2train.config import (
    VOCABULARY,
    Compile,
    CompileMode,
    Device,
    ModelConfig,
    Precision,
    TrainConfig,
    flops_per_token,
)
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.model import GPT
from gpt2train.optim import adamw, learning_rate, set_learning_rate

if TYPE_CHECKING:
    from data_pipeline.token_shards import TokenSplit

MICRO = {"small": 32, "medium": 16, "large": 8, "full": 8}
"""Sequences of a forward pass to begin with; halved while the memory does not take it."""
SHORT, LONG = 2, 6
"""Micro batches of the two kinds of step."""
PAPER_BATCH = 512
FULL = "the GPU's memory is full"
"""Of a model that is too large for the card: a finding, no failure."""
LOSS_STEPS = 50
FLAGS = ("compile=model", "precision=bf16", "zero.stage=1", "deterministic=false")


def configuration(model: str, micro: int, accumulate: int, *flags: str) -> TrainConfig:
    config = compose(
        TrainConfig,
        [
            f"model={model}",
            "data.path=unused",
            "run_dir=unused",
            "steps=1000",
            f"batch.micro={micro}",
            f"batch.sequences={micro * accumulate}",
            *flags,
        ],
        groups=CONFIG_FOLDER / "train",
    )
    assert isinstance(config, TrainConfig)
    return config


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work`, after one call that does not count."""
    took = []
    for turn in range(repeats + 1):
        settle(device)
        begin = time.perf_counter()
        work()
        settle(device)
        if turn:
            took.append(time.perf_counter() - begin)
    return statistics.median(took)


# ----------------------------------------------------------------------------------------------------------- kernels


def kernels(work: dict[str, Any]) -> dict[str, Any]:
    """Times in ms and the largest difference from fp32, or why a kernel cannot serve."""
    from data_pipeline.tokenizer import END_OF_TEXT
    from gpt2train.config import AttentionKernel
    from gpt2train.network import flexible
    from gpt2train.network.attention import one_kernel
    from gpt2train.network.documents import document_mask
    from gpt2train.network.loss import cross_entropy

    device = torch.device(work["device"])
    B, H, T, D, C, V = (2, 4, 128, 32, 128, 50_304) if device.type == "cpu" else (16, 12, 1024, 64, 768, 50_304)
    q, k, v = (torch.randn(B, H, T, D, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found: dict[str, Any] = {"shapes": {"attention": [B, H, T, D], "loss": [B * T, C, V]}}
    with torch.no_grad(), one_kernel(AttentionKernel.math):
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    # Documents of a seventh of the context, as short web pages have it.
    rows = torch.arange(B * T, device=device).view(B, T)
    rows = torch.where(rows % max(T // 7, 1) == 0, END_OF_TEXT, 0)
    with torch.no_grad(), one_kernel(AttentionKernel.math):
        exact_within = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=document_mask(rows))
    for kernel in AttentionKernel:

        def attend(mask: Any, kernel: AttentionKernel = kernel) -> torch.Tensor:
            if kernel is AttentionKernel.flex:
                y = flexible.attend(q, k, v, mask, None)
            else:
                with one_kernel(kernel):
                    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            y.sum().backward()
            return y.detach()

        for name, within, right in ((kernel.value, False, exact), (f"{kernel.value}, documents", True, exact_within)):
            with _told(found, f"attention {name}"):
                # Made once for all layers of a pass, and so not timed.
                plain = document_mask(rows) if within else None
                mask = flexible.block_mask(rows, within) if kernel is AttentionKernel.flex else plain
                attention = functools.partial(attend, mask)
                difference = (attention().float() - right).abs().max().item()
                found[f"attention {name}"] = {"ms": 1e3 * timed(attention, device, 10), "difference": difference}
    x = torch.randn(B * T, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, C, device=device) * 0.02).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 50_257, (B * T,), device=device)
    with torch.no_grad():
        exact = F.cross_entropy(F.linear(x, weight)[:, :50_257].float(), targets)

    def whole() -> torch.Tensor:
        loss = F.cross_entropy(F.linear(x, weight)[:, :50_257].float(), targets)
        loss.backward()
        return loss.detach()

    def chunked(function: Callable[..., torch.Tensor], **options: bool) -> torch.Tensor:
        loss = function(x, weight, targets, 50_257, **options)
        loss.backward()
        return loss.detach()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "loss whole logits": whole,
        "loss torch": lambda: chunked(cross_entropy),
        "loss triton": lambda: chunked(cross_entropy, triton=True),
    }
    if not work["rehearsal"]:
        compiled = torch.compile(cross_entropy)
        ways["loss torch, compiled"] = lambda: chunked(compiled)
    for name, way in ways.items():
        with _told(found, name):
            difference = abs(way().item() - exact.item())
            found[name] = {"ms": 1e3 * timed(way, device, 5), "difference": difference}
    return found


@contextlib.contextmanager
def _told(found: dict[str, Any], name: str) -> Any:
    """What cannot run says so in its place, and the rest goes on."""
    try:
        yield
    except Exception as error:
        found[name] = {"cannot": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


# ------------------------------------------------------------------------------------------------------------- loops


class Ours:
    """Steps as `train` makes them: DeepSpeed, our loss, one agreement a step."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        from gpt2train import distributed, engine

        self._world = distributed.start(Device.cuda if device.type == "cuda" else Device.cpu, 600.0)
        self._config, self._device = config, device
        self.engine = engine.build(config, self._world)
        self._guard = engine.Guard(self.engine)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self._config.compile_mode is CompileMode.reduce_overhead:
            torch.compiler.cudagraph_mark_step_begin()
        loss: torch.Tensor = self.engine(rows[:, :-1], rows[:, 1:])
        return loss

    def backward(self, loss: torch.Tensor, share: float, last: bool) -> None:
        self.engine.backward(loss)
        if not last:
            self.engine.step()

    def update(self, step: int) -> None:
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        set_learning_rate(self.engine.optimizer.param_groups, rate)
        self._guard.update(float("inf"))

    def capture(self) -> None:
        """What a checkpoint makes the step wait for."""
        from gpt2train import checkpoint, engine

        checkpoint.capture(engine.state_tensors(self.engine), self._world)


class Plain:
    """What one would write by hand: SDPA, compile, autocast, whole logits, torch's cross-entropy and fused AdamW."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._model = GPT(config.model, seed=config.seed).to(device)
        self._optimizer = adamw(self._model, config.optimizer, device)

        def loss_of(rows: torch.Tensor) -> torch.Tensor:
            logits = self._model(rows[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

        self._loss_of = torch.compile(loss_of) if config.compile is not Compile.none else loss_of

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        low = self._config.precision is Precision.bf16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
            loss: torch.Tensor = self._loss_of(rows)
        return loss

    def backward(self, loss: torch.Tensor, share: float, last: bool) -> None:
        (loss * share).backward()

    def update(self, step: int) -> None:
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        set_learning_rate(self._optimizer.param_groups, rate)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.clip_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def capture(self) -> None:
        pass


class RandomTokens:
    """A split in memory, for `TokenWindows`; what the tokens are changes nothing of a step's work."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, size=tokens).astype(np.uint16)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._ids[start:stop]


@functools.cache
def random_tokens() -> RandomTokens:
    return RandomTokens(600 * 1024)


def batches(config: TrainConfig, device: torch.device, batch: int, micro: int, accumulate: int) -> list[torch.Tensor]:
    windows = TokenWindows(cast("TokenSplit", random_tokens()), config.model.context)
    order = BatchOrder(config.seed, len(windows), micro * accumulate)
    indices = order.indices(batch)
    rows = [torch.from_numpy(windows.read(indices[i : i + micro])) for i in range(0, len(indices), micro)]
    return [row.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else row for row in rows]


def losses(work: dict[str, Any]) -> dict[str, Any]:
    """Losses of `LOSS_STEPS` steps by one loop: `ours`, `plain`, or `exact`, the plain one in fp32 on the CPU."""
    device = torch.device("cpu" if work["loop"] == "exact" else work["device"])
    flags = ["precision=fp32", "compile=none"] if work["loop"] == "exact" else work["flags"]
    torch.backends.cuda.matmul.allow_tf32 = False
    config = configuration("nano", 4, 2, *flags, "zero.stage=1")
    loop = Ours(config, device) if work["loop"] == "ours" else Plain(config, device)
    found = []
    for step in range(1, work["steps"] + 1):
        rows = batches(config, device, step - 1, 4, 2)
        total = 0.0
        for number, row in enumerate(rows, start=1):
            loss = loop.forward(row)
            total += loss.item() / len(rows)
            loop.backward(loss, 1 / len(rows), number == len(rows))
        loop.update(step)
        found.append(total)
    return {"losses": found}


def speed(work: dict[str, Any]) -> dict[str, Any]:
    """One model, one loop: seconds of short and long steps, by part, and peak memory; the micro batch that fitted."""
    device = torch.device(work["device"])
    micro = work["micro"]
    while True:
        try:
            return _speed(work, device, micro)
        except torch.cuda.OutOfMemoryError:
            if micro == 1 or work["loop"] == "ours":  # DeepSpeed cannot be built twice in a process
                return {"micro": micro, "cannot": FULL}
        torch.cuda.empty_cache()
        micro //= 2


def _speed(work: dict[str, Any], device: torch.device, micro: int) -> dict[str, Any]:
    config = configuration(work["model"], micro, LONG, *work["flags"])
    begin = time.perf_counter()
    loop = Ours(config, device) if work["loop"] == "ours" else Plain(config, device)
    data = batches(config, device, 0, micro, LONG)
    step_number = [0]

    def step(accumulate: int) -> None:
        step_number[0] += 1
        for number, rows in enumerate(data[:accumulate], start=1):
            loop.backward(loop.forward(rows), 1 / accumulate, number == accumulate)
        loop.update(step_number[0])

    if isinstance(loop, Ours):
        # DeepSpeed counts micro batches itself: the short step is told to it.
        def step(accumulate: int) -> None:
            step_number[0] += 1
            loop.engine.set_gradient_accumulation_boundary(False)
            for number, rows in enumerate(data[:accumulate], start=1):
                if number == accumulate:
                    loop.engine.set_gradient_accumulation_boundary(True)
                loop.backward(loop.forward(rows), 1 / accumulate, number == accumulate)
            loop.update(step_number[0])

    step(SHORT)  # compiles
    settle(device)
    started_s = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    short_s, long_s = (timed(lambda n=n: step(n), device, work["repeats"]) for n in (SHORT, LONG))  # type: ignore[misc]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    parts = {"data": timed(lambda: batches(config, device, 1, micro, 1), device, 3)}
    loss = [loop.forward(data[0])]
    parts["forward"] = timed(lambda: loss.__setitem__(0, loop.forward(data[0])), device, 3)
    micro_s = (long_s - short_s) / (LONG - SHORT)
    parts["backward"] = max(micro_s - parts["forward"], 0.0)
    parts["update"] = max(long_s - LONG * micro_s, 0.0)
    if isinstance(loop, Ours):
        with contextlib.suppress(ModuleNotFoundError):  # checkpoints need safetensors; all else goes without
            parts["checkpoint copy"] = timed(loop.capture, device, 1)
    model, tokens = config.model, PAPER_BATCH * config.model.context
    passes = -(-PAPER_BATCH // micro)
    tokens_per_s = tokens / (passes * micro_s + parts["update"])
    return {
        "micro": micro,
        "start_s": started_s,
        "short_s": short_s,
        "long_s": long_s,
        "tokens_per_s_measured": LONG * micro * model.context / long_s,
        "tokens_per_s": tokens_per_s,
        "flops_per_s": flops_per_token(model) * tokens_per_s,
        "exact_flops_per_s": exact_flops_per_token(model) * tokens_per_s,
        "peak_gb": peak / 1e9,
        "parts_ms": {name: 1e3 * seconds for name, seconds in parts.items()},
    }


def exact_flops_per_token(model: ModelConfig) -> int:
    """6 for each weight that multiplies, and of attention the half below the diagonal."""
    c = model.channels
    return 6 * (12 * model.layers * c * c + model.vocabulary * c) + 6 * model.layers * c * model.context


# ------------------------------------------------------------------------------------------------------------ the run


def child(job: str, work: dict[str, Any]) -> None:
    """One part in this process; the last line of standard output holds what it found."""
    if work["device"] == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    found = {"kernels": kernels, "losses": losses, "speed": speed}[job](work)
    print("\n" + json.dumps(found), flush=True)


def part(job: str, work: dict[str, Any], end: float) -> dict[str, Any]:
    """What a child process found, or under `cannot` why it found nothing."""
    left = end - time.monotonic()
    if left < 10:
        return {"cannot": "no time was left; give more --minutes"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", job, json.dumps(work)]
    # In a session of its own: a compiler's helpers hold the pipes open when their parent is killed alone.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"cannot": f"not done in {left:.0f} s"}
    if process.returncode:
        said = error.strip().splitlines() or ["nothing was said"]
        return {"cannot": f"exit code {process.returncode}: {said[-1][:300]}"}
    found = json.loads(out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def about(device: str) -> dict[str, Any]:
    packages = ("gpt2train", "torch", "deepspeed", "triton", "torchao")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores"
    if device == "cuda":
        found["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    return found


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="rehearse every part at nano size")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--models", nargs="+", default=list(MICRO), choices=list(MICRO))
    parser.add_argument("--flags", nargs="*", default=[], help="more settings for ours, such as kernels.loss=triton")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("torch sees no GPU; give --cpu to rehearse", file=sys.stderr)
        return 2
    device = "cpu" if options.cpu else "cuda"
    flags = ["compile=none", "precision=fp32", "zero.stage=1"] if options.cpu else [*FLAGS]
    end = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"about": about(device), "settings": flags + options.flags}
    print(json.dumps(report["about"]))

    def keep() -> None:
        """What was found so far, should the machine be taken away before the end."""
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    work: dict[str, Any] = {"device": device, "rehearsal": options.cpu, "flags": flags}
    work |= {"steps": 4 if options.cpu else LOSS_STEPS, "repeats": 2 if options.cpu else 5}
    report["kernels"] = part("kernels", work, end)
    _print_kernels(report["kernels"])
    keep()
    report["losses"] = {
        loop: part("losses", work | {"loop": loop, "flags": flags + options.flags * (loop == "ours")}, end)
        for loop in ("exact", "plain", "ours")
    }
    _print_losses(report["losses"])
    keep()
    report["speed"] = {}
    for model in ["nano"] if options.cpu else options.models:
        micro = 2 if options.cpu else MICRO[model]
        # The plain loop first: it finds the micro batch that fits, and ours takes the same.
        plain = part("speed", work | {"model": model, "loop": "plain", "micro": micro}, end)
        settings = {"model": model, "loop": "ours", "micro": plain.get("micro", micro)}
        ours = part("speed", work | settings | {"flags": flags + options.flags}, end)
        report["speed"][model] = {"ours": ours, "plain": plain}
        _print_speed(model, report["speed"][model], report["about"]["device"])
        keep()
    speeds = [found for rows in report["speed"].values() for found in rows.values()]
    parts = [report["kernels"], *report["losses"].values(), *speeds]
    return 1 if any(found.get("cannot", FULL) != FULL for found in parts) else 0


def _print_kernels(found: dict[str, Any]) -> None:
    for name, row in found.items():
        if isinstance(row, str) or "cannot" in row:
            print(f"  {name:27} cannot: {row if isinstance(row, str) else row['cannot']}")
        elif "ms" in row:
            print(f"  {name:27} {row['ms']:9.3f} ms  differs by {row['difference']:.1e}")


def _print_losses(found: dict[str, Any]) -> None:
    for name, row in found.items():
        if "cannot" in row:
            print(f"  losses, {name}: cannot: {row['cannot']}")
    exact = found["exact"].get("losses")
    for name in ("plain", "ours"):
        if exact and "losses" in found[name]:
            difference = max(abs(a - b) for a, b in zip(exact, found[name]["losses"], strict=True))
            found[name]["largest_difference"] = difference
            print(f"  losses, {name}: at most {difference:.2e} from fp32 on the CPU over {len(exact)} steps")


def _print_speed(model: str, rows: dict[str, Any], device: str) -> None:
    from gpt2train.metrics import peak_flops

    peak = peak_flops(device, Precision.bf16)
    for name, row in rows.items():
        if "cannot" in row:
            print(f"  {model:7} {name:6} cannot: {row['cannot']}")
            continue
        mfu = ""
        if peak:
            row["mfu"], row["mfu_exact"] = row["flops_per_s"] / peak, row["exact_flops_per_s"] / peak
            mfu = f"  MFU {row['mfu']:.1%}, exact {row['mfu_exact']:.1%}"
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items())
        print(
            f"  {model:7} {name:6} micro {row['micro']:3}  {row['tokens_per_s']:10,.0f} tokens/s{mfu}  "
            f"{row['peak_gb']:.1f} GB  ms: {parts}"
        )


if __name__ == "__main__":
    sys.exit(main())
