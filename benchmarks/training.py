"""Seconds a step and memory of training: ours beside a plain PyTorch loop and transformers' Trainer with DeepSpeed.

The same sizes, batch, tokens, optimizer and precision for all, one process each, in turn and several times over, so
that a machine that slows down slows down for all. The plain loop is what one would write by hand: the same network,
whole logits, torch's cross-entropy and AdamW. The first steps of each process are not counted. Ratios are of one
round's medians; their median over the rounds is given, with the lowest and the highest. CPU seconds, which other work
on the machine moves less, stand beside wall-clock ones.

    python -m benchmarks.training [--model micro] [--context 256] [--sequences 16] [--micro 8] [--steps 6] [--rounds 4]
                                  [--json out.json]
    pip install 'gpt2train[bench]'    # for the Trainer, which needs accelerate; it is left out otherwise
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_STEPS = 2
CONTENDERS = ("ours", "plain", "trainer")


def write_tokens(folder: Path, tokens: int, context: int) -> None:
    """Token shards of random documents; what is in them changes nothing of a step's work."""
    from data_pipeline.token_writer import TokenShardWriter
    from data_pipeline.tokenizer import END_OF_TEXT

    generator = np.random.default_rng(0)
    folder.mkdir()
    with TokenShardWriter(folder, shard_tokens=1 << 20, tokenizer_sha256="0" * 64) as writer:
        for index in range(tokens // context + 2):
            ids = generator.integers(0, END_OF_TEXT, size=context + 1).astype(np.uint16)
            ids[-1] = END_OF_TEXT
            writer.append("train", ids, index=index, url=f"https://example.com/{index}", digest=f"{index:064x}")
        writer.finish(made_from="a benchmark", settings={})


class Laps:
    """Wall-clock and CPU seconds of each step of this process."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.begin()

    def begin(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def end(self) -> None:
        wall, cpu = self._begin
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        self.begin()


def ours(work: dict[str, Any]) -> Laps:
    from gpt2train import train as room

    laps = Laps()

    class Timed(room.Reporter):
        def start_clock(self) -> None:
            super().start_clock()
            laps.begin()

        def step(self, **numbers: Any) -> None:
            super().step(**numbers)
            laps.end()

    room.Reporter = Timed  # type: ignore[misc]
    run = Path(work["folder"]) / f"run{os.getpid()}"
    config = _config(work)
    config.run_dir = str(run)
    assert room.train(config) == 0
    return laps


def _config(work: dict[str, Any]) -> Any:
    from gpt2train.compose import CONFIG_FOLDER, compose
    from gpt2train.config import TrainConfig

    return compose(
        TrainConfig,
        [
            f"model={work['model']}",
            f"model.context={work['context']}",
            f"data={work['folder']}/tokens",
            "run_dir=unused",
            f"steps={work['steps'] + WARM_UP_STEPS}",
            f"batch.sequences={work['sequences']}",
            f"batch.micro={work['micro']}",
            f"precision={work['precision']}",
            "evaluate.every_steps=0",
            "checkpoint.every_steps=0",
        ],
        groups=CONFIG_FOLDER / "train",
        aliases={"data": "data.path"},
    )


def plain(work: dict[str, Any]) -> Laps:
    import torch
    from torch.nn import functional as F

    from data_pipeline.token_shards import TokenShards
    from gpt2train.data import BatchOrder, TokenWindows
    from gpt2train.model import GPT
    from gpt2train.optim import adamw

    config = _config(work)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(config.model, seed=config.seed).to(device)
    optimizer = adamw(model, config.optimizer, device)
    windows = TokenWindows(TokenShards.open(config.data.path).split("train"), config.model.context)
    order = BatchOrder(config.seed, len(windows), config.batch.sequences)
    low = work["precision"] == "bf16"
    laps = Laps()
    for step in range(config.steps):
        laps.begin()
        indices = order.indices(step)
        for start in range(0, len(indices), work["micro"]):
            rows = torch.from_numpy(windows.read(indices[start : start + work["micro"]])).to(device)
            with torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext():
                logits = model(rows[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            (loss * work["micro"] / len(indices)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        laps.end()
    return laps


def trainer(work: dict[str, Any]) -> Laps:
    import torch
    import transformers

    from data_pipeline.token_shards import TokenShards
    from gpt2train.data import TokenWindows

    if not torch.cuda.is_available():  # what training never calls would be compiled for a minute (see engine.py)
        import deepspeed.ops

        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    config = _config(work)
    c = config.model
    windows = TokenWindows(TokenShards.open(config.data.path).split("train"), c.context)

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(windows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(windows[index].astype(np.int64))
            return {"input_ids": tokens[:-1], "labels": tokens[:-1]}

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.laps = Laps()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.laps.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.laps.end()

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocabulary,
            n_positions=c.context,
            n_embd=c.channels,
            n_layer=c.layers,
            n_head=c.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=f"{work['folder']}/trainer{os.getpid()}",
        max_steps=config.steps,
        per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=work["sequences"] // work["micro"],
        learning_rate=config.optimizer.lr,
        weight_decay=0.1,
        optim="adamw_torch_fused",
        bf16=work["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "bf16": {"enabled": work["precision"] == "bf16"},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
    return clock.laps


def child(name: str, work: dict[str, Any]) -> None:
    """One contender in this process; the last line of standard output holds its figures."""
    import torch

    if name == "trainer":
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    laps = {"ours": ours, "plain": plain, "trainer": trainer}[name](work)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    figures = {"wall_s": laps.wall_s[WARM_UP_STEPS:], "cpu_s": laps.cpu_s[WARM_UP_STEPS:], "peak_bytes": peak}
    print("\n" + json.dumps(figures | {"device": device}), flush=True)


def measure(name: str, work: dict[str, Any]) -> dict[str, Any]:
    """Figures of one process of `name`. Raises RuntimeError with the end of what it said when it fails."""
    command = [sys.executable, "-m", "benchmarks.training", "--child", name, json.dumps(work)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


def summary(laps: list[dict[str, Any]], plain_laps: list[dict[str, Any]], work: dict[str, Any]) -> dict[str, float]:
    """A contender's row: medians over all its steps, and round by round what it is of the plain loop beside it."""
    median = statistics.median
    wall_s, cpu_s = ([s for lap in laps for s in lap[kind]] for kind in ("wall_s", "cpu_s"))
    ratios = [median(lap["wall_s"]) / median(beside["wall_s"]) for lap, beside in zip(laps, plain_laps, strict=True)]
    cpu_ratios = [median(lap["cpu_s"]) / median(beside["cpu_s"]) for lap, beside in zip(laps, plain_laps, strict=True)]
    peak, plain_peak = (max(lap["peak_bytes"] for lap in several) for several in (laps, plain_laps))
    return {
        "s_per_step": median(wall_s),
        "fastest_s": min(wall_s),
        "cpu_s_per_step": median(cpu_s),
        "tokens_per_s": work["sequences"] * work["context"] / median(wall_s),
        "peak_mb": peak / 1e6,
        "ratio": median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "cpu_ratio": median(cpu_ratios),
        "memory_ratio": peak / plain_peak,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    for name, value in {"context": 256, "sequences": 16, "micro": 8, "steps": 6, "rounds": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    out, rounds = options.pop("json"), options.pop("rounds")
    names = [n for n in CONTENDERS if n != "trainer" or importlib.util.find_spec("accelerate")]
    if "trainer" not in names:
        print("transformers' Trainer is left out: pip install 'gpt2train[bench]'", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        tokens = (options["steps"] + WARM_UP_STEPS) * options["sequences"] * options["context"]
        write_tokens(Path(folder) / "tokens", tokens, options["context"])
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(measure(name, options | {"folder": folder}))
    table = {name: summary(laps, runs["plain"], options) for name, laps in runs.items()}
    print(
        f"{'':8} {'s/step':>8} {'fastest':>8} {'CPU s':>8} {'tokens/s':>9} {'peak MB':>8} {'of plain':>8} "
        f"{'lowest':>7} {'highest':>7} {'CPU':>6} {'memory':>7}"
    )
    for name, row in table.items():
        print(
            f"{name:8} {row['s_per_step']:8.3f} {row['fastest_s']:8.3f} {row['cpu_s_per_step']:8.3f} "
            f"{row['tokens_per_s']:9.0f} {row['peak_mb']:8.0f} {row['ratio']:8.3f} {row['lowest_ratio']:7.3f} "
            f"{row['highest_ratio']:7.3f} {row['cpu_ratio']:6.3f} {row['memory_ratio']:7.3f}"
        )
    if out:
        packages = ("torch", "deepspeed", "transformers", "accelerate")
        versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
        about = {"device": runs["ours"][0]["device"], "cores": os.cpu_count(), "python": platform.python_version()}
        out.write_text(
            json.dumps(
                {"settings": options | {"rounds": rounds}, "machine": about, "versions": versions, "table": table},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
