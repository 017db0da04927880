"""Pages in WARC files → documents, each extracted in a process that can be killed.

In: a table of PAGE_SCHEMA and a function that reads a page's body. Out: a table of DOCUMENT_SCHEMA and one verdict for
every page. What happens to a page's bytes is told in `html_text.py`; this room keeps it from doing harm:

    Extractor          owns one child, `python -m data_pipeline.clean.extract`, and talks to it over two pipes
    ├── slow page      the kernel ends the child at `timeout_s` of processor time, the parent at twice that on the clock
    ├── memory         an address-space limit; running into it ends the child
    ├── crash, error   the child is replaced, and the page gets one more try in a fresh process, so that a child that
    │                  was killed from outside, or was worn by earlier pages, changes no page's outcome
    ├── growth         the child is replaced after `PAGES_PER_PROCESS` pages
    ├── idleness       the child ends after `IDLE_S` without a page
    └── parent dies    the child dies with it

Frames on the pipes are length-prefixed JSON and bytes, never pickles. The child's cost is its start, about 1 s with
what its first pages load; a page adds some 0.1 ms to the extraction itself. So a worker keeps one extractor over all
its shards (`extractor_of_thread`).
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from data_pipeline.clean import first_look
from data_pipeline.clean.html_text import Extracted, Rejected, page_text
from data_pipeline.config import ExtractConfig
from data_pipeline.records import (
    DOCUMENT_SCHEMA,
    DROPPED,
    FAILED,
    PipelineError,
    Verdict,
    numbers_to_json,
    verdict_table,
)

# trafilatura's memory was flat over 8,000 pages; this bounds it even for pages that are not like those.
PAGES_PER_PROCESS = 5_000
# Importing the extractors takes 1 s on an idle core; a machine under full load gets this long.
START_TIMEOUT_S = 120.0
START_TRIES = 3
# The clock's bound on a page, as a multiple of its processor time.
WALL_FACTOR = 2.0
# A child that waits so long for its next page ends: its worker has gone on to other stages. The next page starts one.
IDLE_S = 30.0

_REQUEST = struct.Struct(">II")  # bytes of the JSON header, bytes of the body
_RESPONSE = struct.Struct(">I")  # bytes of the JSON answer
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ExtractorError(PipelineError):
    """The extracting process cannot be started at all."""


class _ChildGone(Exception):
    """The child ended without an answer; `str()` says how."""


class Extractor:
    """One killable extracting process, started at the first page. To be used by the thread that made it.

    with Extractor(ExtractConfig()) as extractor:
        outcome = extractor.extract(body, "https://example.org/", "text/html; charset=utf-8")
    """

    def __init__(
        self,
        config: ExtractConfig,
        pages_per_process: int = PAGES_PER_PROCESS,
        languages: Sequence[str] = (),
        idle_s: float = IDLE_S,
    ) -> None:
        """`languages`: pages surely in none of them are left out before extraction; empty: all are taken."""
        self.config = config
        self.languages = list(languages)
        self.pages_per_process = pages_per_process
        self.idle_s = idle_s
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self.pages = 0
        """Pages that the present child was given."""

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # of a thread that has ended

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._child.pid if self._child else None

    def extract(self, body: bytes, url: str, content_type: str = "", fetched_at: str = "") -> Extracted | Rejected:
        """The page's text, or why there is none; never raises for what a page does.

        Args:
            body: the payload, Content-Encoding undone.
            fetched_at: RFC 3339 time of the fetch: dates in the page that lie later are not believed.

        Raises:
            ExtractorError: the process cannot be started.
        """
        if len(body) > self.config.max_html_bytes:  # not worth sending
            return page_text(body, url, content_type, fetched_at, self.config, self.languages)
        header = json.dumps({"url": url, "content_type": content_type, "fetched_at": fetched_at}).encode()
        request = _REQUEST.pack(len(header), len(body)) + header + body
        numbers = {"html_bytes": len(body)}
        while True:
            if self.pages >= self.pages_per_process:
                self.close()
            if self._child is None:
                self._start()
            fresh, self.pages = self.pages == 0, self.pages + 1
            try:
                answer = self._exchange(request, WALL_FACTOR * self.config.timeout_s)
            except TimeoutError:
                self.close()
                detail = f"not done after {WALL_FACTOR * self.config.timeout_s:g} s on the clock"
                return Rejected(FAILED, "extract_timeout", detail, numbers)
            except _ChildGone as gone:
                code = self._end_of_child()
                if code == -signal.SIGPROF:
                    detail = f"more than {self.config.timeout_s:g} s of processor time (extract.timeout_s)"
                    return Rejected(FAILED, "extract_timeout", detail, numbers)
                if not fresh:
                    continue
                return Rejected(FAILED, "extract_crash", f"{gone}: {_how_it_ended(code)}", numbers)
            except BaseException:  # broken off in mid-frame: the next page must not get this one's answer
                self.close()
                raise
            if answer.get("memory"):
                self.close()
                if not fresh:
                    continue
                detail = f"more than {self.config.max_memory_mb} MiB (extract.max_memory_mb)"
                return Rejected(FAILED, "extract_memory", detail, numbers)
            if "extracted" in answer:
                return Extracted(**answer["extracted"])
            outcome = Rejected(**answer["rejected"])
            if outcome.reason == "extract_error" and not fresh:  # it may be the process's fault, not the page's
                self.close()
                continue
            return outcome

    def close(self) -> None:
        """End the child, if there is one; the next page starts another."""
        if self._child is not None:
            self._child.kill()
            self._end_of_child()

    def _end_of_child(self) -> int:
        """Wait for the child, which closed its pipes or was killed, and forget it; its exit code."""
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            code = self._child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()
        if self._stderr is not None:
            self._stderr.close()
        self._child, self._stderr, self.pages = None, None, 0
        return code

    def _start(self) -> None:
        """Start a child; one that is killed from outside while it starts is started again, START_TRIES times in all."""
        for tries_left in reversed(range(START_TRIES)):
            try:
                self._start_once()
                return
            except (TimeoutError, _ChildGone) as e:
                assert self._stderr is not None
                self._stderr.seek(0)
                last_lines = b"\n".join(self._stderr.read().splitlines()[-3:]).decode(errors="replace")
                code = self._end_of_child()
                if code >= 0 or tries_left == 0 or isinstance(e, TimeoutError):
                    message = f"the extracting process did not start ({e}, {_how_it_ended(code)}): {last_lines}"
                    raise ExtractorError(message) from None
            except BaseException:  # broken off: the first page must not get the answer to the start
                self.close()
                raise

    def _start_once(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # A fixed hash seed and time zone: what extraction makes of a page must not vary from process to process.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "TZ": "UTC"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.clean.extract"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env=environment,
            cwd=Path(__file__).parents[1],  # where `-m` finds no file of the user's
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        os.set_blocking(self._child.stdout.fileno(), False)
        config = dataclasses.asdict(self.config)
        said = {"parent": os.getpid(), "config": config, "languages": self.languages, "idle_s": self.idle_s}
        settings = json.dumps(said).encode()
        self._exchange(_RESPONSE.pack(len(settings)) + settings, START_TIMEOUT_S)

    def _exchange(self, request: bytes, timeout_s: float) -> dict:
        """Send `request`, return the answer; neither a full pipe nor a silent child can hold us beyond `timeout_s`.

        Raises:
            TimeoutError, _ChildGone
        """
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        stdin, stdout = self._child.stdin.fileno(), self._child.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        to_send, received = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                wait_s = deadline - time.monotonic()
                if wait_s <= 0:
                    raise TimeoutError(f"no answer within {timeout_s:g} s")
                for key, _ in selector.select(wait_s):
                    if key.fd == stdin:
                        try:
                            to_send = to_send[os.write(stdin, to_send[:65536]) :]
                        except BrokenPipeError:
                            to_send = to_send[:0]  # the child is going; what it still said is read below
                        if not to_send:
                            selector.unregister(stdin)
                    else:
                        chunk = os.read(stdout, 1 << 20)
                        if not chunk:
                            raise _ChildGone("the process ended")
                        received += chunk
                if len(received) >= _RESPONSE.size:
                    (size,) = _RESPONSE.unpack_from(received)
                    if len(received) >= _RESPONSE.size + size:
                        return json.loads(received[_RESPONSE.size :])


_kept = threading.local()
_all_kept: weakref.WeakSet[Extractor] = weakref.WeakSet()


def extractor_of_thread(config: ExtractConfig, languages: Sequence[str] = ()) -> Extractor:
    """This thread's extractor, kept from shard to shard, since its child costs as much as a hundred pages.

    One with other settings takes its place. The child ends with its thread, with the process, or after `IDLE_S`.
    """
    kept: Extractor | None = getattr(_kept, "extractor", None)
    if kept is None or (kept.config, kept.languages) != (config, list(languages)):
        if kept is not None:
            kept.close()
        kept = _kept.extractor = Extractor(dataclasses.replace(config), languages=languages)
        _all_kept.add(kept)
    return kept


@atexit.register
def _close_kept() -> None:
    for extractor in list(_all_kept):
        extractor.close()


def _how_it_ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# What htmldate takes for a date in a URL begins with a year; all that follows on it counts, too.
_YEAR = re.compile(r"(?:19|20)\d\d.*")


def _repeated(digests: pa.ChunkedArray) -> frozenset[str]:
    """The values that occur more than once."""
    counts = digests.drop_null().value_counts()
    return frozenset(c["values"] for c in counts.to_pylist() if c["counts"] > 1)


def text_digest(text: str) -> str:
    """A document's `digest`: sha256 hex of its text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def extract_shard(
    pages: pa.Table,
    config: ExtractConfig,
    read_body: Callable[[dict[str, Any]], tuple[bytes, str] | Rejected],
    languages: Sequence[str] = (),
) -> tuple[pa.Table, pa.Table]:
    """Documents (DOCUMENT_SCHEMA) and verdicts (VERDICT_SCHEMA, one for each page), both sorted by index.

    Of pages with the same bytes only the first is extracted, the others get what it got.

    Args:
        pages: PAGE_SCHEMA, in any order.
        read_body: a page's row → (body with Content-Encoding undone, Content-Type header), or why it cannot be read.
            What it raises ends the shard.
        languages: pages surely in none of them are left out; empty: all are taken.
    """
    again = _repeated(pages["payload_digest"])
    known: dict[tuple[str, ...], Extracted | Rejected] = {}
    documents: list[dict[str, object]] = []
    verdicts: list[Verdict] = []
    extractor = extractor_of_thread(config, languages)
    for page in pages.sort_by("index").to_pylist():
        response = read_body(page)
        if isinstance(response, Rejected):
            outcome: Extracted | Rejected = response
        else:
            address, day = page["final_url"] or page["url"], page["fetched_at"] or ""
            # All that an outcome depends on. Of the URL that is its year alone, which may date the page.
            key = (page["payload_digest"] or "", response[1], day[:10], *_YEAR.findall(address))
            if key[0] in again and key in known:
                outcome = known[key]
            else:
                outcome = extractor.extract(response[0], address, response[1], day)
            if key[0] in again and (isinstance(outcome, Extracted) or outcome.state == DROPPED):
                known[key] = outcome
        if isinstance(outcome, Rejected):
            verdicts.append(
                Verdict(page["index"], page["url"], outcome.state, outcome.reason, outcome.detail, outcome.numbers)
            )
            continue
        verdicts.append(Verdict(page["index"], page["url"], numbers=outcome.numbers))
        documents.append(
            {
                "index": page["index"],
                "url": page["url"],
                "text": outcome.text,
                "title": outcome.title or None,
                "author": outcome.author or None,
                "date": outcome.date or None,
                "language": None,
                "domain": page["domain"],
                "fetched_at": page["fetched_at"],
                "warc_file": page["warc_file"],
                "warc_offset": page["warc_offset"],
                "digest": text_digest(outcome.text),
                "numbers": numbers_to_json(outcome.numbers),
            }
        )
    return pa.Table.from_pylist(documents, schema=DOCUMENT_SCHEMA), verdict_table(verdicts)


