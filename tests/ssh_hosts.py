"""Two hosts on one machine: network namespaces with a cable between them and an sshd of its own in each.

Needs root, iproute2 and openssh-server; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = ("10.77.1.1", "10.77.1.2")


def missing() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in ("ip", "ssh", "ssh-keygen") if shutil.which(tool) is None]
    if not tools and not _sshd():
        tools = ["sshd (Debian: openssh-server)"]
    if tools:
        return f"not installed: {', '.join(tools)}"
    return no_namespaces()


def no_namespaces() -> str:
    """Why a namespace with a cable cannot be made here, by making one; empty when it can."""
    space = f"g2probe{os.getpid()}"
    cable = ["ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", "eth1", "netns", space]
    try:
        for command in (["ip", "netns", "add", space], cable):
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode:
                return f"no network namespaces here: {tried.stderr.strip()}"
        return ""
    finally:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@dataclass
class Hosts:
    """Names are the addresses; the launcher stands on the first one."""

    spaces: tuple[str, str]
    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def inside(self, number: int) -> list[str]:
        """Words before a command that is to run on host `number`."""
        return ["ip", "netns", "exec", self.spaces[number]]

    def ssh_words(self) -> list[str]:
        """What `hosts.ssh` needs: the test's own keys and nothing of this user's."""
        return [
            *("-F", "none", "-i", str(self.folder / "key"), "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.folder / 'known'}", "-o", "StrictHostKeyChecking=yes"),
        ]

    def processes(self, number: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.spaces[number]], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def pull_the_plug(self, number: int) -> None:
        """The link goes first, so that nobody can say goodbye; then every process."""
        subprocess.run(["ip", "-n", self.spaces[number], "link", "set", "eth0", "down"], check=True)
        self.kill(number)

    def kill(self, number: int) -> None:
        for pid in self.processes(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def boot(self, number: int) -> None:
        """The link, and sshd until it answers."""
        space = self.spaces[number]
        for device in ("lo", "eth0"):
            subprocess.run(["ip", "-n", space, "link", "set", device, "up"], check=True)
        config = self.folder / f"sshd_config.{number}"
        config.write_text(
            f'HostKey "{self.folder / "host_key"}"\n'
            f'AuthorizedKeysFile "{self.folder / "key.pub"}"\n'
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            f"PidFile none\nListenAddress {ADDRESSES[number]}\n"
        )
        sshd = _sshd()
        assert sshd is not None
        with open(self.folder / f"sshd.{number}.log", "ab") as log:
            daemon = subprocess.Popen(
                [*self.inside(number), sshd, "-D", "-e", "-f", str(config)], stderr=log, stdin=subprocess.DEVNULL
            )
        self.daemons.append(daemon)
        deadline_s = time.monotonic() + 30
        probe = [*self.inside(number), "bash", "-c", f"exec 3<>/dev/tcp/{ADDRESSES[number]}/22"]
        while subprocess.run(probe, capture_output=True).returncode:
            assert daemon.poll() is None, (self.folder / f"sshd.{number}.log").read_text()
            assert time.monotonic() < deadline_s, "sshd does not listen"
            time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Both hosts, booted; at the end every process on them is killed and the namespaces are gone."""
    folder.mkdir(parents=True)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known").write_text("".join(f"{address} {host_key}\n" for address in ADDRESSES))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's own empty folder; a package makes it at boot
    spaces = (f"g2t{os.getpid()}a", f"g2t{os.getpid()}b")
    hosts = Hosts(spaces, folder)
    try:
        for space in spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
        cable = ["ip", "link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*cable, "netns", spaces[1]], check=True)
        for space, address in zip(spaces, ADDRESSES, strict=True):
            subprocess.run(["ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        for number in (0, 1):
            hosts.boot(number)
        yield hosts
    finally:
        for number, space in enumerate(spaces):
            with contextlib.suppress(FileNotFoundError):
                hosts.kill(number)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for daemon in hosts.daemons:
            daemon.wait(30)
