"""metrics.jsonl as one curve without gap or double; sinks that cannot stop a run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2train.config import ModelConfig, Precision, TrainConfig, WandbMode
from gpt2train.metrics import (
    MetricsFile,
    Reporter,
    TensorBoard,
    Wandb,
    duration,
    peak_flops,
    wandb_history,
    wandb_records,
)


def lines(run_dir: Path) -> list[bytes]:
    return (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def fill(run_dir: Path, first: int, last: int) -> None:
    file = MetricsFile(run_dir, after_step=first - 1)
    for step in range(first, last + 1):
        file.write({"step": step, "loss": 1 / step})
        if step % 5 == 0:
            file.write({"step": step, "validation_loss": 2 / step})
    file.close()


def test_floats_read_back_as_the_same_numbers(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.random() * 10 ** rng.randint(-300, 300) for _ in range(500)]
    file = MetricsFile(tmp_path, after_step=0)
    for step, value in enumerate(values, start=1):
        file.write({"step": step, "loss": value})
    file.write({"step": 501, "loss": float("nan"), "grad_norm": float("inf")})
    file.close()
    read = [json.loads(line) for line in lines(tmp_path)]
    assert [entry["loss"] for entry in read[:-1]] == values
    assert read[-1] == {"step": 501, "loss": None, "grad_norm": None}


def test_every_line_is_on_its_way_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, after_step=0)
    file.write({"step": 1, "loss": 1.0})
    assert lines(tmp_path) == [b'{"step": 1, "loss": 1.0}\n']
    file.close()


@pytest.mark.parametrize("after_step", [0, 1, 9, 10, 11, 20, 30])
def test_lines_after_the_checkpoint_are_cut(tmp_path: Path, after_step: int) -> None:
    fill(tmp_path, 1, 20)
    before = lines(tmp_path)
    file = MetricsFile(tmp_path, after_step=after_step)
    file.close()
    kept = [line for line in before if json.loads(line)["step"] <= after_step]
    assert lines(tmp_path) == kept
    assert file.cut_lines == len(before) - len(kept)


def test_a_torn_last_line_is_cut_at_every_length(tmp_path: Path) -> None:
    fill(tmp_path, 1, 7)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start + 1, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        file = MetricsFile(tmp_path, after_step=100)
        file.close()
        assert file.cut_lines == 1
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole[:start]


def test_going_on_gives_the_file_of_an_undisturbed_run(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    fill(one, 1, 30)
    fill(two, 1, 17)
    fill(two, 11, 23)
    fill(two, 16, 30)
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_a_full_disk_ends_in_one_line(tmp_path: Path) -> None:
    """A real write error: the kernel refuses to let any file of the child grow beyond 1,000 bytes."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from gpt2train.metrics import MetricsFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "f = MetricsFile(Path(sys.argv[1]), after_step=0)\n"
        "try:\n for step in range(1, 200): f.write({'step': step, 'loss': 1.0})\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "StorageError" in done.stdout, done.stderr
    assert "metrics.jsonl: cannot be written (File too large); the checkpoints are intact" in done.stdout
    assert (tmp_path / "metrics.jsonl").stat().st_size == 1000
    MetricsFile(tmp_path, after_step=10**6).close()
    assert len(lines(tmp_path)) == 1000 // len(b'{"step": 10, "loss": 1.0}\n')
    assert all(line.endswith(b"\n") for line in lines(tmp_path))


def config(run_dir: Path, wandb: WandbMode = WandbMode.off) -> TrainConfig:
    made = TrainConfig(model=ModelConfig(layers=2, channels=16, heads=2, context=8), run_dir=str(run_dir), steps=20)
    made.batch.sequences = 4
    made.logging.wandb = wandb
    return made


