"""Where a test set lies, and what is in it: files under their usual names, or the Hugging Face Hub.

In: a task, and the folders to look in. Out: its items, and a record of the file: name, sha256, items. Text files are
UTF-8, bytes that are none become U+FFFD. Nothing is ever unpickled, and no code of a data set is run.

Cost: reading the file once and hashing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2train.evaluation.detokenizers import undo_text
from gpt2train.evaluation.items import Item, Stretch, TaskDataError
from gpt2train.evaluation.prompts import BLANK

if TYPE_CHECKING:
    from gpt2train.evaluation.tasks import Task

HUB = "hub"
"""As a folder: fetch the task's data by the `datasets` library, from its cache or the Hugging Face Hub."""


@dataclass(frozen=True)
class TestSet:
    """A task's items with the record of where they came from."""

    items: list[Item]
    file: str
    sha256: str
    __test__ = False  # a name that pytest would take for a test


def find(task: Task, places: Sequence[str]) -> Path | str | None:
    """The first of the task's usual file names in the first folder that has one; HUB where that is named; or None."""
    for place in places:
        if place == HUB:
            if task.hub:
                return HUB
            continue
        folder = Path(place)
        for name in task.files:
            if (folder / name).is_file():
                return folder / name
        if folder.is_file() and folder.name in {Path(name).name for name in task.files}:
            return folder
    return None


def read(task: Task, found: Path | str) -> TestSet:
    """The task's items from what `find` gave. Raises TaskDataError."""
    if isinstance(found, str):
        rows, digest = _hub_rows(task)
        return TestSet(_items(task, rows, f"{HUB}: {task.hub}"), task.hub, digest)
    try:
        content = found.read_bytes()
    except OSError as error:
        raise TaskDataError(f"{task.name}: {found}: {error.strerror}; make it readable") from None
    digest = hashlib.sha256(content).hexdigest()
    if task.unit:
        return TestSet([_stretch(task, content, found)], found.name, digest)
    try:
        rows = list(_rows(task, found, content))
    except (ValueError, LookupError, TypeError) as error:
        raise TaskDataError(
            f"{task.name}: {found}: cannot be read ({error}); give {' or '.join(task.files)} as published"
        ) from None
    return TestSet(_items(task, rows, str(found)), found.name, digest)


def _items(task: Task, rows: Sequence[Mapping[str, Any]], where: str) -> list[Item]:
    assert task.build is not None
    try:
        items = task.build(rows)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        fields = ", ".join(map(str, rows[0])) if rows else "none"
        raise TaskDataError(
            f"{task.name}: {where}: its rows are not as the task reads them ({type(error).__name__}: {error}); the "
            f"first has the fields {fields}; give {' or '.join(task.files)}"
        ) from None
    if not items:
        raise TaskDataError(f"{task.name}: {where}: holds no item; give {' or '.join(task.files)}")
    return items


# ------------------------------------------------------------------------------------------------------------ texts


def _stretch(task: Task, content: bytes, path: Path) -> Stretch:
    """One long text, its style undone, and how many units of the original it has."""
    if task.tail_bytes and len(content) > task.tail_bytes:
        content = content[-task.tail_bytes :]
    text = content.decode("utf-8", "replace")
    if not text.strip():
        raise TaskDataError(f"{task.name}: {path}: holds no text; give {' or '.join(task.files)}")
    if task.unit == "byte":
        return Stretch(text, len(content))
    if task.unit == "character":
        return Stretch(text, len(text))
    # Words of the original, and one more for the end of each line: what `<eos>` is in the test sets' vocabularies.
    lines = text.split("\n") if text.endswith("\n") else [*text.split("\n"), ""]
    units = sum(len(line.split()) + 1 for line in lines[:-1])
    if task.style is None:
        return Stretch(text, units)
    undone, restored = undo_text(text, task.style)
    return Stretch(undone, units, restored)


# ------------------------------------------------------------------------------------------------------------- rows


def _rows(task: Task, path: Path, content: bytes) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, by its kind."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(path).to_pylist()
        return
    text = content.decode("utf-8-sig", "replace")
    if path.suffix == ".jsonl":
        yield from _json_lines(task, path, text)
    elif path.suffix == ".json":
        found = json.loads(text)
        yield from found["data"] if isinstance(found, dict) else found
    elif path.name.startswith("cbtest_"):
        yield from _cloze_rows(text)
    elif path.name.endswith("_6line.txt"):
        yield from _six_line_rows(text)
    elif path.suffix == ".txt":
        yield from ({"text": line} for line in text.split("\n") if line.strip())
    else:
        yield from _parallel_rows(task, path, text)


def _json_lines(task: Task, path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """JSON Lines; beside PIQA's or αNLI's own files their labels lie in a file of the same stem."""
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    labels = labels_file.read_text(encoding="utf-8").split() if labels_file.is_file() else None
    number = 0
    for line_number, line in enumerate(text.split("\n"), start=1):  # str.splitlines would cut at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskDataError(f"{task.name}: {path}, line {line_number}: no JSON ({error}); mend the line") from None
        if labels is not None:
            row = {**row, "label": int(labels[number])}
        number += 1
        yield row


def _cloze_rows(text: str) -> Iterator[Mapping[str, Any]]:
    """Children's Book Test: 20 numbered sentences, then `21 question <tab> answer <tab><tab> a|b|c…`."""
    sentences: list[str] = []
    for line in text.split("\n"):
        number, _, rest = line.strip().partition(" ")
        if BLANK in rest and "\t" in rest:
            question, answer, *_, options = rest.split("\t")
            # A choice may hold the sign itself; the file has no escape for it, and the empty ones are such choices.
            yield {
                "sentences": sentences,
                "question": question.strip(),
                "answer": answer.strip(),
                "options": [option for option in options.strip().split("|") if option],
            }
            sentences = []
        elif number.isdigit():
            sentences.append(rest)


def _six_line_rows(text: str) -> Iterator[Mapping[str, Any]]:
    """HellaSwag as six lines an item: the context, the number of the right ending, four endings."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no multiple of six")
    for i in range(0, len(lines), 6):
        yield {"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]}


def _parallel_rows(task: Task, path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """`name.en` and `name.fr`, line by line."""
    suffixes = {Path(name).suffix for name in task.files if Path(name).suffix not in (".jsonl", ".json", ".parquet")}
    sides = {}
    for suffix in sorted(suffixes):
        side = path.with_suffix(suffix)
        if not side.is_file():
            raise TaskDataError(f"{task.name}: {path}: the other language, {side.name}, is not beside it")
        sides[suffix[1:]] = side.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    lengths = {language: len(lines) for language, lines in sides.items()}
    if len(set(lengths.values())) > 1:
        raise TaskDataError(f"{task.name}: {path}: the languages have unequal numbers of lines, {lengths}")
    for pair in zip(*sides.values(), strict=True):
        yield dict(zip(sides, pair, strict=True))


def _hub_rows(task: Task) -> tuple[list[Mapping[str, Any]], str]:
    """The rows of `name` or `name:config` `:split`, by the datasets library, and the sha256 over them as JSON."""
    import datasets

    name, config, split = ([*task.hub.split("::"), "", ""])[:3]
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # the library raises many kinds: offline, renamed, gated, another version
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskDataError(
            f"{task.name}: {task.hub}: cannot be loaded ({first}); fetch the file and name its folder in task_data"
        ) from None
    rows: list[Mapping[str, Any]] = [dict(row) for row in loaded]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return rows, digest.hexdigest()
