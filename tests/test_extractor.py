"""The process that extracts can be killed, hang, crash, and run out of memory: one page is lost, never two."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import alive
from pages import ARTICLE, PATHOLOGICAL, SHARED, URL, needs_pages, one_page

from data_pipeline.clean.extract import Extractor, ExtractorError, extractor_of_thread
from data_pipeline.clean.html_text import Extracted, Rejected, page_text
from data_pipeline.config import ExtractConfig
from data_pipeline.records import FAILED


def test_pathological_pages_end_in_time_and_the_next_page_is_not_touched() -> None:
    expected = one_page(ARTICLE)
    config = ExtractConfig(timeout_s=1.0)
    with Extractor(config) as extractor:
        outcomes = {}
        for name, body in PATHOLOGICAL.items():
            assert extractor.extract(ARTICLE, URL, "text/html", "2026-11-01") == expected
            began = time.monotonic()
            outcomes[name] = extractor.extract(body, URL, "text/html")
            # Twice the processor time on the clock, and a moment for the kill on a machine that is at work for others.
            assert time.monotonic() - began < 2 * config.timeout_s + 8, name
    timed_out = [n for n, o in outcomes.items() if isinstance(o, Rejected) and o.reason == "extract_timeout"]
    assert "attributes" in timed_out  # measured: more than 5 s
    assert all(outcomes[n].state == FAILED for n in timed_out)
    big = outcomes["50 MB"]
    assert isinstance(big, Rejected)
    assert big.reason == "html_too_large"


def test_a_child_killed_from_outside_changes_nothing() -> None:
    expected = one_page(ARTICLE)
    with Extractor(ExtractConfig(timeout_s=5)) as extractor:
        extractor.extract(ARTICLE, URL)
        first = extractor.pid
        assert first is not None
        # In mid-page: the page's second try, in a fresh process, gives what it would have given.
        threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
        links = b"<html><body><ul>" + b"<li><a href=x>y" * 100_000
        undisturbed = page_text(links, URL, "text/html", "", ExtractConfig())
        assert extractor.extract(links, URL, "text/html") == undisturbed
        assert extractor.pid != first
        # Between two pages.
        second = extractor.pid
        assert second is not None
        os.kill(second, signal.SIGKILL)
        assert extractor.extract(ARTICLE, URL, "text/html", "2026-11-01") == expected


def _kill_child_when(extractor: Extractor, ready: Callable[[], bool]) -> threading.Thread:
    """Kill the extractor's child as soon as `ready` says so, within 30 s."""

    def wait_and_kill() -> None:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert extractor.pid is not None
        os.kill(extractor.pid, signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_a_child_killed_while_it_starts_is_started_again() -> None:
    with Extractor(ExtractConfig()) as extractor:
        killer = _kill_child_when(extractor, lambda: extractor.pid is not None)
        assert extractor.extract(ARTICLE, URL, "text/html", "2026-11-01") == one_page(ARTICLE)
        killer.join()


def test_a_page_that_crashes_even_a_fresh_child_is_the_only_one_lost() -> None:
    with Extractor(ExtractConfig(timeout_s=30)) as extractor:
        killer = _kill_child_when(extractor, lambda: extractor.pages == 1)
        outcome = extractor.extract(PATHOLOGICAL["attributes"], URL, "text/html")  # more than 5 s of work
        killer.join()
        assert isinstance(outcome, Rejected)
        assert (outcome.state, outcome.reason) == (FAILED, "extract_crash")
        assert outcome.detail == "the process ended: killed by SIGKILL"
        assert isinstance(extractor.extract(ARTICLE, URL), Extracted)


def test_a_stopped_child_ends_at_the_clocks_bound() -> None:
    with Extractor(ExtractConfig(timeout_s=0.5)) as extractor:
        extractor.extract(ARTICLE, URL)
        assert extractor.pid is not None
        os.kill(extractor.pid, signal.SIGSTOP)
        began = time.monotonic()
        # Larger than a pipe holds: sending must not block on a child that does not read.
        outcome = extractor.extract(ARTICLE + b" " * 500_000, URL)
        assert isinstance(outcome, Rejected)
        assert (outcome.state, outcome.reason) == (FAILED, "extract_timeout")
        assert time.monotonic() - began < 15
        assert isinstance(extractor.extract(ARTICLE, URL), Extracted)


def test_memory_limit_costs_one_page() -> None:
    table = b"<html><body>" + b"<p><b>x</b> <i>y</i> " * 80_000  # its trees take some hundred MB
    with Extractor(ExtractConfig(timeout_s=20, max_memory_mb=64)) as extractor:
        assert isinstance(extractor.extract(ARTICLE, URL), Extracted)
        outcome = extractor.extract(table, URL)
        assert isinstance(outcome, Rejected)
        assert outcome.state == FAILED
        assert outcome.reason in ("extract_memory", "extract_crash")  # some libraries abort instead of raising
        assert isinstance(extractor.extract(ARTICLE, URL), Extracted)


def test_child_is_replaced_after_its_share_of_pages() -> None:
    with Extractor(ExtractConfig(), pages_per_process=2) as extractor:
        pids = []
        for _ in range(4):
            assert isinstance(extractor.extract(ARTICLE, URL), Extracted)
            pids.append(extractor.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_an_idle_child_ends_and_the_next_page_has_another() -> None:
    with Extractor(ExtractConfig(), idle_s=0.5) as extractor:
        outcomes, pids = [], []
        for _ in range(3):
            outcomes.append(extractor.extract(ARTICLE, URL))
            pids.append(extractor.pid)
            assert pids[-1] is not None
            deadline = time.monotonic() + 10
            while Path(f"/proc/{pids[-1]}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.02)
    assert len(set(pids)) == 3
    assert isinstance(outcomes[0], Extracted)
    assert outcomes == [outcomes[0]] * 3


def test_a_page_broken_off_leaves_no_answer_for_the_next() -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with Extractor(ExtractConfig(timeout_s=30)) as extractor:
            expected = extractor.extract(ARTICLE, URL)
            timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Stopped):
                extractor.extract(PATHOLOGICAL["attributes"], URL)  # more than 5 s of work
            timer.join()
            assert extractor.extract(ARTICLE, URL) == expected
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_start_broken_off_leaves_no_answer_for_the_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    exchange = Extractor._exchange

    def stop(self: Extractor, request: bytes, timeout_s: float) -> dict:
        monkeypatch.setattr(Extractor, "_exchange", exchange)
        raise Stopped

    monkeypatch.setattr(Extractor, "_exchange", stop)
    with Extractor(ExtractConfig()) as extractor:
        with pytest.raises(Stopped):
            extractor.extract(ARTICLE, URL, "text/html", "2026-11-01")
        assert extractor.pid is None
        assert extractor.extract(ARTICLE, URL, "text/html", "2026-11-01") == one_page(ARTICLE)


def test_a_thread_keeps_its_extractor_while_the_settings_stay() -> None:
    config = ExtractConfig()
    kept = extractor_of_thread(config, ["en"])
    kept.extract(ARTICLE, URL)
    first = kept.pid
    assert extractor_of_thread(ExtractConfig(), ["en"]) is kept
    others: list[tuple[bool, int | None]] = []

    def of_another_thread() -> None:
        other = extractor_of_thread(config, ["en"])
        other.extract(ARTICLE, URL)
        others.append((other is kept, other.pid))

    thread = threading.Thread(target=of_another_thread)
    thread.start()
    thread.join()
    gc.collect()
    ((same, pid),) = others
    assert not same
    assert not Path(f"/proc/{pid}").exists(), "it ends with its thread, and is waited for"
    assert kept.pid == first is not None
    assert extractor_of_thread(config, ["de"]) is not kept
    assert kept.pid is None
    assert not alive(first)


def test_child_dies_with_a_killed_parent() -> None:
    program = (
        "import sys, time\n"
        "from data_pipeline.config import ExtractConfig\n"
        "from data_pipeline.clean.extract import Extractor\n"
        "e = Extractor(ExtractConfig())\n"
        "e.extract(b'<p>x', 'https://example.org/')\n"
        "print(e.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def _extract_in_a_daemon(answers) -> None:  # type: ignore[no-untyped-def]
    with Extractor(ExtractConfig()) as extractor:
        answers.send(extractor.extract(ARTICLE, URL, "text/html", "2026-11-01").text)


def test_works_in_a_daemonic_worker() -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_extract_in_a_daemon, args=(sender,), daemon=True)
    worker.start()
    assert receiver.poll(60)
    assert receiver.recv() == one_page(ARTICLE).text  # type: ignore[union-attr]
    worker.join(10)


def test_an_extractor_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(ExtractorError, match="no such library"), Extractor(ExtractConfig()) as extractor:
        extractor.extract(ARTICLE, URL)


@needs_pages
def test_a_page_gives_the_same_after_any_predecessors() -> None:
    pages = sorted((SHARED / "pages" / "html").iterdir())[::90]
    bodies = [p.read_bytes() for p in pages]
    with Extractor(ExtractConfig()) as extractor:
        forward = [extractor.extract(b, f"https://example.org/{i}") for i, b in enumerate(bodies)]
    with Extractor(ExtractConfig(), pages_per_process=5) as extractor:
        backward = [extractor.extract(b, f"https://example.org/{i}") for i, b in reversed(list(enumerate(bodies)))]
    assert sum(isinstance(o, Extracted) for o in forward) > len(pages) // 2
    assert forward == backward[::-1]
