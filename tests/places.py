"""Where the optional real data lies: GPT2TRAIN_SHARED_DATA, or `shared/data` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.get("GPT2TRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
