"""Which settings are addresses of a bucket, not local paths, and what of an address may be shown. Imports nothing."""

from __future__ import annotations

import os
import re

SCHEMES = ("s3", "gs", "file", "memory")
"""Places that a setting may name by address. memory:// lives as long as the process, for trying things out."""


def is_address(text: str) -> bool:
    """Whether `text` names a place in a bucket; file:// is a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None and not text.startswith("file://")


def local_path(text: str) -> str:
    """A local path without the file:// before it."""
    return text.removeprefix("file://") if text.startswith("file:///") else text


def same_place(one: str, other: str) -> bool:
    """Whether both name the same folder, by whatever links and slashes, or the same place in a bucket."""
    if is_address(one) or is_address(other):
        return _parts(one) == _parts(other)
    return os.path.realpath(local_path(one)) == os.path.realpath(local_path(other))


def _parts(address: str) -> tuple[str, list[str]]:
    scheme, _, rest = address.partition("://")
    return scheme, [part for part in rest.split("/") if part not in ("", ".")]


def address_fault(address: str) -> str:
    """What is wrong with an address, in words that hold nothing of a secret; empty: nothing."""
    scheme, rest = address.split("://", 1)
    if scheme not in SCHEMES:
        return f"must be a local path or begin with {', '.join(f'{s}://' for s in SCHEMES)}"
    if scheme == "file":
        return "" if rest.startswith("/") else "must be file:// with an absolute path behind it"
    if "@" in rest.split("/", 1)[0]:
        return "holds credentials; they come from the environment (AWS_ACCESS_KEY_ID, …), never from settings"
    if "?" in rest:
        return "holds a query; signed addresses are not taken, credentials come from the environment"
    bucket, _, place = rest.partition("/")
    if not bucket or not place.strip("/"):
        return "must name a bucket and a place in it, such as s3://bucket/corpus"
    return ""


def shown(address: str) -> str:
    """`address` without what may be a secret in it: what stands before an @, and a query."""
    scheme, slashes, rest = address.partition("://")
    return scheme + slashes + re.sub(r"^[^/]*@", "…@", rest).split("?", 1)[0] if slashes else address
