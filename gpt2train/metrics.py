"""What a run reports: metrics.jsonl, a line on the terminal, Weights & Biases, TensorBoard.

Flows in: the numbers of a step, or of an evaluation. Flows out: one line of JSON a step in `run_dir/metrics.jsonl`,
which is the record; the other sinks are shown the same numbers, and none of them can stop a run. After a
resume the file is cut behind the checkpoint's step, so that it always holds one curve without gap or double.

Floats are written in full (Python's shortest form that reads back as the same number).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2train.config import Precision, TrainConfig, WandbMode, flops_per_token
from gpt2train.errors import StorageError
from gpt2train.run_folder import METRICS, TENSORBOARD, read_metrics

PEAK_FLOPS = {
    # Dense bf16 with fp32 accumulation, FLOP/s, from NVIDIA's data sheets (sparsity's factor of two taken off). The
    # first name that torch's device name contains counts.
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Peak of a device by (part of) its name; MFU is not reported for others, nor for fp32."""


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of one device, or None when it is not known."""
    if precision is not Precision.bf16:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class MetricsFile:
    """`metrics.jsonl`, opened to go on after `step`: lines of later steps and a torn last line are cut off.

    Every line reaches the kernel as it is written; `sync()` before a checkpoint makes all of them outlive a power cut,
    so the file never ends before the checkpoint that a run goes on from.
    """

    def __init__(self, run_dir: Path, *, after_step: int) -> None:
        self._path = run_dir / METRICS
        try:
            self.cut_lines = _cut(self._path, after_step)
            """Lines that were cut off: of steps after the checkpoint, or torn."""
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (held open for the whole run)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, entry: dict[str, Any]) -> None:
        """One line. Numbers that are not finite become null, as JSON has no word for them.

        Raises StorageError when the line cannot be stored.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        line = json.dumps(clean).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._cannot_write(error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path}: cannot be written ({error.strerror}); the checkpoints are intact, make room and run the "
            f"same command again"
        )

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, after_step: int) -> int:
    """Truncates the file before its first line that is torn or of a later step; gives the number of lines lost."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    keep = 0
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or entry["step"] > after_step:
            os.truncate(path, keep)
            return len(lines) - number
        keep += len(line)
    return 0


class Wandb:
    """Weights & Biases as one more sink. Whatever fails there is told once and then left alone.

    The run's id is stable, so a resumed run goes on in the same place, also when it was recorded offline. It takes no
    step twice, and a kill may take from it what was on its way: `catch_up` shows it the lines of metrics.jsonl behind
    the last step that it has, and none that it has is shown again.
    """

    def __init__(self, config: TrainConfig, run_id: str, tell: Callable[[str], None]) -> None:
        self._reached = 0
        self._run: Any = None
        self._tell = tell
        if config.logging.wandb is WandbMode.off:
            return
        try:
            import wandb

            if config.logging.wandb is WandbMode.offline:
                # Two starts within a second have the same name but for a number behind it.
                files = sorted((Path(config.run_dir) / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
                self._reached = max((step for file in files for step, _ in wandb_history(file)), default=0)
            self._run = wandb.init(
                project=config.logging.wandb_project,
                group=config.logging.wandb_group or None,
                name=Path(config.run_dir).resolve().name,
                id=run_id,
                resume="allow",
                mode=config.logging.wandb.value,
                dir=config.run_dir,
                settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
            )
            if config.logging.wandb is WandbMode.online and self._run.resumed:
                self._reached = int(self._run.step) - 1
        except Exception as error:  # no account, no network, no such project: none of them is the run's business
            self._fail(error)

    def catch_up(self, run_dir: Path) -> None:
        """Shows what stands in metrics.jsonl and was not recorded."""
        if self._run is not None:
            for entry in read_metrics(run_dir):
                self.log(entry)

    def log(self, entry: dict[str, Any]) -> None:
        if self._run is None or entry["step"] <= self._reached:
            return
        try:
            self._run.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._run = None
        self._tell(f"Weights & Biases is off for this start ({(str(error).splitlines() or [repr(error)])[0]})")


def wandb_history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of what Weights & Biases has recorded in an offline file; a torn end is left out."""
    for entry in wandb_records(file):
        if entry.WhichOneof("record_type") == "history":
            items = entry.history.item
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            yield entry.history.step.num, values


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline file, as wandb.proto.wandb_internal_pb2 has them; a torn end is left out.

    The file is a log in LevelDB's format (doc/log_format.md of google/leveldb): a header of 7 bytes, then blocks of
    32 KiB of pieces, each with a checksum (4 bytes), its length (2), its kind (1: whole; 2, 3, 4: first, next, last).
    """
    from wandb.proto import wandb_internal_pb2 as records

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 or len(piece) < length:
            return
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            entry = records.Record()
            entry.ParseFromString(record)
            yield entry


class TensorBoard:
    """TensorBoard's event files as one more sink, in `run_dir/tensorboard`; what fails there is told once.

    Each start writes a file of its own, whose first event tells TensorBoard to forget what other files hold of later
    steps than the checkpoint's: one curve without a double.
    """

    def __init__(self, config: TrainConfig, after_step: int, tell: Callable[[str], None]) -> None:
        self._writer: Any = None
        self._tell = tell
        if not config.logging.tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(Path(config.run_dir) / TENSORBOARD, purge_step=after_step + 1)
        except ImportError:
            self._tell("TensorBoard is off: it is not installed; `pip install gpt2train[tensorboard]`")
        except Exception as error:
            self._fail(error)

    def log(self, entry: dict[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in _flat(entry):
                if isinstance(value, str):
                    self._writer.add_text(name, value, entry["step"])
                elif name != "step":
                    self._writer.add_scalar(name, value, entry["step"])
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._writer = None
        self._tell(f"TensorBoard is off for this start ({(str(error).splitlines() or [repr(error)])[0]})")


def _flat(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


class Reporter:
    """All sinks of a run, on rank 0; on other ranks every call does nothing.

    `entry` of a step holds `step`, `loss`, `lr`, `grad_norm` and `tokens`; `tokens_per_s` and, where the device's peak
    is known, `mfu` are added from the clock. Where they apply: `skipped`, why no update was made; `batch`, the number
    of the batch where rewinds have parted it from the step; `rewound_from`, on the first step after one; `layers`.
    """

    def __init__(
        self, config: TrainConfig, *, active: bool, run_id: str, after_step: int, ranks: int, device_name: str
    ) -> None:
        self.active = active
        self._config = config
        self._peak = peak_flops(device_name, config.precision)
        self._ranks = ranks
        self._first_step = after_step
        self._begin = self._lap = time.perf_counter()
        self._error: StorageError | None = None
        if active:
            self._rewound: dict[str, Any] = {}
            self._file = MetricsFile(Path(config.run_dir), after_step=after_step)
            self._wandb = Wandb(config, run_id, self.tell)
            self._wandb.catch_up(Path(config.run_dir))
            self._tensorboard = TensorBoard(config, after_step, self.tell)
            if self._file.cut_lines:
                self.tell(f"metrics.jsonl: {self._file.cut_lines} lines after step {after_step} are written anew")

    def tell(self, line: str) -> None:
        """One line for people, on standard error."""
        if self.active:
            print(line, file=sys.stderr, flush=True)

    def start_clock(self) -> None:
        """Time until now does not count for the next step (start-up, evaluation, a save)."""
        self._lap = time.perf_counter()

    def rewind(self, *, to: int, after: int, reason: str) -> None:
        """The run is back at step `to`: what stands behind it is cut off, and the next step's line says why.

        Weights & Biases takes no step twice, so its curve keeps the steps up to `after` as they were first.
        """
        self.tell(f"rewound from step {after} to the checkpoint of step {to}")
        if not self.active:
            return
        self._rewound = {"rewound_from": after, "rewound_for": reason}
        self._file.close()
        self._file = MetricsFile(Path(self._config.run_dir), after_step=to)
        self._tensorboard.close()
        self._tensorboard = TensorBoard(self._config, to, self.tell)

    def step(
        self,
        *,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        skipped: str | None = None,
        batch: int | None = None,
        layers: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """Records a step; the time since the last call (or `start_clock`) is the step's."""
        now = time.perf_counter()
        took_s, self._lap = now - self._lap, now
        if not self.active:
            return
        tokens_per_step = self._config.batch.sequences * self._config.model.context
        rate = tokens_per_step / took_s
        entry: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_s": rate,
        }
        if self._peak is not None:
            entry["mfu"] = rate * flops_per_token(self._config.model) / (self._peak * self._ranks)
        seldom = {"skipped": skipped, "batch": batch, "layers": layers}
        entry |= {name: value for name, value in seldom.items() if value is not None} | self._rewound
        self._rewound = {}
        self._log(entry)
        if step % self._config.logging.every_steps == 0 or step in (self._first_step + 1, self._config.steps):
            self.tell(self._line(entry, now))

    def _line(self, entry: dict[str, Any], now: float) -> str:
        step, steps = entry["step"], self._config.steps
        left_s = (now - self._begin) / (step - self._first_step) * (steps - step)
        mfu = f"  MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
        return (
            f"step {step:>{len(str(steps))}}/{steps}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  "
            f"gradient norm {entry['grad_norm']:.3f}  {entry['tokens_per_s']:,.0f} tokens/s{mfu}  "
            f"{duration(left_s)} to go"
        )

    @property
    def failed(self) -> bool:
        """Whether a line could not be written. No call but `sync` and `fail` raises it: all ranks are to leave with it,
        and where the others wait for this one they would only learn that it is gone."""
        return self._error is not None

    def fail(self) -> None:
        """Ends the run after rank 0 has said that it could not write a line."""
        raise self._error or StorageError("rank 0 could not write metrics.jsonl; its line says why")

    def _log(self, entry: dict[str, Any]) -> None:
        if self._error is not None:
            return
        try:
            self._file.write(entry)
        except StorageError as error:
            self._error = error
            return
        self._wandb.log(entry)
        self._tensorboard.log(entry)

    def evaluation(self, *, step: int, validation_loss: float, sample: str | None = None) -> None:
        if not self.active:
            return
        entry: dict[str, Any] = {"step": step, "validation_loss": validation_loss}
        if sample is not None:
            entry["sample"] = sample
        self._log(entry)
        self.tell(
            f"step {step}  validation loss {validation_loss:.4f}  perplexity {math.exp(min(validation_loss, 700)):.2f}"
        )
        if sample is not None:
            self.tell(f"step {step}  sample: {sample}")

    def tasks(self, *, step: int, scores: dict[str, float]) -> None:
        """Zero-shot scores, `task/score` → value, as a line of their own."""
        if not self.active:
            return
        self._log({"step": step, **scores})
        self.tell(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def sync(self) -> None:
        """All lines are on the disk when this returns; raises StorageError where one could not be written."""
        if self._error is not None:
            raise self._error
        if self.active:
            self._file.sync()

    def close(self) -> None:
        if self.active:
            self._file.close()
            self._wandb.close()
            self._tensorboard.close()


def duration(seconds: float) -> str:
    """Seconds as 1 d 2 h, 3 h 20 min, 4 min 5 s or 6 s."""
    whole = round(seconds)
    for unit, name, below, below_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // below} {below_name}"
    return f"{whole} s"
