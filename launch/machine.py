"""What this machine has: GPUs, cores, a free port. Without importing torch, so that a launch answers at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
NVIDIA_SMI_TIMEOUT_S = 30.0  # a machine with eight GPUs and no persistence daemon takes seconds


def count_gpus(environment: Mapping[str, str] = os.environ, driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """CUDA GPUs that a process started with `environment` would see.

    CUDA_VISIBLE_DEVICES decides where it is set (CUDA C++ Programming Guide, "CUDA Environment Variables": a
    comma-separated list, of which only what stands before the first invalid entry counts); then nvidia-smi; then the
    driver's folder, for containers without nvidia-smi.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        entries = [e.strip() for e in visible.split(",")]
        invalid = [i for i, e in enumerate(entries) if not e or e.startswith("-")]
        return min(invalid, default=len(entries))
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program:
        try:
            listed = subprocess.run(
                [program, "--query-gpu=index", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=NVIDIA_SMI_TIMEOUT_S,
                check=True,
            )
            return len(listed.stdout.split())
        except (subprocess.SubprocessError, OSError):
            pass  # no driver loaded, or one that does not answer: the kernel knows better
    return sum(1 for _ in driver.iterdir()) if driver.is_dir() else 0


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A TCP port that nobody listens on at LOOPBACK at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Could a server listen on `port` at LOOPBACK?"""
    with socket.socket() as probe:
        # As servers do: a port that only holds connections that are closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except OSError:
            return False
    return True