# --- The child ------------------------------------------------------------------------------------------------------


def _child_main() -> None:
    """Answer pages from standard input until it ends."""
    import ctypes
    import gc
    import logging
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not get between the frames
    settings = json.loads(_read_exactly(requests, _RESPONSE.unpack(_read_exactly(requests, _RESPONSE.size))[0]))
    config, languages = ExtractConfig(**settings["config"]), settings["languages"]

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent"]:
        sys.exit("the parent is gone")

    import lxml.html
    import resiliparse.extract.html2text
    import resiliparse.parse.encoding
    import resiliparse.parse.html
    import resiliparse.parse.lang
    import trafilatura

    if languages:
        first_look.load()
    del lxml, resiliparse, trafilatura  # only loaded here, so that no page pays for it and the limit starts after it
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = used + (config.max_memory_mb << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    _answer(answers, {"ready": True})
    # These signals keep their default action, so the kernel ends the process even inside a library's loop: PROF at a
    # page's processor time; ALRM where no page comes, or in a page of a child whose parent died where there is no
    # parent-death signal.
    signal.setitimer(signal.ITIMER_REAL, settings["idle_s"])
    while header := requests.read(_REQUEST.size):
        header_size, body_size = _REQUEST.unpack(header)
        page = json.loads(_read_exactly(requests, header_size))
        body = _read_exactly(requests, body_size)
        signal.setitimer(signal.ITIMER_PROF, config.timeout_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * config.timeout_s + 5.0)
        try:
            outcome = page_text(body, page["url"], page["content_type"], page["fetched_at"], config, languages)
        except MemoryError:
            _answer(answers, {"memory": True})
            return
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.setitimer(signal.ITIMER_REAL, settings["idle_s"])
        name = "extracted" if isinstance(outcome, Extracted) else "rejected"
        _answer(answers, {name: dataclasses.asdict(outcome)})
        if len(body) > 500_000:
            gc.collect()  # a large page's trees go at once, not some pages later


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        sys.exit(0)  # the parent is gone in mid-frame
    return data


def _answer(stream: IO[bytes], answer: dict) -> None:
    data = json.dumps(answer).encode()
    stream.write(_RESPONSE.pack(len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    _child_main()