def test_a_step_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(
        config(tmp_path), active=True, run_id="x", after_step=9, ranks=2, device_name="NVIDIA H100 80GB HBM3"
    )
    reporter.start_clock()
    reporter.step(step=10, loss=3.25, lr=1e-3, grad_norm=0.5, tokens=320)
    reporter.step(step=11, loss=3.0, lr=1e-3, grad_norm=0.5, tokens=352)
    reporter.evaluation(step=11, validation_loss=3.5)
    reporter.close()
    first, second, evaluation = (json.loads(line) for line in lines(tmp_path))
    assert first.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu"}
    assert (first["step"], first["loss"], first["tokens"]) == (10, 3.25, 320)
    # MFU by its definition: (6N + 12·layers·channels·context) · tokens/s ÷ peak of two H100
    parameters = (50_257 + 8) * 16 + 2 * (12 * 256 + 13 * 16) + 32
    flops = 6 * parameters + 12 * 2 * 16 * 8
    assert second["mfu"] == pytest.approx(flops * second["tokens_per_s"] / (2 * 989e12))
    assert evaluation == {"step": 11, "validation_loss": 3.5}
    shown = capsys.readouterr().err
    assert "step 10/20  loss 3.2500  lr 1.00e-03  gradient norm 0.500" in shown
    assert "MFU" in shown
    assert "step 11  validation loss 3.5000  perplexity 33.12" in shown


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(config(tmp_path), active=False, run_id="x", after_step=0, ranks=2, device_name="cpu")
    reporter.step(step=10, loss=3.25, lr=1e-3, grad_norm=0.5, tokens=320)
    reporter.evaluation(step=10, validation_loss=3.5)
    reporter.sync()
    reporter.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_peaks_are_of_the_device_named() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.bf16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", Precision.bf16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", Precision.bf16) == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.fp32) is None
    assert peak_flops("cpu", Precision.bf16) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.4, "6 s"), (245, "4 min 5 s"), (12_000, "3 h 20 min"), (93_600, "1 d 2 h"), (59.6, "1 min 0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def wait_for_ends(files: list[Path], ends: int) -> None:
    """The sink's own service writes: on a busy machine `finish` may come back before the last records are there."""
    deadline_s = time.monotonic() + 60
    while sum(r.WhichOneof("record_type") == "exit" for file in files for r in wandb_records(file)) < ends:
        assert time.monotonic() < deadline_s, "the sink did not end its files"
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb's own dependencies
def test_weights_and_biases_offline_keeps_its_run(tmp_path: Path) -> None:
    told: list[str] = []
    for step in (1, 2):
        settings = config(tmp_path, WandbMode.offline)
        settings.logging.wandb_group = "ladder"
        sink = Wandb(settings, "abc123", told.append)
        sink.log({"step": step, "loss": 1.0})
        sink.close()
        files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        wait_for_ends(files, step)
    assert told == []
    assert {path.name for path in files} == {"run-abc123.wandb"}
    # One curve, whether the two starts fell into one second, which gives the second folder a number, or not.
    assert [step for path in files for step, _ in wandb_history(path)] == [1, 2]
    started = [r.run for path in files for r in wandb_records(path) if r.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.run_group) for run in started} == {("abc123", "ladder")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_and_biases_shows_one_curve_after_a_kill(tmp_path: Path) -> None:
    """Real processes with a real sink offline: killed behind its checkpoint, gone on from there, and finished."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from test_metrics import config; from gpt2train.config import WandbMode\n"
        "from gpt2train.metrics import Reporter\n"
        "after, last, kill = (int(word) for word in sys.argv[3:])\n"
        "r = Reporter(config(Path(sys.argv[2]), WandbMode.offline), active=True, run_id='abc123', after_step=after,\n"
        "             ranks=1, device_name='cpu')\n"
        "for step in range(after + 1, last + 1):\n"
        "    r.step(step=step, loss=1 / step, lr=1e-3, grad_norm=0.5, tokens=step)\n"
        "    if step % 5 == 0: r.evaluation(step=step, validation_loss=2 / step)\n"
        "if kill: os.kill(os.getpid(), signal.SIGKILL)\n"
        "r.close()\n"
    )
    # What a kill takes from the sink is shown again by the next start, from metrics.jsonl.
    # On a machine at work wandb's own start may run into its time limit; then the next start shows what it missed.
    starts = [(0, 13, 1), (10, 17, 1), (10, 20, 0), (20, 20, 0), (20, 20, 0)]
    for after, last, kill in starts:
        words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), *map(str, (after, last, kill))]
        # Without the service of a test before, which the sink hands to its children through the environment.
        own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=own)
        assert done.returncode == (-9 if kill else 0), done.stderr
        if (after, last) == (10, 20) and "is off for this start" not in done.stderr:
            break
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    shown = [row for file in files for row in wandb_history(file)]
    curve = [step for step, values in shown if "loss" in values]
    assert curve == list(range(1, 21))
    assert [values["loss"] for _, values in shown if "loss" in values] == [1 / step for step in range(1, 21)]
    assert [step for step, values in shown if "validation_loss" in values] == [5, 10, 15, 20]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_account_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    told: list[str] = []
    sink = Wandb(config(tmp_path, WandbMode.online), "abc123", told.append)
    sink.log({"step": 1, "loss": 1.0})
    sink.close()
    assert len(told) == 1
    assert told[0].startswith("Weights & Biases is off for this start (")


def test_tensorboard_shows_one_curve_after_a_kill_and_a_rewind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path)
    settings.logging.tensorboard = True

    def start(first: int, last: int, rewind: tuple[int, int] | None = None) -> None:
        reporter = Reporter(settings, active=True, run_id="x", after_step=first - 1, ranks=1, device_name="cpu")
        step = first
        while step <= last:
            if rewind and step == rewind[0]:
                step, rewind = rewind[1] + 1, None
                reporter.rewind(to=step - 1, after=step + 2, reason="loss nan")
            layers = {"h.0": {"grad_norm": step * 2.0}} if step == 10 else None
            reporter.step(step=step, loss=1 / step, lr=1e-3, grad_norm=0.5, tokens=step, layers=layers)
            step += 1
        reporter.evaluation(step=last, validation_loss=2.0, sample="Once upon a time")
        reporter.close()

    start(1, 14)  # killed; the newest checkpoint is of step 8
    start(9, 20, rewind=(13, 9))
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(1 / s)) for s in range(1, 21)]
    assert [(e.step, e.value) for e in events.Scalars("layers/h.0/grad_norm")] == [(10, 20.0)]
    assert [e.step for e in events.Scalars("validation_loss")] == [20]
    assert events.Tensors("sample/text_summary")[-1].tensor_proto.string_val == [b"Once upon a time"]
    entries = [json.loads(line) for line in lines(tmp_path)]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 21))
    assert [e["step"] for e in entries if "rewound_from" in e] == [10]


def test_without_tensorboard_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = config(tmp_path)
    settings.logging.tensorboard = True
    told: list[str] = []
    sink = TensorBoard(settings, 0, told.append)
    sink.log({"step": 1, "loss": 1.0})
    sink.close()
    assert told == ["TensorBoard is off: it is not installed; `pip install gpt2train[tensorboard]`"]
