"""URL list, WARC files or text dataset → documents, ledger, token shards. The only room that knows the stages' order.

Each stage is a list of steps (`store.Step`), mostly one a shard; a step that stands is not done again, one whose
settings or input changed is, and the reason is said. So a run can be killed at any moment and the same command goes on:
the result is the bytes of an undisturbed run (promise 1), whatever the number of workers.

Chosen: files between stages, each with a marker that holds hashes, against one database for all. A shard can be looked
at, copied and made again by itself, and any executor that can call a function will do. Stages after `extract` write
verdicts, not texts, so that a changed threshold costs seconds and no disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline import card, executors, forget, ledger, report, tasks, tokenizer, what_if
from data_pipeline.clean import bands
from data_pipeline.config import STAGES, CorpusConfig, Executor, Source, check
from data_pipeline.entrances import LEAST_SHARDS, ROWS_PER_SHARD, Entrance, check_inputs
from data_pipeline.executors import Task
from data_pipeline.layout import Corpus, config_text, read_config
from data_pipeline.pack import write_token_shards
from data_pipeline.progress import Reporter
from data_pipeline.records import ConfigError, CorruptionError, InputError
from data_pipeline.steps import Steps, plain, rows_of
from data_pipeline.storage.place import Place
from data_pipeline.store import (
    Step,
    lock,
    remove_temporaries,
    stands_but_for,
    storage_errors,
    why_not_done,
    write_atomic,
    write_json,
)

LEAST_PART_ROWS = 64
"""Pages that are worth a process of their own: it takes a second to start."""

JOIN_IN_PARTS_ROWS = 500_000
"""From so many documents on near-duplicates are joined in a task a band; below, one task needs less than starting them
costs, and 100 MB."""

# Stages whose verdicts a row meets on its way, by where it enters.
LEDGER_STAGES = {
    Source.urls: ("urls", "fetch", "extract", "filter", "dedup", "decontaminate"),
    Source.warc: ("fetch", "extract", "filter", "dedup", "decontaminate"),
    Source.dataset: ("extract", "filter", "dedup", "decontaminate"),
}


def build_corpus(config: CorpusConfig, on_take_down: Callable[[forget.TakeDown], None] | None = None) -> int:
    """Run the stages asked for; return 0. Raises PipelineError; see records.py for the exit codes.

    `on_take_down` hears of a take-down what is about to go, while the token shards are still as they were.
    """
    with executors.stopped_by_sigterm():
        return _build(config, on_take_down)


def _build(config: CorpusConfig, on_take_down: Callable[[forget.TakeDown], None] | None) -> int:
    faults = check(config)
    if faults:
        raise ConfigError(faults)
    place = Place(config, Reporter(bars=config.progress).say)
    config, out = place.config, place.out
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out}: is a file; give a folder")
    if config.forget:
        return take_down(place, on_take_down)
    if config.what_if:
        if place.remote:
            with _owned(place):
                return what_if.what_if(config)
        return what_if.what_if(config)
    check_inputs(config, config.stages or STAGES, place.faults)
    with _owned(place):
        _require_same_source(config)
        with write_atomic(Corpus(out).config) as temporary:
            temporary.write_text(config_text(place.given), encoding="utf-8")
        with _executor(config, out) as executor:
            run = Run(config, executor, place)
            run.run()
        remove_temporaries(out)  # of tasks whose worker died and that others finished
        if run.nothing_left:
            raise InputError(f"out={place.given.out}: {run.nothing_left}")
    return 0


@contextlib.contextmanager
def _owned(place: Place) -> Iterator[None]:
    """The corpus folder, made and locked, free of halves; and the bucket behind it, if there is one."""
    _make_folder(place.out)
    with lock(place.out), storage_errors(place.out):
        remove_temporaries(place.out)
        with place.held():
            yield


def _make_folder(out: Path) -> None:
    with storage_errors(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"out={out}: no folder can be made there ({e.strerror}); give another out=") from None


def _require_same_source(config: CorpusConfig) -> None:
    """One corpus folder, one way in: rows of another would take the place of what lies there."""
    corpus, before = Corpus(Path(config.out)), None
    with contextlib.suppress(InputError):
        before = read_config(corpus).source
    if before is None:  # settings of another version
        with contextlib.suppress(InputError, CorruptionError):
            before = Source(report.read_summary(corpus)["source"])
    begun = any(marker for stage in STAGES for marker in corpus.folder(stage).glob("*.done.json"))
    if begun and before is not None and before is not config.source:
        raise InputError(
            f"source={config.source.value}: the corpus in {corpus.out} was begun with source={before.value}; "
            f"give another out=, or source={before.value}"
        )


def take_down(place: Place, on_take_down: Callable[[forget.TakeDown], None] | None) -> int:
    """Remove what `forget` names from the corpus, and run again the stages that this concerns."""
    config, corpus = place.config, Corpus(place.out)
    with contextlib.ExitStack() as owned:
        if place.remote:  # its settings have to be brought first
            owned.enter_context(_owned(place))
        settings, faults = place.with_inputs_here(forget.settings_of(config))
        stages = [s for s in STAGES[STAGES.index("extract") :] if not settings.stages or s in settings.stages]
        check_inputs(settings, stages, (*place.faults, *faults))
        if not place.remote:
            owned.enter_context(_owned(place))
        with _executor(settings, corpus.out) as executor:
            run = Run(settings, executor, place)
            takedown = forget.plan(config)
            if on_take_down is not None:
                on_take_down(takedown)
            forget.remember(corpus, takedown)
            texts_gone, copies = takedown.documents.num_rows, takedown.copies
            run.steps.reporter.say(
                f"forget: {texts_gone:,} texts go, and {copies:,} URLs of copies that would come instead"
            )
            if takedown.unmatched:
                names = ", ".join(takedown.unmatched)
                run.steps.reporter.say(f"forget: no row of this corpus has to do with {names}; check the spelling")
            run.run(stages)
            if config.forget_archive:
                blanked, left = forget.blank_responses(corpus, forget.archived_pages(corpus))
                run.steps.reporter.say(
                    f"forget: {blanked:,} archived responses blanked, {left:,} are not in this corpus"
                )
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

    def __init__(self, config: CorpusConfig, executor: executors.Executor, place: Place) -> None:
        self.config = config
        self.out = Path(config.out)
        self.corpus = Corpus(self.out)
        self.steps = Steps(self.corpus, executor, Reporter(bars=config.progress), config.stages, place.send_step)
        self.entrance = Entrance(config, self.steps, place.address_of)
        self.nothing_left = ""
        """Why there is no document to make token shards of, and what to do; empty where there is one."""

    def run(self, only: Sequence[str] = ()) -> None:
        """Run the stages that the settings name, or `only` those."""
        stages = only or [s for s in STAGES if not self.config.stages or s in self.config.stages]
        self.entrance.enter("urls" in stages, "fetch" in stages)
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

    # ── documents ───────────────────────────────────────────────────────────────────────────────────────────────

    def extract(self) -> None:
        if self.config.source is Source.dataset:
            return  # its rows entered as documents
        self.steps.require("extract", [self.corpus.table("fetch", k) for k in range(self.steps.shards)], "fetch")
        forgotten, settings = self._forgotten(), plain(self.config.extract)
        if languages := self._languages():
            settings["language.keep"] = languages
        outputs = [
            (self.corpus.table("extract", k), self.corpus.verdicts("extract", k)) for k in range(self.steps.shards)
        ]
        steps = [
            Step(
                "extract",
                f"{k:05d}",
                self.corpus.folder("extract"),
                {**settings, **forgotten.get(k, {})},
                (self.corpus.table("fetch", k),),
                outputs[k],
            )
            for k in range(self.steps.shards)
        ]
        lighter = {k for k in forgotten if stands_but_for(steps[k], "forgotten", self.steps.hashes)}
        parts = self._extract_parts([step for k, step in enumerate(steps) if k not in lighter])

        def task(k: int) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
            if k in lighter:
                return tasks.forget_pages, (self.out, k)
            if k in parts:
                return tasks.join_extracted, (self.out, k, parts[k])
            return tasks.extract_pages, (self.out, k, self.config.extract, languages)

        self.steps.by_shard(
            "extract",
            settings,
            of_shard=lambda k: forgotten.get(k, {}),
            inputs=lambda k: (self.corpus.table("fetch", k),),
            outputs=lambda k: outputs[k],
            task=task,
            rows=lambda k: 0 if k in parts else rows_of(self.corpus.table("fetch", k)),
        )
        shutil.rmtree(self.corpus.folder("extract_parts"), ignore_errors=True)

    def _languages(self) -> list[str]:
        """The languages that extraction looks for; empty: it takes all."""
        return sorted(self.config.language.keep) if self.config.extract.skip_other_languages else []

    def _extract_parts(self, steps: Sequence[Step]) -> dict[int, list[tuple[Path, Path]]]:
        """Extract shards that are much larger than the others in parts, so that all workers share a large domain.

        Returns for each such shard its parts' files, which stand until the shard is joined.
        """
        folder = self.corpus.folder("extract_parts")
        rows = [rows_of(self.corpus.table("fetch", k)) for k in range(self.steps.shards)]
        most = min(max(sum(rows) // LEAST_SHARDS, LEAST_PART_ROWS), ROWS_PER_SHARD)
        parts: dict[int, list[tuple[Path, Path]]] = {}
        work: list[Step] = []
        place: dict[str, tuple[int, int]] = {}
        for step in steps:
            k = int(step.name)
            if rows[k] <= most or why_not_done(step, self.steps.hashes) is None:
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
            arguments = (self.out, k, self.config.extract, self._languages(), start, most, step.outputs)
            return Task(f"extract {step.name}", tasks.extract_rows, arguments)

        if work:
            self.steps.run(
                "extract", work, make, rows=lambda step: min(most, rows[place[step.name][0]] - place[step.name][1])
            )
        return parts

    def _forgotten(self) -> dict[int, dict[str, str]]:
        """For each shard with rows that were taken down, what to tell them by."""
        rules = forget.read_forget_list(self.corpus)
        if rules is None:
            return {}
        columns = ["index", "url", "final_url", "domain"]
        pages = [pq.read_table(self.corpus.table("fetch", k), columns=columns) for k in range(self.steps.shards)]
        return {k: found for k, table in enumerate(pages) if (found := forget.setting(rules.rows(table)))}

    def filter(self) -> None:
        self.steps.require("filter", [self.corpus.table("extract", k) for k in range(self.steps.shards)], "extract")
        settings = {**plain(self.config.language, "language."), **plain(self.config.quality, "quality.")}
        settings.pop("quality.blocked_words_file")  # what it says counts, not what it is called
        blocked = self.config.quality.blocked_words_file
        lists = (Path(blocked),) if blocked else ()
        self.steps.by_shard(
            "filter",
            settings,
            inputs=lambda k: (self.corpus.table("extract", k), *lists),
            outputs=lambda k: (self.corpus.verdicts("filter", k), self.corpus.changes(k)),
            task=lambda k: (tasks.filter_documents, (self.out, k, self.config.language, self.config.quality)),
            rows=lambda k: rows_of(self.corpus.table("extract", k)),
        )

    def dedup(self) -> None:
        corpus, c = self.corpus, self.config.dedup
        self.steps.require("dedup", [corpus.verdicts("filter", k) for k in range(self.steps.shards)], "filter")
        signed = {name: value for name, value in plain(c).items() if name not in ("keep", "against", "plant")}

        def entering(k: int) -> tuple[Path, ...]:
            return (corpus.table("extract", k), corpus.verdicts("filter", k), corpus.changes(k))

        self.steps.by_shard(
            "dedup",
            signed,
            inputs=entering,
            outputs=lambda k: (corpus.signatures(k),),
            task=lambda k: (tasks.sign_documents, (self.out, k, c)),
            rows=lambda k: rows_of(corpus.verdicts("filter", k)),
            part="signatures",
        )
        signatures = tuple(corpus.signatures(k) for k in range(self.steps.shards))
        old = tuple(p for folder in c.against for pair in tasks.old_index(Path(folder)) for p in pair)
        joined = {**signed, "keep": c.keep.value}
        join = Step("dedup", "duplicates", corpus.folder("dedup"), joined, (*signatures, *old), (corpus.duplicates,))
        arguments = (self.out, self.steps.shards, c)
        by_parts = sum(rows_of(path) for path in signatures) >= JOIN_IN_PARTS_ROWS
        if by_parts and why_not_done(join, self.steps.hashes) is not None:
            self._link_documents(signed, join.inputs)
        function = tasks.join_links if by_parts else tasks.join_duplicates
        self.steps.run("dedup join", [join], lambda step: Task("dedup", function, arguments), quiet=True)
        for part in bands.parts_of(c):  # as large as the signatures together, and made again from them
            corpus.links(part).unlink(missing_ok=True)
            self._links_step(part, signed, join.inputs).marker.unlink(missing_ok=True)
        self.steps.by_shard(
            "dedup",
            {},
            inputs=lambda k: (corpus.signatures(k), corpus.duplicates),
            outputs=lambda k: (corpus.verdicts("dedup", k),),
            task=lambda k: (tasks.drop_duplicates, (self.out, k)),
            rows=lambda k: rows_of(corpus.signatures(k)),
        )
        if c.plant:
            self._measure_dedup(signed, entering, signatures)

    def _links_step(self, part: int, settings: Mapping[str, Any], inputs: tuple[Path, ...]) -> Step:
        file = self.corpus.links(part)
        return Step("dedup", file.stem, self.corpus.folder("dedup"), {**settings, "part": part}, inputs, (file,))

    def _link_documents(self, settings: Mapping[str, Any], inputs: tuple[Path, ...]) -> None:
        """The parts of the join, each a step of its own; a killed run goes on with those that are missing."""
        steps = [self._links_step(part, settings, inputs) for part in bands.parts_of(self.config.dedup)]
        part_of = {step.name: int(step.settings["part"]) for step in steps}

        def make(step: Step) -> Task:
            arguments = (self.out, self.steps.shards, self.config.dedup, part_of[step.name])
            return Task(f"dedup {step.name}", tasks.link_documents, arguments)

        self.steps.run("dedup links", steps, make)

    def _measure_dedup(
        self, signed: Mapping[str, Any], entering: Callable[[int], tuple[Path, ...]], signatures: tuple[Path, ...]
    ) -> None:
        corpus, c = self.corpus, self.config.dedup
        counts = [c.plant // self.steps.shards + (k < c.plant % self.steps.shards) for k in range(self.steps.shards)]
        self.steps.by_shard(
            "dedup",
            {**signed, "plant": c.plant},
            inputs=entering,
            outputs=lambda k: (corpus.planted(k),),
            task=lambda k: (tasks.plant_duplicates, (self.out, k, c, counts[k])),
            rows=lambda k: counts[k],
            part="planted",
        )
        inputs = (*signatures, *(corpus.planted(k) for k in range(self.steps.shards)))
        settings = {**signed, "plant": c.plant}
        step = Step("dedup", "planting", corpus.folder("dedup"), settings, inputs, (corpus.planting,))
        arguments = (self.out, self.steps.shards, c)
        self.steps.run("planting", [step], lambda step: Task("planting", tasks.measure_planted, arguments), quiet=True)

    def decontaminate(self) -> None:
        corpus, c = self.corpus, self.config.decontaminate
        self.steps.require("decontaminate", [corpus.verdicts("dedup", k) for k in range(self.steps.shards)], "dedup")
        settings = {name: value for name, value in plain(c).items() if name != "paths"}
        finish = self.config.documents
        sets = tuple(Path(p) for p in c.paths)

        def entering(k: int) -> tuple[Path, ...]:
            before = (corpus.verdicts("filter", k), corpus.changes(k), corpus.verdicts("dedup", k))
            return (corpus.table("extract", k), *before)

        self.steps.by_shard(
            "decontaminate",
            {**settings, **plain(finish, "documents.")},
            inputs=lambda k: (*entering(k), *sets),
            outputs=lambda k: (corpus.verdicts("decontaminate", k), corpus.cut(k), corpus.found_ngrams(k)),
            task=lambda k: (tasks.decontaminate, (self.out, k, c, finish)),
            rows=lambda k: rows_of(corpus.signatures(k)),
        )
        found = tuple(corpus.found_ngrams(k) for k in range(self.steps.shards))
        total = Step(
            "decontaminate",
            "contamination",
            corpus.folder("decontaminate"),
            settings,
            (*found, *sets),
            (corpus.contamination,),
        )
        arguments = (self.out, self.steps.shards, c)
        self.steps.run(
            "contamination",
            [total],
            lambda step: Task("contamination", tasks.report_contamination, arguments),
            quiet=True,
        )
        self.steps.by_shard(
            "documents",
            {},
            inputs=lambda k: (*entering(k), corpus.verdicts("decontaminate", k), corpus.cut(k)),
            outputs=lambda k: (corpus.table("documents", k),),
            task=lambda k: (tasks.write_documents, (self.out, k)),
            rows=lambda k: rows_of(corpus.verdicts("decontaminate", k)),
        )

    def tokenize(self) -> None:
        corpus, c = self.corpus, self.config.tokenize
        documents = [corpus.table("documents", k) for k in range(self.steps.shards)]
        self.steps.require("tokenize", documents, "decontaminate")
        vocabulary = tokenizer.load().sha256
        self.steps.by_shard(
            "tokenize",
            {"tokenizer": vocabulary},
            inputs=lambda k: (corpus.table("documents", k),),
            outputs=lambda k: corpus.part(k),
            task=lambda k: (tasks.tokenize_documents, (self.out, k)),
            rows=lambda k: rows_of(corpus.table("documents", k)),
        )
        parts = [corpus.part(k) for k in range(self.steps.shards)]
        settings = {**plain(c), "tokenizer": vocabulary}
        if not any(rows_of(p) for _, p in parts):
            self.nothing_left = "no document is left"  # `close` tells why
            (corpus.folder("tokenize") / "tokens.done.json").unlink(missing_ok=True)
            shutil.rmtree(corpus.tokens, ignore_errors=True)  # of documents that are no more in the corpus
            return
        gone = (corpus.tombstones,) if corpus.tombstones.exists() else ()
        made_of = (*(p for part in parts for p in part), *gone)
        step = Step("tokens", "tokens", corpus.folder("tokenize"), settings, made_of, ())
        why = why_not_done(step, self.steps.hashes)
        if why is None:
            self.steps.reporter.say("tokens: written before, they stand")
            self.steps.on_marked(step, ())
            return
        self.steps.reporter.say(f"tokens: shuffling and packing{f' again: {why}' if why else ''}")
        made_from = {"settings": settings, "documents": [self.steps.hashes.of(p) for p in documents]}
        fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        with self.steps.reporter.stage("tokens", sum(rows_of(p) for _, p in parts)) as counter:
            counts = write_token_shards(parts, corpus.tokens, c, fingerprint, counter.advance, corpus.tombstones)
        if counts["files_unchanged"]:
            rewritten, stand = counts["files"] - counts["files_unchanged"], counts["files_unchanged"]
            self.steps.reporter.say(f"tokens: {rewritten:,} files written, {stand:,} stand as they were")
        del counts["files_unchanged"]  # of this run, not of the result
        self.steps.mark(step, counts, sorted(p for p in corpus.tokens.iterdir() if p.is_file()))

    # ── closing ─────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Ledger, summary, report and dataset card of what is there. The totals must add up."""
        stages = []
        for stage in LEDGER_STAGES[self.config.source]:
            if not all(self.corpus.verdicts(stage, k).exists() for k in range(self.steps.shards)):
                break
            stages.append(stage)
        results: dict[str, Mapping[str, Any]] = {}
        work = [Task(f"ledger {k:05d}", tasks.write_ledger, (self.out, k, stages)) for k in range(self.steps.shards)]
        self.steps.executor.run(work, on_done=lambda task, result: results.__setitem__(task.label, result))
        summary: dict[str, Any] = ledger.funnel([results[task.label] for task in work], stages)
        finished = stages[-1] == "decontaminate" and all(
            self.corpus.table("documents", k).exists() for k in range(self.steps.shards)
        )
        summary |= {
            "recipe": self.config.recipe,
            "source": self.config.source.value,
            "shards": self.steps.shards,
            "versions": {name: version(name) for name in ("gpt2train", "trafilatura", "py3langid", "tiktoken")},
        }
        if finished:
            summary["documents"] = sum(rows_of(self.corpus.table("documents", k)) for k in range(self.steps.shards))
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
            self.steps.reporter.say(line)
        self.steps.reporter.say(f"corpus: {self.out}  report: {self.corpus.report}")
        if self.nothing_left:
            self.nothing_left = ledger.why_nothing_is_left(summary)
