"""Small lists that a user gives by file: domains, words, URLs, one a line."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.records import InputError


def read_list(path: str, setting: str) -> list[str]:
    """The lines of the file that `setting` names, without blanks at their ends; empty lines and # lines are left out.

    Raises InputError: no such file, not UTF-8, nothing in it.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{setting}={path}: {e.strerror}; give a text file with one entry a line") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{setting}={path}: not UTF-8 at byte {e.start}; convert it to UTF-8") from None
    entries = [line.strip() for line in content.split("\n")]
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise InputError(f"{setting}={path}: holds no entry; give one a line, or leave {setting} out")
    return entries
