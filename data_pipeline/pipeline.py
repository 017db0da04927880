"""URL list, WARC files or text dataset → documents, ledger, token shards. The only room that knows the stages' order.

Each stage is a list of steps (`store.Step`), mostly one a shard; a step that stands is not done again, one whose
settings or input changed is, and the reason is said. So a run can be killed at any moment and the same command goes on:
the result is the bytes of an undisturbed run (promise 1), whatever the number of workers.

Chosen: files between stages, each with a marker that holds hashes, against one database for all. A shard can be looked
at, copied and made again by itself, and any executor that can call a function will do. Stages after `extract` write
verdicts, not texts, so that a changed threshold costs seconds and no disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from data_pipeline import card, executors, forget, ledger, report, tasks, texts, tokenizer, what_if
from data_pipeline.config import STAGES, CorpusConfig, Executor, Source, check
from data_pipeline.crawl import retry, urls
from data_pipeline.crawl.fetch import FetchShard
from data_pipeline.crawl.rescue import Rescue
from data_pipeline.executors import Task
from data_pipeline.layout import Corpus
from data_pipeline.lists import read_list
from data_pipeline.pack import write_token_shards
from data_pipeline.progress import Reporter
from data_pipeline.records import ConfigError, InputError
from data_pipeline.store import (
    Hashes,
    Step,
    lock,
    mark_done,
    prune,
    read_marker,
    recorded_outputs,
    remove_temporaries,
    stands_but_for,
    storage_errors,
    why_not_done,
    write_atomic,
    write_json,
)

ROWS_PER_SHARD = 5_000
LEAST_SHARDS = 8
LEAST_PART_ROWS = 64
"""Pages that are worth a process of their own: it takes a second to start."""

# Stages whose verdicts a row meets on its way, by where it enters.
LEDGER_STAGES = {
    Source.urls: ("urls", "fetch", "extract", "filter", "dedup", "decontaminate"),
    Source.warc: ("fetch", "extract", "filter", "dedup", "decontaminate"),
    Source.dataset: ("extract", "filter", "dedup", "decontaminate"),
}


def build_corpus(config: CorpusConfig) -> int:
    """Run the stages asked for; return 0. Raises PipelineError; see records.py for the exit codes."""
    faults = check(config)
    if faults:
        raise ConfigError(faults)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; give a folder")
    if config.what_if:
        return what_if.what_if(config)
    if config.forget:
        return take_down(config)
    with lock(out), storage_errors(out):
        remove_temporaries(out)
        with write_atomic(Corpus(out).config) as temporary:
            OmegaConf.save(OmegaConf.structured(config), temporary)
        with _executor(config, out) as executor:
            Run(config, executor).run()
        remove_temporaries(out)  # of tasks whose worker died and that others finished
    return 0


def take_down(config: CorpusConfig) -> int:
    """Remove what `config.forget` names from the corpus, and run again the stages that this concerns."""
    corpus = Corpus(Path(config.out))
    settings = forget.settings_of(config)
    with lock(corpus.out), storage_errors(corpus.out):
        remove_temporaries(corpus.out)
        with _executor(settings, corpus.out) as executor:
            run = Run(settings, executor)
            takedown = forget.plan(config)
            forget.remember(corpus, takedown)
            texts_gone, copies = takedown.documents.num_rows, takedown.copies
            run.reporter.say(f"forget: {texts_gone:,} texts go, and {copies:,} URLs of copies that would come instead")
            run.run([s for s in STAGES[STAGES.index("extract") :] if not settings.stages or s in settings.stages])
            if config.forget_archive:
                blanked, left = forget.blank_responses(corpus, forget.archived_pages(corpus))
                run.reporter.say(f"forget: {blanked:,} archived responses blanked, {left:,} are not in this corpus")
    return 0


def _executor(config: CorpusConfig, out: Path) -> executors.Executor:
    if config.executor is Executor.local:
        return executors.LocalExecutor(config.workers or executors.cores())
    try:
        from data_pipeline.ray_executor import RayExecutor
    except ModuleNotFoundError as e:
        if e.name != "ray":
            raise
        raise InputError("executor=ray: Ray is not installed; run pip install 'gpt2train[ray]'") from e
    return RayExecutor(config.ray, config.workers, out)


class Run:
    """One run over one corpus folder, under its lock."""

    def __init__(self, config: CorpusConfig, executor: executors.Executor) -> None:
        self.config = config
        self.executor = executor
        self.out = Path(config.out)
        self.corpus = Corpus(self.out)
        self.reporter = Reporter(bars=config.progress)
        self.hashes = Hashes()
        self.shards = 0

    def run(self, only: Sequence[str] = ()) -> None:
        """Run the stages that the settings name, or `only` those."""
        stages = only or [s for s in STAGES if not self.config.stages or s in self.config.stages]
        enter: dict[Source, Callable[[bool, bool], None]] = {
            Source.urls: self.enter_by_urls,
            Source.warc: self.enter_by_warc,
            Source.dataset: self.enter_by_dataset,
        }
        enter[self.config.source]("urls" in stages, "fetch" in stages)
        later: list[tuple[str, Callable[[], None]]] = [
            ("extract", self.extract),
            ("filter", self.filter),
            ("dedup", self.dedup),
            ("decontaminate", self.decontaminate),
            ("tokenize", self.tokenize),
        ]
        for name, stage in later:
            if name in stages:
                stage()
        self.close()

    # ── entering ────────────────────────────────────────────────────────────────────────────────────────────────

    def enter_by_urls(self, run_urls: bool, run_fetch: bool) -> None:
        source = Path(self.config.urls)
        if not source.exists() and run_urls:
            raise InputError(f"urls={source}: there is no such file or folder; check the path")
        self.shards = self._shard_count(lambda: urls.count_urls(source, self.config.url_list))
        corpus, numbers = self.corpus, range(self.shards)
        rules, blocked = self.config.url_list, self.config.url_list.blocked_domains_file
        if blocked and run_urls:
            more = read_list(blocked, "url_list.blocked_domains_file")
            rules = replace(rules, blocked_domains=[*rules.blocked_domains, *more])
        settings = {**plain(self.config.url_list), "shards": self.shards}
        settings.pop("blocked_domains_file")  # what it says counts, not what it is called
        files = tuple(sorted(p for p in source.rglob("*") if p.is_file())) if source.is_dir() else (source,)
        files += (Path(blocked),) if blocked else ()
        outputs = tuple(p for k in numbers for p in (corpus.table("urls", k), corpus.verdicts("urls", k)))
        if run_urls:
            step = Step("urls", "all", corpus.folder("urls"), settings, files, outputs)
            arguments = (source, corpus.folder("urls"), self.shards, rules)
            self._run("urls", [step], lambda step: Task("urls", urls.write_url_shards, arguments))
        if run_fetch:
            self._require("fetch", [p for k in numbers for p in (corpus.table("urls", k),)], "urls")
            self.fetch()

    def fetch(self) -> None:
        """No setting of the fetch makes it run again: what was fetched is the raw truth and stays."""
        corpus, folder = self.corpus, self.corpus.folder("fetch")
        earlier = self._earlier_pages()
        shards = [FetchShard(corpus.table("urls", k), folder, k, earlier[k]) for k in range(self.shards)]
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
            for k in range(self.shards)
        ]
        again = retry.begin_round(folder, shards, self.config.retry)
        if again is not None:
            for k in again.waiting:
                steps[k].marker.unlink(missing_ok=True)
            self.reporter.say(f"fetch: {sum(again.waiting.values()):,} URLs are open, retry={','.join(again.reasons)}")
        due = [s for s, step in zip(shards, steps, strict=True) if why_not_done(step, self.hashes) is not None]
        if due:
            folder.mkdir(parents=True, exist_ok=True)
            processes = min(self.config.fetch.processes, self.executor.workers, len(due))
            groups = [due[i::processes] for i in range(processes)]
            arguments = (self.config.fetch, self.out, self.config.progress)
            work = [Task("fetch", tasks.fetch_group, (g, *arguments)) for g in groups]
            total = sum(_rows(corpus.table("urls", s.number)) for s in due)
            with self.reporter.stage("fetch", total) as counter:
                self.executor.run(work, on_done=lambda task, result: None, on_rows=counter.advance)
                if counter.done:
                    self.reporter.say(f"fetch: {counter.done:,} URLs, {counter.rate:,.0f}/s")
        retry.end_round(folder)
        by_name = {step.name: shard for shard, step in zip(shards, steps, strict=True)}

        def finish(step: Step) -> Task:
            shard = by_name[step.name]
            arguments = (shard, self.out, archived[shard.number] if archived else None)
            return Task(f"fetch {step.name}", tasks.finish_fetch, arguments)

        self._run("fetch", steps, finish, quiet=True)

    def _earlier_pages(self) -> list[Path] | list[None]:
        """For each shard the page table of the same shard of `fetch.since`."""
        since = self.config.fetch.since
        if not since:
            return [None] * self.shards
        tables = [Corpus(Path(since)).table("fetch", k) for k in range(self.shards)]
        if _fixed_shards(Path(since)) != self.shards or not all(table.exists() for table in tables):
            raise InputError(
                f"fetch.since={since}: must be a corpus of {self.shards} shards whose fetch is finished; "
                f"leave shards= out when a new corpus is begun, and it takes that number over"
            )
        return tables

    def _rescue_index(self) -> list[Rescue]:
        """For each shard the archived pages of `fetch.rescue`; empty without it."""
        if not self.config.fetch.rescue:
            return []
        files = _warc_files("fetch.rescue", Path(self.config.fetch.rescue))
        parts, steps, index = self._warc_index(files, self.corpus.folder("rescue"))
        self._run("rescue", steps, index, quiet=True)
        outputs = [self.corpus.table("rescue", k) for k in range(self.shards)]
        pages = [page for page, _ in parts]
        settings = {"shards": self.shards, "strip_tracking": self.config.url_list.strip_tracking}
        step = Step("rescue", "all", self.corpus.folder("rescue"), settings, tuple(pages), tuple(outputs))
        arguments = (pages, outputs, self.config.url_list)
        self._run("rescue", [step], lambda step: Task("rescue", tasks.split_rescue_index, arguments), quiet=True)
        return [Rescue(table, self.config.fetch) for table in outputs]

    def enter_by_warc(self, run_urls: bool, run_fetch: bool) -> None:
        files = _warc_files("path", Path(self.config.path))
        corpus, folder = self.corpus, self.corpus.folder("fetch")
        parts, steps, index = self._warc_index(files, folder)
        if run_fetch:
            self._run("index", steps, index)
        self._require("extract", [p for part in parts for p in part], "fetch")
        self.shards = self._shard_count(lambda: sum(_rows(v) for _, v in parts))
        outputs = tuple(p for k in range(self.shards) for p in (corpus.table("fetch", k), corpus.verdicts("fetch", k)))
        if run_fetch:
            inputs = tuple(p for part in parts for p in part)
            step = Step("fetch", "all", folder, {"shards": self.shards}, inputs, outputs)
            arguments = (self.out, parts, self.shards)
            self._run("fetch", [step], lambda step: Task("fetch", tasks.split_warc_index, arguments), quiet=True)

    def _warc_index(
        self, files: Sequence[Path], folder: Path
    ) -> tuple[list[tuple[Path, Path]], list[Step], Callable[[Step], Task]]:
        """(page and verdict tables, steps, step → task) of an index of WARC files, one step a file.

        WARC files are large: their size stands for them here, each record's digest is checked when it is read.
        """
        parts = [
            (folder / f"file_{i:05d}.parquet", folder / f"file_{i:05d}.verdicts.parquet") for i in range(len(files))
        ]
        steps = [
            Step(folder.name, f"file_{i:05d}", folder, {"file": str(p), "bytes": p.stat().st_size}, (), parts[i])
            for i, p in enumerate(files)
        ]
        place = {step.name: i for i, step in enumerate(steps)}

        def index(step: Step) -> Task:
            i = place[step.name]
            return Task(f"index {files[i].name}", tasks.index_warc_file, (files[i], i, *parts[i], self.config.fetch))

        return parts, steps, index

    def enter_by_dataset(self, run_urls: bool, run_fetch: bool) -> None:
        files = texts.dataset_files(self.config.path)
        folder = self.corpus.folder("extract")
        settings = {"path": self.config.path, "text_column": self.config.text_column, "shards": self.config.shards}
        rules = forget.read_forget_list(self.corpus)
        if rules is not None:
            settings["forgotten"] = self.hashes.of(self.corpus.forget_list)
        step = Step("extract", "all", folder, settings, tuple(files), ())
        if not self.config.stages or "extract" in self.config.stages:
            why = why_not_done(step, self.hashes)
            if why is None:
                self.reporter.say("extract: the dataset was read before and stands")
            else:
                self.reporter.say(f"extract: reading {self.config.path}{f' again: {why}' if why else ''}")
                made, written = texts.write_document_shards(
                    self.config.path,
                    self.config.text_column,
                    self.corpus,
                    self.config.shards,
                    rules.because if rules else None,
                )
                prune(folder, written)
                mark_done(step, {"shards": made}, self.hashes, written)
        marker = read_marker(step)
        if marker is None:
            raise InputError(f"stages={self.config.stages}: the dataset was not read yet; add extract")
        self.shards = int(marker["counts"]["shards"])
        self._require("filter", list(recorded_outputs(step, marker)), "extract")

    # ── documents ───────────────────────────────────────────────────────────────────────────────────────────────

    def extract(self) -> None:
        if self.config.source is Source.dataset:
            return  # its rows entered as documents
        self._require("extract", [self.corpus.table("fetch", k) for k in range(self.shards)], "fetch")
        forgotten, settings = self._forgotten(), plain(self.config.extract)
        outputs = [(self.corpus.table("extract", k), self.corpus.verdicts("extract", k)) for k in range(self.shards)]
        steps = [
            Step(
                "extract",
                f"{k:05d}",
                self.corpus.folder("extract"),
                {**settings, **forgotten.get(k, {})},
                (self.corpus.table("fetch", k),),
                outputs[k],
            )
            for k in range(self.shards)
        ]
        lighter = {k for k in forgotten if stands_but_for(steps[k], "forgotten", self.hashes)}
        parts = self._extract_parts([step for k, step in enumerate(steps) if k not in lighter])

        def task(k: int) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
            if k in lighter:
                return tasks.forget_pages, (self.out, k)
            if k in parts:
                return tasks.join_extracted, (self.out, k, parts[k])
            return tasks.extract_pages, (self.out, k, self.config.extract)

        self._by_shard(
            "extract",
            settings,
            of_shard=lambda k: forgotten.get(k, {}),
            inputs=lambda k: (self.corpus.table("fetch", k),),
            outputs=lambda k: outputs[k],
            task=task,
            rows=lambda k: 0 if k in parts else _rows(self.corpus.table("fetch", k)),
        )
        shutil.rmtree(self.corpus.folder("extract_parts"), ignore_errors=True)

    def _extract_parts(self, steps: Sequence[Step]) -> dict[int, list[tuple[Path, Path]]]:
        """Extract shards that are much larger than the others in parts, so that all workers share a large domain.

        Returns for each such shard its parts' files, which stand until the shard is joined.
        """
        folder = self.corpus.folder("extract_parts")
        rows = [_rows(self.corpus.table("fetch", k)) for k in range(self.shards)]
        most = min(max(sum(rows) // LEAST_SHARDS, LEAST_PART_ROWS), ROWS_PER_SHARD)
        parts: dict[int, list[tuple[Path, Path]]] = {}
        work: list[Step] = []
        place: dict[str, tuple[int, int]] = {}
        for step in steps:
            k = int(step.name)
            if rows[k] <= most or why_not_done(step, self.hashes) is None:
                continue
            parts[k] = []
            for start in range(0, rows[k], most):
                name = f"{k:05d}_{start:09d}"
                files = (folder / f"{name}.parquet", folder / f"{name}.verdicts.parquet")
                settings = {**step.settings, "start": start, "rows": most}
                work.append(Step("extract_parts", name, folder, settings, step.inputs, files))
                place[name] = (k, start)
                parts[k].append(files)

        def make(step: Step) -> Task:
            k, start = place[step.name]
            arguments = (self.out, k, self.config.extract, start, most, step.outputs)
            return Task(f"extract {step.name}", tasks.extract_rows, arguments)

        if work:
            self._run(
                "extract", work, make, rows=lambda step: min(most, rows[place[step.name][0]] - place[step.name][1])
            )
        return parts

    def _forgotten(self) -> dict[int, dict[str, str]]:
        """For each shard with rows that were taken down, what to tell them by."""
        rules = forget.read_forget_list(self.corpus)
        if rules is None:
            return {}
        columns = ["index", "url", "final_url", "domain"]
        pages = [pq.read_table(self.corpus.table("fetch", k), columns=columns) for k in range(self.shards)]
        return {k: found for k, table in enumerate(pages) if (found := forget.setting(rules.rows(table)))}

    def filter(self) -> None:
        self._require("filter", [self.corpus.table("extract", k) for k in range(self.shards)], "extract")
        settings = {**plain(self.config.language, "language."), **plain(self.config.quality, "quality.")}
        settings.pop("quality.blocked_words_file")  # what it says counts, not what it is called
        blocked = self.config.quality.blocked_words_file
        if blocked:
            read_list(blocked, "quality.blocked_words_file")
        lists = (Path(blocked),) if blocked else ()
        self._by_shard(
            "filter",
            settings,
            inputs=lambda k: (self.corpus.table("extract", k), *lists),
            outputs=lambda k: (self.corpus.verdicts("filter", k), self.corpus.changes(k)),
            task=lambda k: (tasks.filter_documents, (self.out, k, self.config.language, self.config.quality)),
            rows=lambda k: _rows(self.corpus.table("extract", k)),
        )

    def dedup(self) -> None:
        corpus, c = self.corpus, self.config.dedup
        self._require("dedup", [corpus.verdicts("filter", k) for k in range(self.shards)], "filter")
        signed = {name: value for name, value in plain(c).items() if name not in ("keep", "against", "plant")}

        def entering(k: int) -> tuple[Path, ...]:
            return (corpus.table("extract", k), corpus.verdicts("filter", k), corpus.changes(k))

        self._by_shard(
            "dedup",
            signed,
            inputs=entering,
            outputs=lambda k: (corpus.signatures(k),),
            task=lambda k: (tasks.sign_documents, (self.out, k, c)),
            rows=lambda k: _rows(corpus.verdicts("filter", k)),
            part="signatures",
        )
        signatures = tuple(corpus.signatures(k) for k in range(self.shards))
        old = tuple(p for folder in c.against for pair in tasks.old_index(Path(folder)) for p in pair)
        joined = {**signed, "keep": c.keep.value}
        join = Step("dedup", "duplicates", corpus.folder("dedup"), joined, (*signatures, *old), (corpus.duplicates,))
        arguments = (self.out, self.shards, c)
        self._run("dedup join", [join], lambda step: Task("dedup", tasks.join_duplicates, arguments), quiet=True)
        self._by_shard(
            "dedup",
            {},
            inputs=lambda k: (corpus.signatures(k), corpus.duplicates),
            outputs=lambda k: (corpus.verdicts("dedup", k),),
            task=lambda k: (tasks.drop_duplicates, (self.out, k)),
            rows=lambda k: _rows(corpus.signatures(k)),
        )
        if c.plant:
            self._measure_dedup(signed, entering, signatures)

    def _measure_dedup(
        self, signed: Mapping[str, Any], entering: Callable[[int], tuple[Path, ...]], signatures: tuple[Path, ...]
    ) -> None:
        corpus, c = self.corpus, self.config.dedup
        counts = [c.plant // self.shards + (k < c.plant % self.shards) for k in range(self.shards)]
        self._by_shard(
            "dedup",
            {**signed, "plant": c.plant},
            inputs=entering,
            outputs=lambda k: (corpus.planted(k),),
            task=lambda k: (tasks.plant_duplicates, (self.out, k, c, counts[k])),
            rows=lambda k: counts[k],
            part="planted",
        )
        inputs = (*signatures, *(corpus.planted(k) for k in range(self.shards)))
        settings = {**signed, "plant": c.plant}
        step = Step("dedup", "planting", corpus.folder("dedup"), settings, inputs, (corpus.planting,))
        arguments = (self.out, self.shards, c)
        self._run("planting", [step], lambda step: Task("planting", tasks.measure_planted, arguments), quiet=True)

    def decontaminate(self) -> None:
        corpus, c = self.corpus, self.config.decontaminate
        self._require("decontaminate", [corpus.verdicts("dedup", k) for k in range(self.shards)], "dedup")
        missing = [p for p in c.paths if not Path(p).is_file()]
        if missing:
            raise InputError(f"decontaminate.paths={missing[0]}: there is no such file; check the path")
        settings = {name: value for name, value in plain(c).items() if name != "paths"}
        finish = self.config.documents
        sets = tuple(Path(p) for p in c.paths)

        def entering(k: int) -> tuple[Path, ...]:
            before = (corpus.verdicts("filter", k), corpus.changes(k), corpus.verdicts("dedup", k))
            return (corpus.table("extract", k), *before)

        self._by_shard(
            "decontaminate",
            {**settings, **plain(finish, "documents.")},
            inputs=lambda k: (*entering(k), *sets),
            outputs=lambda k: (corpus.verdicts("decontaminate", k), corpus.cut(k), corpus.found_ngrams(k)),
            task=lambda k: (tasks.decontaminate, (self.out, k, c, finish)),
            rows=lambda k: _rows(corpus.signatures(k)),
        )
        found = tuple(corpus.found_ngrams(k) for k in range(self.shards))
        total = Step(
            "decontaminate",
            "contamination",
            corpus.folder("decontaminate"),
            settings,
            (*found, *sets),
            (corpus.contamination,),
        )
        arguments = (self.out, self.shards, c)
        self._run(
            "contamination",
            [total],
            lambda step: Task("contamination", tasks.report_contamination, arguments),
            quiet=True,
        )
        self._by_shard(
            "documents",
            {},
            inputs=lambda k: (*entering(k), corpus.verdicts("decontaminate", k), corpus.cut(k)),
            outputs=lambda k: (corpus.table("documents", k),),
            task=lambda k: (tasks.write_documents, (self.out, k)),
            rows=lambda k: _rows(corpus.verdicts("decontaminate", k)),
        )

    def tokenize(self) -> None:
        corpus, c = self.corpus, self.config.tokenize
        documents = [corpus.table("documents", k) for k in range(self.shards)]
        self._require("tokenize", documents, "decontaminate")
        vocabulary = tokenizer.load().sha256
        self._by_shard(
            "tokenize",
            {"tokenizer": vocabulary},
            inputs=lambda k: (corpus.table("documents", k),),
            outputs=lambda k: corpus.part(k),
            task=lambda k: (tasks.tokenize_documents, (self.out, k)),
            rows=lambda k: _rows(corpus.table("documents", k)),
        )
        parts = [corpus.part(k) for k in range(self.shards)]
        settings = {**plain(c), "tokenizer": vocabulary}
        gone = (corpus.tombstones,) if corpus.tombstones.exists() else ()
        made_of = (*(p for part in parts for p in part), *gone)
        step = Step("tokens", "tokens", corpus.folder("tokenize"), settings, made_of, ())
        why = why_not_done(step, self.hashes)
        if why is None:
            self.reporter.say("tokens: written before, they stand")
            return
        self.reporter.say(f"tokens: shuffling and packing{f' again: {why}' if why else ''}")
        made_from = {"settings": settings, "documents": [self.hashes.of(p) for p in documents]}
        fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        with self.reporter.stage("tokens", sum(_rows(p) for _, p in parts)) as counter:
            counts = write_token_shards(parts, corpus.tokens, c, fingerprint, counter.advance, corpus.tombstones)
        if counts["files_unchanged"]:
            rewritten, stand = counts["files"] - counts["files_unchanged"], counts["files_unchanged"]
            self.reporter.say(f"tokens: {rewritten:,} files written, {stand:,} stand as they were")
        mark_done(step, counts, self.hashes, sorted(p for p in corpus.tokens.iterdir() if p.is_file()))

    # ── closing ─────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Ledger, summary, report and dataset card of what is there. The totals must add up."""
        stages = []
        for stage in LEDGER_STAGES[self.config.source]:
            if not all(self.corpus.verdicts(stage, k).exists() for k in range(self.shards)):
                break
            stages.append(stage)
        results: dict[str, Mapping[str, Any]] = {}
        work = [Task(f"ledger {k:05d}", tasks.write_ledger, (self.out, k, stages)) for k in range(self.shards)]
        self.executor.run(work, on_done=lambda task, result: results.__setitem__(task.label, result))
        prune(self.corpus.folder("ledger"), [self.corpus.ledger(k) for k in range(self.shards)])
        summary: dict[str, Any] = ledger.funnel([results[task.label] for task in work], stages)
        finished = stages[-1] == "decontaminate" and all(
            self.corpus.table("documents", k).exists() for k in range(self.shards)
        )
        summary |= {
            "recipe": self.config.recipe,
            "source": self.config.source.value,
            "shards": self.shards,
            "versions": {name: version(name) for name in ("gpt2train", "trafilatura", "py3langid", "tiktoken")},
        }
        if finished:
            summary["documents"] = sum(_rows(self.corpus.table("documents", k)) for k in range(self.shards))
        if self.config.dedup.plant and self.corpus.planting.exists():
            summary["planted"] = json.loads(self.corpus.planting.read_text(encoding="utf-8"))
        if finished and self.config.report.domains:
            summary["domains_beside"] = report.compare_domains(self.corpus, self.config.report.domains)
        if self.corpus.contamination.exists():
            summary["contamination"] = json.loads(self.corpus.contamination.read_text(encoding="utf-8"))
        manifest = self.corpus.tokens / "manifest.json"
        if manifest.exists():
            summary["tokens"] = json.loads(manifest.read_text(encoding="utf-8"))
        write_json(summary, self.corpus.summary)
        report.write_corpus_report(self.corpus)
        if finished:
            card.write_dataset_card(self.corpus, summary)
        for line in (*report.funnel_lines(summary), *report.measure_lines(summary)):
            self.reporter.say(line)
        self.reporter.say(f"corpus: {self.out}  report: {self.corpus.report}")

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _shard_count(self, count_rows: Callable[[], int]) -> int:
        """The number of shards is part of the order of documents, so it stays for the life of a corpus folder."""
        fixed = _fixed_shards(self.out)
        if fixed is not None:
            if self.config.shards not in (0, fixed):
                raise InputError(
                    f"shards={self.config.shards}: this corpus was begun with {fixed}; give that or a new out="
                )
            return fixed
        earlier = _fixed_shards(Path(self.config.fetch.since)) if self.config.fetch.since else None
        shards = self.config.shards or earlier or max(LEAST_SHARDS, -(-count_rows() // ROWS_PER_SHARD))
        write_json({"shards": shards}, self.out / "shards.json")
        return shards

    def _require(self, stage: str, files: Sequence[Path], before: str) -> None:
        missing = [p for p in files if not p.exists()]
        if missing:
            raise InputError(
                f"stages={self.config.stages}: {stage} needs {missing[0].relative_to(self.out)}, which {before} makes; "
                f"add {before}"
            )

    def _by_shard(
        self,
        stage: str,
        settings: Mapping[str, Any],
        *,
        inputs: Callable[[int], tuple[Path, ...]],
        outputs: Callable[[int], tuple[Path, ...]],
        task: Callable[[int], tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]],
        rows: Callable[[int], int],
        part: str = "",
        of_shard: Callable[[int], Mapping[str, Any]] = lambda k: {},
    ) -> None:
        name = f"{stage} {part}".strip()
        folder = self.corpus.folder(stage)
        steps = [
            Step(
                stage,
                f"{k:05d}{f'.{part}' if part else ''}",
                folder,
                {**settings, **of_shard(k)},
                inputs(k),
                outputs(k),
            )
            for k in range(self.shards)
        ]
        number = {step.name: k for k, step in enumerate(steps)}

        def make(step: Step) -> Task:
            function, arguments = task(number[step.name])
            return Task(f"{name} {step.name}", function, arguments)

        self._run(name, steps, make, rows=lambda step: rows(number[step.name]))

    def _run(
        self,
        name: str,
        steps: Sequence[Step],
        make: Callable[[Step], Task],
        *,
        rows: Callable[[Step], int] = lambda step: 0,
        quiet: bool = False,
    ) -> None:
        """Do the steps that do not stand, and say which are done again and why."""
        reasons = {step.name: why_not_done(step, self.hashes) for step in steps}
        due = [step for step in steps if reasons[step.name] is not None]
        again: dict[str, list[str]] = {}
        for step in due:
            if reasons[step.name]:
                again.setdefault(str(reasons[step.name]), []).append(step.name)
        for why, names in again.items():
            shards = f"{len(names)} of {len(steps)} shards" if len(steps) > 1 else "done"
            self.reporter.say(f"{name}: {shards} again: {why}")
        if not due:
            if not quiet:
                self.reporter.say(f"{name}: finished before, nothing to do")
            return
        work = {step.name: make(step) for step in due}
        by_label = {work[step.name].label: step for step in due}
        for step in due:
            step.folder.mkdir(parents=True, exist_ok=True)
        with self.reporter.stage(name, sum(rows(step) for step in due)) as counter:

            def on_done(task: Task, counts: dict[str, Any]) -> None:
                mark_done(by_label[task.label], counts, self.hashes)

            self.executor.run(list(work.values()), on_done=on_done, on_rows=counter.advance)
            if counter.done and not quiet:
                self.reporter.say(f"{name}: {counter.done:,} rows, {counter.rate:,.0f}/s")


def _fixed_shards(corpus: Path) -> int | None:
    """The number of shards that a corpus was begun with."""
    path = corpus / "shards.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["shards"]) if path.exists() else None


def _warc_files(setting: str, root: Path) -> list[Path]:
    """The WARC file `root`, or those of the folder, in the order of their names. Raises InputError without any."""
    if not root.exists():
        raise InputError(f"{setting}={root}: there is no such WARC file or folder; check the path")
    endings = (".warc", ".warc.gz", ".warc.zst", ".arc", ".arc.gz")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.name.endswith(endings))
    if not files:
        raise InputError(f"{setting}={root}: holds no {', '.join(endings)} file; give the folder that does")
    return [p.resolve() for p in files]


def plain(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config dataclass as JSON values."""
    values = asdict(config)
    return {f"{prefix}{k}": v.value if isinstance(v, Enum) else v for k, v in values.items()}


def _rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer alone."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError):  # damaged or absent: the step that makes it will say so
        return 0
