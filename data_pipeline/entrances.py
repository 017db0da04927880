"""The three ways into a corpus: a URL list that is fetched, WARC files at hand, a dataset of texts.

Each leaves its rows in numbered shards: pages in `fetch/`, or documents in `extract/` for a dataset, with a verdict for
every row; and says how many shards there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import forget, old_corpus, tasks, texts
from data_pipeline.config import CorpusConfig, Source
from data_pipeline.crawl import retry, urls
from data_pipeline.crawl.addresses import read_hosts_file
from data_pipeline.crawl.fetch import FetchShard
from data_pipeline.crawl.rescue import Rescue
from data_pipeline.executors import Task
from data_pipeline.layout import Corpus
from data_pipeline.lists import read_list
from data_pipeline.records import CorruptionError, InputError
from data_pipeline.steps import Steps, plain, rows_of
from data_pipeline.store import (
    Step,
    archives_changed,
    read_json,
    read_marker,
    read_signed,
    recorded_outputs,
    why_not_done,
    write_signed,
)

ROWS_PER_SHARD = 5_000
LEAST_SHARDS = 8


class Entrance:
    """Brings rows in by the source that the settings name."""

    def __init__(self, config: CorpusConfig, steps: Steps, address_of: Mapping[str, str]) -> None:
        """`address_of`: local copies of inputs in a bucket → their addresses, which are what markers and rows name."""
        self.config = config
        self.address_of = address_of
        self.steps = steps
        self.out = Path(config.out)
        self.corpus = Corpus(self.out)

    def enter(self, run_urls: bool, run_fetch: bool) -> None:
        """Do what is due of the stages that lead in; `steps.shards` is known afterwards."""
        enter: dict[Source, Callable[[bool, bool], None]] = {
            Source.urls: self.enter_by_urls,
            Source.warc: self.enter_by_warc,
            Source.dataset: self.enter_by_dataset,
        }
        enter[self.config.source](run_urls, run_fetch)

    def enter_by_urls(self, run_urls: bool, run_fetch: bool) -> None:
        source = Path(self.config.urls)
        rules, blocked = self.config.url_list, self.config.url_list.blocked_domains_file
        files = tuple(sorted(p for p in source.rglob("*") if p.is_file())) if source.is_dir() else (source,)
        files += (Path(blocked),) if blocked else ()
        if run_urls:
            self.steps.look_at(files)
        self.steps.cut_into(self._shard_count(lambda: urls.count_urls(source, self.config.url_list)))
        corpus, numbers = self.corpus, range(self.steps.shards)
        if blocked and run_urls:
            more = read_list(blocked, "url_list.blocked_domains_file")
            rules = replace(rules, blocked_domains=[*rules.blocked_domains, *more])
        settings = {**plain(self.config.url_list), "shards": self.steps.shards}
        settings.pop("blocked_domains_file")  # what it says counts, not what it is called
        outputs = tuple(p for k in numbers for p in (corpus.table("urls", k), corpus.verdicts("urls", k)))
        if run_urls:
            step = Step("urls", "all", corpus.folder("urls"), settings, files, outputs)
            arguments = (source, corpus.folder("urls"), self.steps.shards, rules)
            self.steps.run("urls", [step], lambda step: Task("urls", urls.write_url_shards, arguments))
        if run_fetch:
            self.steps.require("fetch", [p for k in numbers for p in (corpus.table("urls", k),)], "urls")
            self.fetch()

    def fetch(self) -> None:
        """No setting of the fetch makes it run again: what was fetched is the raw truth and stays."""
        corpus, folder = self.corpus, self.corpus.folder("fetch")
        earlier = self._earlier_pages()
        shards = [FetchShard(corpus.table("urls", k), folder, k, earlier[k]) for k in range(self.steps.shards)]
        archived = self._rescue_index()
        steps = [
            Step(
                "fetch",
                f"{k:05d}",
                folder,
                {},
                (corpus.table("urls", k), *([archived[k].table] if archived else [])),
                (corpus.table("fetch", k), corpus.verdicts("fetch", k)),
            )
            for k in range(self.steps.shards)
        ]
        again = retry.begin_round(folder, shards, self.config.retry)
        if again is not None:
            for k in again.waiting:
                steps[k].marker.unlink(missing_ok=True)
            self.steps.reporter.say(
                f"fetch: {sum(again.waiting.values()):,} URLs are open, retry={','.join(again.reasons)}"
            )
        due = [s for s, step in zip(shards, steps, strict=True) if why_not_done(step, self.steps.hashes) is not None]
        if due:
            folder.mkdir(parents=True, exist_ok=True)
            processes = min(self.config.fetch.processes, self.steps.executor.workers, len(due))
            groups = [due[i::processes] for i in range(processes)]
            arguments = (self.config.fetch, self.out, self.config.progress)
            work = [Task("fetch", tasks.fetch_group, (g, *arguments)) for g in groups]
            total = sum(rows_of(corpus.table("urls", s.number)) for s in due)
            with self.steps.reporter.stage("fetch", total) as counter:
                decided = 0

                def on_done(_task: Task, result: dict[str, Any]) -> None:
                    nonlocal decided
                    decided += result["decided"]

                self.steps.executor.run(work, on_done=on_done, on_rows=counter.advance)
                if counter.done:
                    before = f", {counter.done - decided:,} of them decided before" if decided < counter.done else ""
                    rate = counter.rate * decided / counter.done
                    self.steps.reporter.say(f"fetch: {counter.done:,} URLs{before}, {rate:,.1f}/s")
        else:
            self.steps.reporter.say("fetch: finished before, nothing to do")
        retry.end_round(folder)
        by_name = {step.name: shard for shard, step in zip(shards, steps, strict=True)}

        def finish(step: Step) -> Task:
            shard = by_name[step.name]
            arguments = (shard, self.out, archived[shard.number] if archived else None)
            return Task(f"fetch {step.name}", tasks.finish_fetch, arguments)

        def beside(step: Step) -> list[Path]:
            files = (*folder.glob(f"{step.name}.*.jsonl"), *corpus.folder("warc").glob(f"{step.name}-*"))
            return sorted(files, key=lambda path: path.name.endswith(".journal.jsonl"))  # pages before their lines

        self.steps.run("fetch", steps, finish, quiet=True, beside=beside)

    def _earlier_pages(self) -> list[Path] | list[None]:
        """For each shard the page table of the same shard of `fetch.since`."""
        since = self.config.fetch.since
        if not since:
            return [None] * self.steps.shards
        tables = [Corpus(Path(since)).table("fetch", k) for k in range(self.steps.shards)]
        if _fixed_shards(Path(since)) != self.steps.shards or not all(table.exists() for table in tables):
            raise InputError(
                f"fetch.since={since}: must be a corpus of {self.steps.shards} shards whose fetch is finished; "
                f"leave shards= out when a new corpus is begun, and it takes that number over"
            )
        return tables

    def _rescue_index(self) -> list[Rescue]:
        """For each shard the archived pages of `fetch.rescue`; empty without it."""
        if not self.config.fetch.rescue:
            return []
        files = _warc_files("fetch.rescue", Path(self.config.fetch.rescue))
        parts, steps, index = self._warc_index(files, self.corpus.folder("rescue"), heed=False)
        _forget_files(self.corpus.folder("rescue"), len(files))
        self._adopt(steps, files)
        self.steps.run("rescue", steps, index, quiet=True)
        outputs = [self.corpus.table("rescue", k) for k in range(self.steps.shards)]
        pages = [page for page, _ in parts]
        settings = {"shards": self.steps.shards, "strip_tracking": self.config.url_list.strip_tracking}
        step = Step("rescue", "all", self.corpus.folder("rescue"), settings, tuple(pages), tuple(outputs))
        arguments = (pages, outputs, self.config.url_list)
        self.steps.run("rescue", [step], lambda step: Task("rescue", tasks.split_rescue_index, arguments), quiet=True)
        return [Rescue(table, self.config.fetch) for table in outputs]

    def enter_by_warc(self, run_urls: bool, run_fetch: bool) -> None:
        files = _warc_files("path", Path(self.config.path))
        corpus, folder = self.corpus, self.corpus.folder("fetch")
        parts, steps, index = self._warc_index(files, folder, heed=self.config.fetch.respect_noai)
        if run_fetch:
            _forget_files(folder, len(files))
            self._adopt(steps, files)
            self.steps.run("index", steps, index)
        elif "extract" in self.config.stages:
            for step in steps:
                if others := archives_changed(step, read_marker(step) or {}, self.steps.hashes):
                    raise InputError(f"path={others[0]}: is another file than the one that was indexed; add fetch")
        self.steps.require("extract", [p for part in parts for p in part], "fetch")
        self.steps.cut_into(self._shard_count(lambda: sum(rows_of(v) for _, v in parts)))
        outputs = tuple(
            p for k in range(self.steps.shards) for p in (corpus.table("fetch", k), corpus.verdicts("fetch", k))
        )
        if run_fetch:
            inputs = tuple(p for part in parts for p in part)
            step = Step("fetch", "all", folder, {"shards": self.steps.shards}, inputs, outputs)
            arguments = (self.out, parts, self.steps.shards)
            self.steps.run("fetch", [step], lambda step: Task("fetch", tasks.split_warc_index, arguments), quiet=True)

    def _warc_index(
        self, files: Sequence[Path], folder: Path, *, heed: bool
    ) -> tuple[list[tuple[Path, Path]], list[Step], Callable[[Step], Task]]:
        """(page and verdict tables, steps, step → task) of an index of WARC files, one step a file. `heed`: drop
        pages whose own headers refuse to be taken; a rescued page is looked at when it is taken.

        WARC files are large: the task hashes them, and the marker's `archives` tell whether to do so again.
        """
        agent = self.config.fetch.user_agent if heed else None
        parts = [
            (folder / f"file_{i:05d}.parquet", folder / f"file_{i:05d}.verdicts.parquet") for i in range(len(files))
        ]
        steps = [
            Step(
                folder.name,
                f"file_{i:05d}",
                folder,
                {"file": self._name(p), "bytes": p.stat().st_size, "refused_to": agent},
                (),
                parts[i],
            )
            for i, p in enumerate(files)
        ]
        place = {step.name: i for i, step in enumerate(steps)}

        def index(step: Step) -> Task:
            i = place[step.name]
            arguments = (files[i], self._name(files[i]), i, *parts[i], agent)
            return Task(f"index {step.name} ({files[i].name})", tasks.index_warc_file, arguments)

        return parts, steps, index

    def _adopt(self, steps: Sequence[Step], files: Sequence[Path]) -> None:
        """Markers of the version before knew a WARC file by its size alone: from now on also by its time of writing.

        They have no hash to compare, so one that was written after its marker, or is written later, is indexed again;
        where that gives the same rows, nothing behind it is done again.
        """
        for step, path in zip(steps, files, strict=True):
            marker = read_marker(step)
            if marker is None or "archives" in marker:
                continue
            stat = path.stat()
            if stat.st_mtime_ns > step.marker.stat().st_mtime_ns:
                step.marker.unlink()
                self.steps.reporter.say(f"index: {path.name} again: written since, and no hash of it was kept")
                continue
            seen = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": None}
            write_signed({**marker, "archives": {self._name(path): seen}}, step.marker)

    def _name(self, path: Path) -> str:
        """What an input is called for good: its address where it is a copy, else its path."""
        for copy in (path, *path.parents):
            if address := self.address_of.get(str(copy)):
                return f"{address}/{path.relative_to(copy).as_posix()}".removesuffix("/.")
        return str(path)

    def enter_by_dataset(self, run_urls: bool, run_fetch: bool) -> None:
        files = texts.dataset_files(self.config.path)
        folder = self.corpus.folder("extract")
        named = self.address_of.get(self.config.path, self.config.path)
        settings = {"path": named, "text_column": self.config.text_column, "shards": self.config.shards}
        rules = forget.read_forget_list(self.corpus)
        if rules is not None:
            settings["forgotten"] = rules.digest()
        step = Step("extract", "all", folder, settings, tuple(files), ())
        if not self.config.stages or "extract" in self.config.stages:
            why = why_not_done(step, self.steps.hashes)
            if why is None:
                self.steps.reporter.say("extract: the dataset was read before and stands")
                self.steps.on_marked(step, ())
            else:
                self.steps.reporter.say(f"extract: reading {self.config.path}{f' again: {why}' if why else ''}")
                before = self.steps.look(step)
                made, written, unreadable = texts.write_document_shards(
                    self.config.path,
                    self.config.text_column,
                    self.corpus,
                    self.config.shards,
                    rules.because if rules else None,
                )
                self.steps.mark(step, {"shards": made}, written, before=before)
                if unreadable:
                    self.steps.reporter.say(
                        f"extract: {unreadable:,} documents hold characters that could not be read (U+FFFD, NUL); "
                        "`unreadable_characters` in their numbers; convert the files to UTF-8 if they are of another "
                        "encoding"
                    )
        marker = read_marker(step)
        if marker is None:
            raise InputError(f"stages={self.config.stages}: the dataset was not read yet; add extract")
        self.steps.cut_into(int(marker["counts"]["shards"]))
        self.steps.require("filter", list(recorded_outputs(step, marker)), "extract")

    def _shard_count(self, count_rows: Callable[[], int]) -> int:
        """The number of shards is part of the order of documents, so it stays for the life of a corpus folder."""
        fixed = _fixed_shards(self.out)
        if fixed is not None:
            if self.config.shards not in (0, fixed):
                raise InputError(
                    f"shards={self.config.shards}: this corpus was begun with {fixed}; give that or a new out="
                )
            self._keep_shards(fixed)
            return fixed
        earlier = _fixed_shards(Path(self.config.fetch.since)) if self.config.fetch.since else None
        shards = self.config.shards or earlier or max(LEAST_SHARDS, -(-count_rows() // ROWS_PER_SHARD))
        self._keep_shards(shards)
        return shards

    def _keep_shards(self, shards: int) -> None:
        path = self.out / "shards.json"
        if read_signed(path) == {"shards": shards}:
            return
        with contextlib.suppress(FileNotFoundError, CorruptionError):
            if (before := read_json(path, "").get("shards")) != shards:
                self.steps.reporter.say(f"{path}: said {before}, the markers know {shards}: mended")
        write_signed({"shards": shards}, path)


def check_inputs(config: CorpusConfig, stages: Sequence[str], known: Sequence[str] = ()) -> None:
    """Look at the files and folders that the settings name for `stages`, before any work.

    `known`: faults that were found already, of inputs in a bucket. Raises InputError with a line for each that is not
    there or cannot be used.
    """
    faults = list(known)
    for look in _looks(config, stages):
        try:
            look()
        except InputError as e:
            if not any(f.split("://")[0] == str(e).split("://")[0] and "://" in f for f in known):
                faults.append(str(e))
    if faults:
        raise InputError("\n".join(faults))


def _looks(config: CorpusConfig, stages: Sequence[str]) -> Iterator[Callable[[], object]]:
    fetch = config.fetch
    if config.source is Source.warc:
        yield lambda: _warc_files("path", Path(config.path))
    if config.source is Source.dataset:
        yield lambda: _require_dataset(config.path)
    if config.source is Source.urls and "urls" in stages:
        yield lambda: urls.list_files(Path(config.urls))
        yield lambda: urls.read_domains(config.url_list.blocked_domains, "url_list.blocked_domains")
        if blocked := config.url_list.blocked_domains_file:
            setting = "url_list.blocked_domains_file"
            yield lambda: urls.read_domains(read_list(blocked, setting), setting)
    if config.source is Source.urls and "fetch" in stages:
        if fetch.hosts_file:
            yield lambda: read_hosts_file(Path(fetch.hosts_file))
        if fetch.rescue:
            yield lambda: _warc_files("fetch.rescue", Path(fetch.rescue))
        if fetch.since:
            yield lambda: _require_fetched(Path(fetch.since))
    if "filter" in stages and (words := config.quality.blocked_words_file):
        yield lambda: read_list(words, "quality.blocked_words_file")
    for folder in config.dedup.against if "dedup" in stages else []:
        yield partial(old_corpus.require_finished, Path(folder))
    for path in config.decontaminate.paths if "decontaminate" in stages else []:
        yield partial(_require_file, path, "decontaminate.paths")
    if domains := config.report.domains:
        yield lambda: read_list(domains, "report.domains")


def _require_dataset(path: str) -> None:
    if not texts.dataset_files(path):  # a name, not a path
        texts.require_hub_dataset(path)


def _require_file(path: str, setting: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"{setting}={path}: there is no such file; check the path")


def _require_fetched(since: Path) -> None:
    shards = _fixed_shards(since)
    if shards is None or not all(Corpus(since).table("fetch", k).exists() for k in range(shards)):
        raise InputError(f"fetch.since={since}: must be a corpus whose fetch is finished; check the path")


def _fixed_shards(corpus: Path) -> int | None:
    """The number of shards that a corpus was begun with. Where its file is lost or damaged, the markers know it, too.

    Raises CorruptionError for a damaged file when no marker is left either.
    """
    path = corpus / "shards.json"
    for marker in (corpus / "urls" / "all.done.json", corpus / "fetch" / "all.done.json"):
        if shards := (read_signed(marker) or {}).get("settings", {}).get("shards"):
            return int(shards)
    if (found := read_signed(path)) is None:
        remedy = "restore it from a copy, or begin a new corpus"
        with contextlib.suppress(FileNotFoundError):
            found = read_json(path, remedy)
            if set(found) != {"shards"}:  # as the version before wrote it, without a hash
                raise CorruptionError(f"{path}: is damaged (its sha256 does not fit); {remedy}")
    return None if found is None else _number(found.get("shards"), path)


def _number(shards: object, path: Path) -> int:
    if isinstance(shards, int) and shards > 0:
        return shards
    raise CorruptionError(f"{path}: is damaged (no number in it); restore it from a copy, or begin a new corpus")


def _forget_files(folder: Path, files: int) -> None:
    """Remove the index of WARC files that are no more: of so many there are `files` now."""
    for path in folder.glob("file_*.*"):
        number = path.name.removeprefix("file_").split(".")[0]
        if number.isdecimal() and int(number) >= files:
            path.unlink()


def _warc_files(setting: str, root: Path) -> list[Path]:
    """The WARC file `root`, or those of the folder, in the order of their names. Raises InputError without any."""
    if not root.exists():
        raise InputError(f"{setting}={root}: there is no such WARC file or folder; check the path")
    endings = (".warc", ".warc.gz", ".warc.zst", ".arc", ".arc.gz")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.name.endswith(endings))
    if not files:
        raise InputError(f"{setting}={root}: holds no {', '.join(endings)} file; give the folder that does")
    return [p.resolve() for p in files]
