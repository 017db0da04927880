"""All ranks of a command on this machine, once: started, watched, told to stop, and never left behind.

In: what to start, which ranks that makes, and the folder of their logs. Out: an `Outcome`, and a log file per rank. Its
exit code:

    0     every rank ended with 0
    85    they were told to stop, and saved (REQUEUE_EXIT_CODE)
    else  that of the rank that failed first (128 + N when signal N killed it); its last lines are shown

Whatever the starter, a rank runs inside launch.rank, which writes its log and its exit code and goes down with the
launcher.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launch import logs
from launch import ranks as around
from launch.outcome import Outcome, blame, conclude
from launch.rank import file_of
from launch.ranks import Orders, Ranks, Start, clear_away, start_all, stop_signals, watch


def run_ranks(starts: Sequence[Start], *, processes: int, log_dir: Path, stop_timeout_s: float) -> Outcome:
    """Start, watch and end ranks 0 to `processes` - 1.

    Rank 0's output goes to standard output too. SIGTERM, SIGINT (as SIGTERM) and SIGUSR1 are handed on to all ranks
    once; a second one kills them.
    """
    with stop_signals() as received:
        ranks = Ranks(log_dir, range(processes))
        rank_zero, shown = logs.Tail(file_of(log_dir, 0, "log")), logs.Shown()

        def show() -> None:
            for block in rank_zero.read():
                shown.write(block)

        began_s = time.monotonic()
        told: signal.Signals | None = None
        starters = start_all(starts, ranks, logs.starter_log(log_dir))
        try:
            told = watch(
                ranks,
                starts,
                starters,
                Orders(received),
                stop_timeout_s=stop_timeout_s,
                peer_grace_s=around.PEER_GRACE_S,
                say=logs.say,
                each_look=show,
            )
        finally:
            clear_away(ranks, starters)
            show()
    ended = ranks.ends(began_s)
    for rank in blame(ended, told)[:1]:
        ended[rank].lines = logs.last_lines(file_of(log_dir, rank, "log"))
    return conclude(
        ended,
        world_size=processes,
        told=told,
        any_started=bool(ranks.started),
        starter=("starter.log", logs.last_lines(logs.starter_log(log_dir))),
    )
