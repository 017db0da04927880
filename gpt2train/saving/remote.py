"""Checkpoints in other storage: copied there beside the training, and fetched back where this machine has none.

    s3://bucket/runs/small/
        run.json  config.yaml  versions.json  metrics.jsonl     as they were at the newest checkpoint
        checkpoints/step_00001200/…  manifest.json              the manifest comes last and goes first

The layout is that of a run folder: what was copied down by hand is one. A checkpoint without its manifest is on its
way there, or on its way out, and does not count. Flows in: published checkpoints of the run folder. Flows out: the same
bytes there; on an empty machine the newest checkpoint whose every byte is what was written, with the run's curve up to
it. Rank 0 does all of this; the others see the run folder.

A copy that fails is told and tried again with the next checkpoint, or after a pause: training goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.storage.bucket import reason
from gpt2train import checkpoint
from gpt2train.checkpoint import MANIFEST, STATE, Keep
from gpt2train.config import CheckpointConfig
from gpt2train.errors import RunExistsError
from gpt2train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    RUN,
    VERSIONS,
    checkpoint_folders,
    read_json,
    replace_file,
)
from gpt2train.saving.bucket import Bucket

RECORDS = (CONFIG, VERSIONS, METRICS, RUN)
PAUSE_S = 30.0
"""Until a copy that failed is tried again, where no newer checkpoint comes first."""

_log = logging.getLogger(__name__)


class Remote:
    """One run's place. A call takes as long as the storage does, and raises RemoteError where it does not answer."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._bucket = Bucket(config.remote, retry_s=config.remote_retry_s)
        self._transfers = config.remote_transfers
        self.address = self._bucket.address

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there with their manifest, oldest first."""
        names = [name.split("/") for name in self._bucket.list(CHECKPOINTS)]
        found = {parts[1] for parts in names if len(parts) == 3 and parts[2] == MANIFEST}
        return sorted(int(name[5:]) for name in found if name.startswith("step_") and name[5:].isdigit())

    def send(self, run_dir: Path, step: int, keep: Keep) -> None:
        """Copies the checkpoint of `step` and the run's records, then removes what `keep` does not name there."""
        folder = run_dir / CHECKPOINTS / checkpoint.folder_name(step)
        place = f"{CHECKPOINTS}/{folder.name}"
        manifest = (folder / MANIFEST).read_bytes()
        if self._bucket.read(f"{place}/{MANIFEST}") != manifest:
            self._remove(step)  # of a copy cut short, or of a run that was started anew
            files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
            with ThreadPoolExecutor(self._transfers) as pool:
                for done in [pool.submit(self._bucket.put, f"{place}/{path.name}", path) for path in files]:
                    done.result()
            for name in RECORDS:
                if (run_dir / name).is_file():
                    self._bucket.put(name, (run_dir / name).read_bytes())
            self._bucket.put(f"{place}/{MANIFEST}", manifest)
        if keep.last:
            steps = self.steps()
            losses = {at: self._validation_loss(at) for at in steps} if keep.best else {}
            for at in checkpoint.superfluous([at for at in steps if at <= step], losses, keep):
                self._remove(at)

    def fetch(self, run_dir: Path, *, newer_than: int) -> int | None:
        """Brings the newest whole checkpoint of a step above `newer_than` here; gives its step, None for none.

        One whose bytes are not what its manifest says is passed over, with a line. The run's records come along where
        this machine has none. Raises RunExistsError when the place holds another run than the folder.
        """
        theirs = self._bucket.read(RUN)
        if theirs is None:
            return None
        mine = read_json(run_dir / RUN).get("id")
        if mine is not None and mine != json.loads(theirs).get("id"):
            raise RunExistsError(
                f"checkpoint.remote={self.address}: holds another run than {run_dir}; give another place, or "
                f"overwrite=true to start both from nothing"
            )
        for step in reversed([step for step in self.steps() if step > newer_than]):
            beside = self._fetch(run_dir, step)
            if beside is not None:
                self._fetch_records(run_dir, step)  # first, so that a kill in between leaves no run without its curve
                checkpoint.publish(beside, run_dir / CHECKPOINTS / checkpoint.folder_name(step))
                return step
        return None

    def discard(self) -> None:
        """Removes the run that is there; its manifests go first, so that cut short it leaves nothing to go on from."""
        for step in self.steps():
            self._remove(step)
        self._bucket.remove(*RECORDS)

    def _fetch(self, run_dir: Path, step: int) -> Path | None:
        """The folder beside the checkpoints with all of it, verified; None when it is not whole."""
        name = checkpoint.folder_name(step)
        beside = run_dir / CHECKPOINTS / f".{name}.fetched"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            there = self._bucket.list(f"{CHECKPOINTS}/{name}")
            with ThreadPoolExecutor(self._transfers) as pool:
                coming = [pool.submit(self._bucket.get, f, beside / _plain(f), stored) for f, stored in there.items()]
                for arrived in coming:
                    arrived.result()
            wrong = checkpoint.defects(beside, step=step)
        except FileNotFoundError as error:  # removed while it was on its way
            wrong = [str(error)]
        if wrong:
            shutil.rmtree(beside)
            _log.warning("%s/%s/%s is not whole and is passed over: %s", self.address, CHECKPOINTS, name, wrong[0])
            return None
        return beside

    def _fetch_records(self, run_dir: Path, step: int) -> None:
        """Those that are not here; and the curve, where the one here ends before `step`."""
        for name in RECORDS:
            if name != METRICS and (run_dir / name).exists():
                continue
            if name == METRICS and _last_step(run_dir / METRICS) >= step:
                continue
            content = self._bucket.read(name)
            if content is not None:
                replace_file(run_dir / name, content)

    def _validation_loss(self, step: int) -> float | None:
        content = self._bucket.read(f"{CHECKPOINTS}/{checkpoint.folder_name(step)}/{STATE}")
        loss = json.loads(content).get("validation_loss") if content else None
        return float(loss) if isinstance(loss, (int, float)) else None

    def _remove(self, step: int) -> None:
        place = f"{CHECKPOINTS}/{checkpoint.folder_name(step)}"
        names = self._bucket.list(place)
        self._bucket.remove(*sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")))


def _plain(name: str) -> str:
    """The last part of a name in the store: nothing of it leads out of the folder."""
    return name.rsplit("/", 1)[-1]


def _last_step(metrics: Path) -> int:
    """The step of the curve's last line that can be read; -1 without one."""
    if not metrics.exists():
        return -1
    for line in reversed(metrics.read_bytes().splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return -1


class Uploader:
    """Copies published checkpoints in a thread, one at a time, the newest of those that wait.

    uploader = Uploader(remote, run_dir, tell)
    uploader.offer(1200, keep)      # at once
    uploader.needed                 # steps that must not be pruned here meanwhile
    uploader.finish(1200, 600.0)    # whether it is there; waits
    """

    def __init__(self, remote: Remote, run_dir: Path, tell: Callable[[str], None]) -> None:
        self._remote, self._run_dir, self._tell = remote, run_dir, tell
        self._changed = threading.Condition()
        self._waiting: tuple[int, Keep] | None = None
        self._sending: int | None = None
        self._finishing = self._closed = False
        self._sent: int | None = None
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def needed(self) -> frozenset[int]:
        with self._changed:
            waiting = self._waiting[0] if self._waiting else None
            return frozenset(step for step in (waiting, self._sending) if step is not None)

    def offer(self, step: int, keep: Keep) -> None:
        with self._changed:
            self._waiting = step, keep
            self._changed.notify_all()

    def finish(self, step: int, limit_s: float) -> bool:
        """Waits until nothing is on its way, at most `limit_s`; whether `step` was copied last. One try more is made
        of what has failed, and no more is begun after it."""
        with self._changed:
            if self._waiting is not None or self._sending is not None:
                self._tell(f"waiting for the copy to {self._remote.address}, at most {limit_s:g} s")
            self._finishing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting is None and self._sending is None, limit_s)
            self._closed = True
            self._changed.notify_all()
            return self._sent == step

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed or self._waiting is None:
                    return
                (step, keep), self._waiting = self._waiting, None
                self._sending = step
            try:
                self._remote.send(self._run_dir, step, keep)
                error = None
            except Exception as raised:  # whatever the storage and its client make of it
                error = raised
            if error is not None:
                self._tell(f"checkpoint of step {step}: not copied to {self._remote.address} ({reason(error)})")
            with self._changed:
                self._sending = None
                if error is None:
                    self._sent = step
                elif self._waiting is None and not self._finishing:
                    self._waiting = step, keep  # again, after a while or when the run ends; a newer one comes first
                    self._pause(step)
                self._changed.notify_all()

    def _pause(self, step: int) -> None:
        """With the lock, which is let go of meanwhile."""
        mine = step, self._waiting[1] if self._waiting else None
        self._changed.wait_for(lambda: self._finishing or self._waiting != mine, PAUSE_S)


def unsent(remote: Remote, run_dir: Path) -> int | None:
    """Step of the newest checkpoint here that is not there; None when it is."""
    newest = max((int(path.name[5:]) for path in checkpoint_folders(run_dir)), default=None)
    return newest if newest is not None and newest not in remote.steps() else None
