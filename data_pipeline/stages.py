"""Pages or texts → documents → token shards: each stage behind the entrance, as the steps that it is made of.

A method does what is due of its stage: it names the steps (`store.Step`, mostly one a shard) by their settings, inputs
and outputs, and the task that makes them; `steps.Steps` runs those that do not stand. In what order the stages come
stands in pipeline.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline import forget, old_corpus, tasks, tokenizer
from data_pipeline.clean import bands
from data_pipeline.config import CorpusConfig, Source
from data_pipeline.entrances import LEAST_SHARDS, ROWS_PER_SHARD
from data_pipeline.executors import Task
from data_pipeline.layout import Corpus
from data_pipeline.pack import remove_token_shards, write_token_shards
from data_pipeline.records import CorruptionError
from data_pipeline.steps import Steps, plain, rows_of
from data_pipeline.store import (
    Step,
    corruption_errors,
    look_at_archive,
    read_json,
    read_marker,
    stands_but_for,
    why_not_done,
    would_be_the_same,
)
from data_pipeline.token_shards import fingerprint

FEW_DOCUMENTS = 30
"""Of so few documents a mean tells little."""

LEAST_PART_ROWS = 64
"""Pages that are worth a task of their own, with its files and its marker."""

JOIN_IN_PARTS_ROWS = 500_000
"""From so many documents on near-duplicates are joined in a task a band; below, one task needs less than starting them
costs, and 100 MB."""


class Stages:
    """The stages of one run over one corpus folder; `steps.shards` is known by the time that one is called."""

    def __init__(self, config: CorpusConfig, steps: Steps) -> None:
        self.config = config
        self.out = Path(config.out)
        self.corpus = Corpus(self.out)
        self.steps = steps
        self.empty = False
        """`tokenize` found no document to make token shards of."""

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
        self._try_damaged_pages_again(steps)
        lighter = {k for k in forgotten if stands_but_for(steps[k], "forgotten", self.steps.hashes)}
        parts, damaged = self._extract_parts([step for k, step in enumerate(steps) if k not in lighter])

        def task(k: int) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
            if k in lighter:
                return tasks.forget_pages, (self.out, k, _archives(steps[k]))
            if k in parts:
                return tasks.join_extracted, (self.out, k, parts[k], damaged[k])
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

    def _try_damaged_pages_again(self, steps: Sequence[Step]) -> None:
        """Once, for markers of the version before, which did not remember the files that pages could not be read of."""
        again = 0
        for k, step in enumerate(steps):
            marker, verdicts = read_marker(step), self.corpus.verdicts("extract", k)
            if marker is None or "archives" in marker or not marker["counts"].get("failed") or not verdicts.exists():
                continue
            with corruption_errors(verdicts):
                names = tasks.damaged_archives(self.corpus.table("fetch", k), verdicts)
            if names and all(look_at_archive(step, name)[1] for name in names):
                step.marker.unlink()
                again += 1
        if again:
            self.steps.reporter.say(
                f"extract: {again} of {len(steps)} shards again, once: they have pages of damaged WARC files"
            )

    def _languages(self) -> list[str]:
        """The languages that extraction looks for; empty: it takes all."""
        return sorted(self.config.language.keep) if self.config.extract.skip_other_languages else []

    def _extract_parts(
        self, steps: Sequence[Step]
    ) -> tuple[dict[int, list[tuple[Path, Path]]], dict[int, dict[str, Any]]]:
        """Extract shards that are much larger than the others in parts, so that all workers share a large domain.

        Returns for each such shard its parts' files, which stand until the shard is joined, and what their markers say
        of damaged archives.
        """
        folder = self.corpus.folder("extract_parts")
        rows = [rows_of(self.corpus.table("fetch", k)) for k in range(self.steps.shards)]
        most = min(max(sum(rows) // LEAST_SHARDS, LEAST_PART_ROWS), ROWS_PER_SHARD)
        parts: dict[int, list[tuple[Path, Path]]] = {}
        work: list[Step] = []
        place: dict[str, tuple[int, int, int]] = {}  # part's name → shard, first row, rows
        for step in steps:
            k = int(step.name)
            pieces = round(rows[k] / most)
            if pieces < 2 or why_not_done(step, self.steps.hashes) is None:
                continue
            parts[k] = []
            each = -(-rows[k] // pieces)
            for start in range(0, rows[k], each):
                name = f"{k:05d}_{start:09d}"
                files = (folder / f"{name}.parquet", folder / f"{name}.verdicts.parquet")
                place[name] = (k, start, min(each, rows[k] - start))
                settings = {**step.settings, "start": start, "rows": place[name][2]}
                work.append(Step("extract_parts", name, folder, settings, step.inputs, files))
                parts[k].append(files)

        def make(step: Step) -> Task:
            k, start, count = place[step.name]
            arguments = (self.out, k, self.config.extract, self._languages(), start, count, step.outputs)
            return Task(f"extract {step.name}", tasks.extract_rows, arguments)

        if work:
            self.steps.run("extract", work, make, rows=lambda step: place[step.name][2])
        damaged: dict[int, dict[str, Any]] = {k: {} for k in parts}
        for step in work:
            damaged[place[step.name][0]] |= _archives(step)
        return parts, damaged

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
        with old_corpus.held(c.against, self.steps.hashes):
            self._join(signed, signatures)
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

    def _join(self, signed: Mapping[str, Any], signatures: tuple[Path, ...]) -> None:
        """All shards' signatures, and those of the corpora in `dedup.against`, which are held → the duplicates."""
        corpus, c = self.corpus, self.config.dedup
        old = tuple(p for folder in c.against for pair in old_corpus.index(Path(folder)) for p in pair)
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
        else:  # what an earlier run measured
            for path in [*corpus.folder("dedup").glob("[0-9]*.planted.*"), *corpus.folder("dedup").glob("planting.*")]:
                path.unlink()

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
            self.empty = True
            (corpus.folder("tokenize") / "tokens.done.json").unlink(missing_ok=True)
            remove_token_shards(corpus.tokens)  # of documents that are no more in the corpus
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
        before = self.steps.look(step)
        made_from = self._made_from(step, parts)
        with self.steps.reporter.stage("tokens", sum(rows_of(p) for _, p in parts)) as counter:
            counts = write_token_shards(parts, corpus.tokens, c, made_from, counter.advance, corpus.tombstones)
        if counts["files_unchanged"]:
            rewritten, stand = counts["files"] - counts["files_unchanged"], counts["files_unchanged"]
            self.steps.reporter.say(f"tokens: {rewritten:,} files written, {stand:,} stand as they were")
        del counts["files_unchanged"]  # of this run, not of the result
        if 0 < counts["validation_documents"] < FEW_DOCUMENTS <= counts["documents"]:
            self.steps.reporter.say(
                f"tokens: the validation split has {counts['validation_documents']} of {counts['documents']:,} "
                f"documents ({counts['validation_tokens']:,} tokens): a loss on so few says little; a larger "
                f"tokenize.validation_fraction than {c.validation_fraction:g} gives it more"
            )
        self.steps.mark(step, counts, sorted(p for p in corpus.tokens.iterdir() if p.is_file()), before=before)

    def _made_from(self, step: Step, parts: Sequence[tuple[Path, Path]]) -> str:
        """sha256 hex of what the token shards are made of: settings, tokens, URLs and digests, and nothing else of the
        documents, whose numbers may change while all of these stay.

        Where the same was packed before, what its manifest says stays: the version before took the documents' files
        for it, and runs that trained on the shards know them by their fingerprint.
        """
        if would_be_the_same(step, self.steps.hashes):
            with contextlib.suppress(FileNotFoundError, CorruptionError, KeyError):
                manifest = read_json(self.corpus.tokens / "manifest.json", "")
                if manifest["fingerprint"] == fingerprint(manifest):
                    return str(manifest["made_from"])
        parted = [[self.steps.hashes.of(path) for path in part] for part in parts]
        identity = {"settings": dict(step.settings), "parts": parted}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _archives(step: Step) -> dict[str, Any]:
    """The archives that the step's marker remembers."""
    return dict((read_marker(step) or {}).get("archives", {}))
