"""What became of an attempt: who failed first, what it said last, and the exit code of the whole.

0     every rank ended with 0
85    they were told to stop, and saved (REQUEUE_EXIT_CODE)
else  that of the rank that failed first (128 + N when signal N killed it)
7     a machine was lost, or the ranks only say that another one is gone (PEER_EXIT_CODE)
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.config import PEER_EXIT_CODE, REQUEUE_EXIT_CODE
from launch.logs import quote, say


@dataclass
class Ended:
    """One rank's end."""

    code: int
    """As subprocess gives it: -N for signal N."""
    after_s: float
    """Since the start of the attempt."""
    killed: bool
    """By the launcher, since it had not ended."""
    log: str
    host: str = ""
    """Empty: this machine."""
    lines: list[str] = field(default_factory=list)
    """The last lines of its log, of a rank that failed."""

    def how(self) -> str:
        where = f" on {self.host}" if self.host else ""
        if self.killed:
            return f"{where} had not ended and was killed by the launcher".lstrip()
        if self.code < 0:
            return f"{where} was killed by {signal.Signals(-self.code).name}".lstrip()
        return f"{where} ended with exit code {self.code}".lstrip()


@dataclass(frozen=True)
class Outcome:
    """One attempt's."""

    code: int
    told: bool = False
    """Stopped because this launch was told to: nothing is to be started again."""
    last_line: str = ""
    """What the first failure said last."""
    lost: bool = False
    """A machine is gone, or did not answer."""


def blame(ended: Mapping[int, Ended], told: signal.Signals | None) -> list[int]:
    """Ranks that ended badly, the cause before what followed from it.

    First those that ended by themselves in the order of time, then those that only say that another one is gone
    (PEER_EXIT_CODE), then those that the launcher killed. A rank that died of the very signal that asked it to stop,
    before it could listen, did not end badly: it has nothing to lose. Nor did those that waited for it in vain.
    """
    fine = {0, REQUEUE_EXIT_CODE} | ({-told} if told else set())
    in_vain = cut_short(ended, told)
    return sorted(
        (
            rank
            for rank, end in ended.items()
            if end.code not in fine and not (in_vain and (end.killed or end.code == PEER_EXIT_CODE))
        ),
        key=lambda rank: (ended[rank].killed, ended[rank].code == PEER_EXIT_CODE, ended[rank].after_s),
    )


def cut_short(ended: Mapping[int, Ended], told: signal.Signals | None) -> bool:
    """Whether a rank died of the signal that asked it to stop, in its start: the others cannot come further."""
    return told is not None and any(end.code == -told for end in ended.values())


def conclude(
    ended: Mapping[int, Ended],
    *,
    world_size: int,
    told: signal.Signals | None,
    any_started: bool,
    starter: tuple[str, Sequence[str]],
    lost: Sequence[str] = (),
) -> Outcome:
    """Say what became of the ranks, the first failure first.

    starter: the name and the last lines of the starter's log. lost: machines that are gone, each with why.
    """
    failures = blame(ended, told)
    # What went wrong before a machine was lost is the cause; after it, only what a rank found out by itself is news.
    if lost and not any(not ended[r].killed and ended[r].code != PEER_EXIT_CODE for r in failures[:1]):
        for line in lost:
            say(line)
        for rank in failures:
            say(f"then rank {rank} {ended[rank].how()}; see {ended[rank].log}")
        return Outcome(PEER_EXIT_CODE, told=told is not None, last_line=lost[0], lost=True)
    if failures:
        first = ended[failures[0]]
        say(f"rank {failures[0]} of {world_size} {first.how()} after {first.after_s:.1f} s; from {first.log}:")
        quote(first.lines)
        for rank in failures[1:]:
            say(f"then rank {rank} {ended[rank].how()}; see {ended[rank].log}")
        for line in lost:
            say(f"then {line}")
        code = first.code if first.code > 0 else 128 - first.code
        return Outcome(code, told=told is not None, last_line=(first.lines or [""])[-1], lost=bool(lost))
    missing = [rank for rank in range(world_size) if rank not in ended]
    if missing and not (told and not any_started):
        name, lines = starter
        say(f"rank {missing[0]} of {world_size} was not started or has left no exit code; from {name}:")
        quote(lines)
        return Outcome(1, told=told is not None, last_line=(list(lines) or [""])[-1])
    if missing or any(end.code != 0 for end in ended.values()):
        say("stopped as told; the same command goes on from the newest checkpoint")
        return Outcome(REQUEUE_EXIT_CODE, told=True)
    return Outcome(0)
