"""What ends a command with one clear line, and the exit code that says which of these it was.

    GPT2TrainError                exit code 1
    ├── ConfigError               2   settings that cannot work; all of them, together
    ├── RunExistsError            2   starting from nothing over an existing run, without the explicit word
    ├── RunInUseError             3   another process owns the run folder
    ├── RemoteError               4   the last checkpoint could not be copied to checkpoint.remote; it is intact here
    ├── StorageError              4   no space, or an I/O error, where something is written; what was there is intact
    ├── CheckpointError           5   no whole checkpoint where one was asked for
    ├── NonFiniteError            6   a loss or gradient is not finite; the update was not made
    └── PeerError                 7   a rank died or stopped; the cause is named

A run that was asked to stop (SIGTERM, SIGUSR1, Ctrl-C) saves and exits with REQUEUE_EXIT_CODE.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

REQUEUE_EXIT_CODE = 85
"""Exit code of a run that saved and stopped because it was told to; start it again and it goes on."""


class GPT2TrainError(Exception):
    """Ends the command with `exit_code` and one clear line; a traceback is for bugs only."""

    exit_code = 1


class ConfigError(GPT2TrainError):
    """Settings that cannot work: `faults` holds one line each (field, value, bound, remedy)."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__(self.faults)  # as its arguments, so that it comes whole through a pickle from a worker

    def __str__(self) -> str:
        return "\n".join(self.faults)


class RunExistsError(GPT2TrainError):
    exit_code = 2


class RunInUseError(GPT2TrainError):
    exit_code = 3


class RemoteError(GPT2TrainError):
    exit_code = 4


class StorageError(GPT2TrainError):
    exit_code = 4


class CheckpointError(GPT2TrainError):
    exit_code = 5


class NonFiniteError(GPT2TrainError):
    exit_code = 6


class PeerError(GPT2TrainError):
    exit_code = 7


STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""What the storage says, whatever place was named: no room, no more of the quota, broken, read-only, a file's limit."""


def write_error(place: str | Path, error: OSError, remedy: str = "") -> GPT2TrainError:
    """What to raise where `place` (a path, or the setting that names it) cannot be written.

    A StorageError where the storage is to be mended; else, as for a place without rights, a GPT2TrainError with
    `remedy`.
    """
    line = f"{place}: cannot be written ({error.strerror or error})"
    if error.errno in STORAGE_ERRNOS:
        return StorageError(f"{line}; what was there before is intact, make room and run the same command again")
    return GPT2TrainError(f"{line}; {remedy}" if remedy else line)
