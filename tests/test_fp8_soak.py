"""Training with fp8 products, by `make soak`: torchao rounds as an H100 would, with ordinary products, on any machine.

torchao is put into a folder of this test's: transformers imports it wherever it is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS, LAST = 300, 20

TRAINED = """
import json, statistics, sys
from pathlib import Path
import numpy as np, torch
from gpt2train.config import ModelConfig
from gpt2train.model import GPT
from gpt2train.network.float8 import to_float8
from gpt2train.optim import adamw
from gpt2train.config import OptimizerConfig

RATE = 1e-3
root, steps = Path(sys.argv[1]), int(sys.argv[2])
files = sorted([*(root / "docs").rglob("*.md"), *(root / "gpt2train").rglob("*.py")])
text = b"".join(path.read_bytes() for path in files)
data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
config = ModelConfig(layers=4, channels=128, heads=4, context=128, vocabulary=256)
found = {}
for name in ("fp32", "bf16", "fp8"):
    model = GPT(config, seed=1)
    if name == "fp8":
        to_float8(model, torch.device("cpu"), emulate=True)
    optimizer = adamw(model, OptimizerConfig(lr=RATE), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(data) - 129, (16,), generator=generator)
        rows = torch.stack([data[s : s + 129] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "fp32"):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # or the three go ways of their own within 100 steps
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found[name] = losses
print(json.dumps(found))
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_losses_hold_with_fp8_products(tmp_path: Path) -> None:
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([sys.executable, *install, "--target", str(tmp_path), "torchao>=0.14"], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    layers = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "fp8_is_the_same"]
    done = subprocess.run(
        [sys.executable, *layers], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "1 passed" in done.stdout, done.stdout
    script = [sys.executable, "-c", TRAINED, str(ROOT), str(STEPS)]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    last = {name: sum(of[-LAST:]) / LAST for name, of in losses.items()}
    apart = {name: max(abs(a - b) for a, b in zip(losses[name], losses["fp32"], strict=True)) for name in losses}
    print(f"last {LAST} of {STEPS} steps: {last}; at most apart from fp32: {apart}")
    assert last["fp32"] < losses["fp32"][0] - 2, "it has learned"
    assert losses["fp8"] != losses["bf16"]
    assert abs(last["bf16"] - last["fp32"]) < 0.002
    assert abs(last["fp8"] - last["fp32"]) < 0.02
