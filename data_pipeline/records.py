"""What flows through the pipeline: the errors, the tables between stages, and the ledger's vocabulary.

A URL enters with an `index` (its position in the list), which stays its identity and its place in every order, so
that no result depends on which worker was faster. At each stage a row goes on, or it ends with a state and a reason:

    kept      reached the corpus
    dropped   seen and refused by a rule (a duplicate, the wrong language, robots.txt, ...)
    failed    could not be had (no such host, time-out, HTTP 500, a page that extraction could not finish, ...)

    PipelineError                 exit code 1
    ├── ConfigError               2   settings that cannot work; all of them, together
    ├── InputError                2   a list, folder or file that cannot be used
    ├── LockedError               3   another run owns the output folder
    ├── StorageError              4   no space, an I/O error: earlier results are intact, run again once there is room
    ├── CorruptionError           5   a file is not what its manifest says, and cannot be made again
    ├── AccountingError           6   rows in ≠ kept + dropped + failed: a bug, and the run stops
    └── StoppedError            143   SIGTERM: the same command goes on
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa


class PipelineError(Exception):
    """Ends the run with `exit_code` and one clear line; a traceback is for bugs only."""

    exit_code = 1


class ConfigError(PipelineError):
    """Settings that cannot work: `faults` holds one line each (field, value, bound, remedy)."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__(self.faults)  # as its arguments, so that it comes whole through a pickle from a worker

    def __str__(self) -> str:
        return "\n".join(self.faults)


class InputError(PipelineError):
    exit_code = 2


class LockedError(PipelineError):
    exit_code = 3


class StorageError(PipelineError):
    exit_code = 4


class CorruptionError(PipelineError):
    exit_code = 5


class AccountingError(PipelineError):
    exit_code = 6


class StoppedError(PipelineError):
    exit_code = 143


KEPT, DROPPED, FAILED = "kept", "dropped", "failed"

# A URL that goes to the fetch. `url` is normalized; `domain` is the registrable domain (Public Suffix List).
URL_SCHEMA = pa.schema(
    [("index", pa.int64()), ("url", pa.string()), ("domain", pa.string())],
)

# A response that lies in a WARC file. `warc_file` is relative to the corpus folder, or absolute for source=warc.
PAGE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("url", pa.string()),
        ("final_url", pa.string()),
        ("domain", pa.string()),
        ("status", pa.int32()),
        ("content_type", pa.string()),
        ("fetched_at", pa.string()),  # RFC 3339, UTC, seconds
        ("warc_file", pa.string()),
        ("warc_offset", pa.int64()),  # of the response record, in bytes of the compressed file
        ("payload_digest", pa.string()),  # sha256 hex of the decoded body
        ("etag", pa.string()),  # what the server gave to ask by the next time, or null
        ("last_modified", pa.string()),
    ],
)

# Numbers of the fetch that tell where a page is from; they stay with its row in the ledger and with its document.
#   rescued        the reason why its link is dead: it was found in a WARC file at hand
#   not_modified   1: the server said that the page is as it was in the earlier corpus
ORIGIN_NUMBERS = ("rescued", "not_modified")

# A text. `numbers` is a JSON object of what the stages measured; `digest` is the sha256 hex of `text` in UTF-8.
DOCUMENT_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("url", pa.string()),
        ("text", pa.large_string()),
        ("title", pa.string()),
        ("author", pa.string()),
        ("date", pa.string()),
        ("language", pa.string()),
        ("domain", pa.string()),
        ("fetched_at", pa.string()),
        ("warc_file", pa.string()),
        ("warc_offset", pa.int64()),
        ("digest", pa.string()),
        ("numbers", pa.string()),
    ],
)

# What a stage decided of each row that entered it. A later stage reads the rows whose state is `kept`.
VERDICT_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("url", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),  # null when kept; snake_case, from the stage's own fixed list
        ("detail", pa.string()),  # null, or what a person wants to read (the error's message, the twin's URL)
        ("numbers", pa.string()),  # JSON object: the numbers behind the verdict
    ],
)

# One row a URL, for ever: the verdict that ended it, and the stage that gave it.
LEDGER_SCHEMA = pa.schema([*VERDICT_SCHEMA, ("stage", pa.string())])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row of VERDICT_SCHEMA, as stages make them."""

    index: int
    url: str
    state: str = KEPT
    reason: str | None = None
    detail: str | None = None
    numbers: Mapping[str, float | int | str] | None = None

    def row(self) -> dict[str, object]:
        return {
            "index": self.index,
            "url": self.url,
            "state": self.state,
            "reason": self.reason,
            "detail": self.detail,
            "numbers": numbers_to_json(self.numbers or {}),
        }


def numbers_to_json(numbers: Mapping[str, float | int | str]) -> str:
    """The same numbers always give the same bytes: keys sorted, floats rounded to six digits."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in numbers.items()}
    return json.dumps(rounded, sort_keys=True, ensure_ascii=False)


def verdict_table(verdicts: Sequence[Verdict]) -> pa.Table:
    """Verdicts as a table of VERDICT_SCHEMA, in the order given."""
    return pa.Table.from_pylist([v.row() for v in verdicts], schema=VERDICT_SCHEMA)
