"""What this machine has: GPUs, cores, a free port. Without importing torch, so that a launch answers at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launch.config import Gpus, LaunchConfig

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


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port that nobody listens on at `address` at this moment; "": at none of this machine's addresses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int, address: str = LOOPBACK) -> bool:
    """Could a server listen on `port` at `address`?"""
    with socket.socket() as probe:
        # As servers do: a port that only holds connections that are closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except OSError:
            return False
    return True


def machine_faults(
    config: LaunchConfig, gpus: int, environment: Mapping[str, str] = os.environ, *, address: str = LOOPBACK
) -> list[str]:
    """What this machine, with `gpus` GPUs, cannot give, one line each. address: where the ranks are to meet."""
    faults = []
    if config.gpus is Gpus.required and not gpus:
        hidden = " (CUDA_VISIBLE_DEVICES hides them)" if "CUDA_VISIBLE_DEVICES" in environment else ""
        faults.append(f"gpus=required: no GPU is visible here{hidden}; see nvidia-smi, or train with device=cpu")
    elif 0 < gpus < config.processes:
        faults.append(
            f"processes={config.processes}: each needs a GPU and {gpus} are visible; give processes={gpus}, or "
            f"gpus=none to train on the CPU"
        )
    if 0 < config.port < 65536 and not port_is_free(config.port, address):
        where = f"at {address}" if address else "here"
        faults.append(f"port={config.port}: in use {where}; give another, or leave it out for a free one")
    return faults
