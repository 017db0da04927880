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
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline import executors, forget, tasks
from data_pipeline.account import card, ledger, report, what_if
from data_pipeline.bounds import check
from data_pipeline.config import STAGES, CorpusConfig, Executor, Source
from data_pipeline.entrances import Entrance, check_inputs
from data_pipeline.executors import Task
from data_pipeline.layout import Corpus, config_text, others_names, read_config
from data_pipeline.lists import read_list
from data_pipeline.progress import Reporter
from data_pipeline.records import ConfigError, CorruptionError, InputError
from data_pipeline.stages import Stages
from data_pipeline.steps import Steps, rows_of
from data_pipeline.storage.place import Place
from data_pipeline.store import lock, remove_temporaries, storage_errors, write_atomic, write_json

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
    if not place.remote and (others := others_names(out)):
        raise InputError(
            f"out={out}: holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''}, which a corpus would write "
            f"over, and no corpus; give a new folder"
        )
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
        check_inputs(settings, forget.stages_made(corpus), (*place.faults, *faults))
        entries = read_list(config.forget, "forget")
        forget.parse_entries(entries)  # all faults of the list, before any work
        if not place.remote:
            owned.enter_context(_owned(place))
        # What the last run was asked for says nothing of what lies there; and nothing is fetched.
        settings.stages = forget.stages_made(corpus)
        with _executor(settings, corpus.out) as executor:
            run = Run(settings, executor, place)
            forget.check_memory(corpus)
            takedown = forget.plan(corpus, entries, settings)
            if on_take_down is not None:
                on_take_down(takedown)
            forget.remember(corpus, takedown)
            texts_gone, copies = takedown.documents.num_rows, takedown.copies
            run.steps.reporter.say(
                f"forget: {texts_gone:,} texts go, and {copies:,} copies of them that would come instead"
            )
            if takedown.unmatched:
                names = ", ".join(takedown.unmatched)
                run.steps.reporter.say(f"forget: no row of this corpus has to do with {names}; check the spelling")
            run.run()
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
        self.stages = Stages(config, self.steps)
        self.nothing_left = ""
        """Why there is no document to make token shards of, and what to do; empty where there is one."""

    def run(self) -> None:
        """Run the stages that the settings name; all where they name none."""
        stages = [s for s in STAGES if not self.config.stages or s in self.config.stages]
        forget.check_memory(self.corpus)
        self.entrance.enter("urls" in stages, "fetch" in stages)
        later: list[tuple[str, Callable[[], None]]] = [
            ("extract", self.stages.extract),
            ("filter", self.stages.filter),
            ("dedup", self.stages.dedup),
            ("decontaminate", self.stages.decontaminate),
            ("tokenize", self.stages.tokenize),
        ]
        for name, stage in later:
            if name in stages:
                stage()
        self.close()

    def close(self) -> None:
        """Ledger, summary, report and dataset card of what is there and stands. The totals must add up."""
        stages, documents_stand, tokens_stand = self._standing()
        results: dict[str, Mapping[str, Any]] = {}
        work = [Task(f"ledger {k:05d}", tasks.write_ledger, (self.out, k, stages)) for k in range(self.steps.shards)]
        self.steps.executor.run(work, on_done=lambda task, result: results.__setitem__(task.label, result))
        summary: dict[str, Any] = ledger.funnel([results[task.label] for task in work], stages)
        finished = stages[-1] == "decontaminate" and documents_stand
        summary |= {
            "recipe": self.config.recipe,
            "source": self.config.source.value,
            "shards": self.steps.shards,
            "versions": {name: version(name) for name in ("gpt2train", "trafilatura", "py3langid", "tiktoken")},
        }
        if finished:
            summary["documents"] = sum(rows_of(self.corpus.table("documents", k)) for k in range(self.steps.shards))
        if self.config.dedup.plant and "dedup" in stages and self.corpus.planting.exists():
            summary["planted"] = json.loads(self.corpus.planting.read_text(encoding="utf-8"))
        if finished and self.config.report.domains:
            summary["domains_beside"] = report.compare_domains(self.corpus, self.config.report.domains)
        if "decontaminate" in stages and self.corpus.contamination.exists():
            summary["contamination"] = json.loads(self.corpus.contamination.read_text(encoding="utf-8"))
        manifest = self.corpus.tokens / "manifest.json"
        if tokens_stand and manifest.exists():
            summary["tokens"] = json.loads(manifest.read_text(encoding="utf-8"))
        write_json(summary, self.corpus.summary)
        report.write_corpus_report(self.corpus)
        if finished:
            card.write_dataset_card(self.corpus, summary)
        for line in (*report.funnel_lines(summary), *report.measure_lines(summary)):
            self.steps.reporter.say(line)
        self.steps.reporter.say(f"corpus: {self.out}  report: {self.corpus.report}")
        if self.stages.empty:
            self.nothing_left = ledger.why_nothing_is_left(summary)

    def _standing(self) -> tuple[list[str], bool, bool]:
        """The stages that the ledger can tell of, whether the documents are those of them, and so the token shards.

        A run of some stages may leave later ones that were made of what is no more: these are named and left out.
        """
        corpus, numbers = self.corpus, range(self.steps.shards)
        verdicts = {s: [corpus.verdicts(s, k) for k in numbers] for s in LEDGER_STAGES[self.config.source]}
        documents = [corpus.table("documents", k) for k in numbers]
        manifest = corpus.tokens / "manifest.json"
        standing = None if not self.config.stages else self.steps.standing_outputs()  # after all of them, all stand

        def stand(files: Sequence[Path]) -> bool:
            return standing is None or all(p.relative_to(self.out).as_posix() in standing for p in files)

        there = list(itertools.takewhile(lambda s: all(p.exists() for p in verdicts[s]), verdicts))
        stages = there[:1] + list(itertools.takewhile(lambda s: stand(verdicts[s]), there[1:]))
        stale = there[len(stages) :]
        documents_stand = all(p.exists() for p in documents) and stand(documents) and not stale
        tokens_stand = manifest.exists() and stand([manifest]) and not stale
        stale += ["tokenize"] if manifest.exists() and not tokens_stand else []
        if stale:
            self.steps.reporter.say(
                f"{', '.join(stale)}: made of what has changed since, and left out of the ledger; run without stages= "
                f"to make {'them' if len(stale) > 1 else 'it'} anew"
            )
        return stages, documents_stand, tokens_stand
