"""What `benchmarks.gpu` imports: a machine lent for its GPU has torch and DeepSpeed, and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import benchmarks.gpu, gpt2train.distributed, gpt2train.engine, gpt2train.metrics, gpt2train.network.loss
config = benchmarks.gpu.configuration("nano", 2, 2)
rows = benchmarks.gpu.batches(config, benchmarks.gpu.torch.device("cpu"), 0, 2, 2)
print([tuple(row.shape) for row in rows], config.model.context)
"""


def test_it_needs_neither_the_corpuss_packages_nor_safetensors() -> None:
    refused = "pyarrow,tiktoken,safetensors,transformers,aiohttp,wandb,rich,datasets,trafilatura,resiliparse"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, refused], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    shapes, context = done.stdout.rsplit(" ", 1)
    assert shapes == f"[(2, {int(context) + 1}), (2, {int(context) + 1})]"
