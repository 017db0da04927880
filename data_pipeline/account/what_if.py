"""The numbers that a corpus stores → what other thresholds would change. Nothing is extracted, measured or written.

Flows in: the verdicts of the filter with every number behind them, the signatures of the deduplication, the settings of
the corpus (config.yaml). Flows out: a table of what is kept and dropped, by reason, now and then. Cost: 10,000
documents a second, and the join of their signatures.

What the numbers cannot tell is counted, not guessed: a document that was dropped for its language was never measured
for quality, and one that the filter dropped was never compared with others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline import old_corpus
from data_pipeline.bounds import check
from data_pipeline.clean import dedup, quality
from data_pipeline.config import CorpusConfig, DedupConfig
from data_pipeline.layout import Corpus, read_config
from data_pipeline.records import KEPT, ConfigError, InputError
from data_pipeline.storage.address import is_address
from data_pipeline.storage.copies import Inputs
from data_pipeline.storage.place import work_folder
from data_pipeline.store import Hashes

# Settings whose effect follows from stored numbers; each belongs to one of them by its prefix.
REPLAYED = ("language.", "quality.", "dedup.exact", "dedup.near", "dedup.keep", "dedup.against")
# These make other texts out of the documents, so that all that was measured afterwards would have to be measured again.
NOT_REPLAYED = ("quality.c4_lines", "quality.c4_terminal_punctuation", "quality.blocked_words_file")

NOT_MEASURED, NOT_COMPARED = "passes language, quality not measured", "kept, never compared with others"

Ends = dict[int, tuple[str, str]]
"""index → (stage, reason); the reason of what is kept is KEPT."""


def parse(overrides: Sequence[str], now: CorpusConfig) -> CorpusConfig:
    """`now` with the settings `key=value`. Raises ConfigError with all that cannot be tried."""
    faults, then = [], OmegaConf.structured(now)
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.startswith(REPLAYED) or key in NOT_REPLAYED:
            known = ", ".join(f"{r}*" if r.endswith(".") else r for r in REPLAYED)
            faults.append(
                f"what_if={text}: must be key=value of {known}, but not {', '.join(NOT_REPLAYED)}; "
                f"run the corpus command with it in a copy of the folder"
            )
            continue
        try:
            then = OmegaConf.merge(then, OmegaConf.from_dotlist([text]))
        except OmegaConfBaseException as e:
            group, _, name = key.partition(".")
            known_names = list(OmegaConf.structured(now)[group]) if name else []
            near = get_close_matches(name, known_names, n=1)
            meant = f"did you mean {group}.{near[0]}?" if near else "see --help"
            faults.append(f"what_if={text}: {str(e).splitlines()[0]}; {meant}")
    config = cast(CorpusConfig, OmegaConf.to_object(then))
    if not faults:
        config.what_if = list(overrides)
        faults = [f"what_if: {fault}" for fault in check(config)]
    if faults:
        raise ConfigError(faults)
    return config


def stored_ends(corpus: Corpus) -> Ends:
    """Where each row that was extracted ended, by filter and dedup."""
    ends: Ends = {index: ("extract", "language") for index, _ in _left_out(corpus)}
    for stage in ("filter", "dedup"):
        for path in sorted(corpus.folder(stage).glob("[0-9]*.verdicts.parquet")):
            table = pq.read_table(path, columns=["index", "reason"])
            for index, reason in zip(table["index"].to_pylist(), table["reason"].to_pylist(), strict=True):
                ends[index] = (stage, reason or KEPT)
    return ends


def replay(corpus: Corpus, config: CorpusConfig) -> Ends:
    """Where each row that was extracted ends under `config`, by its stored numbers.

    Raises ConfigError when a rule that is on looks at a number that was not measured.
    """
    ends: Ends = {
        index: ("filter", NOT_MEASURED) if _fits_language(numbers, config) else ("extract", "language")
        for index, numbers in _left_out(corpus)
    }
    signatures = []
    for verdicts in sorted(corpus.folder("filter").glob("[0-9]*.verdicts.parquet")):
        table = pq.read_table(verdicts, columns=["index", "numbers"])
        for index, text in zip(table["index"].to_pylist(), table["numbers"].to_pylist(), strict=True):
            ends[index] = _filter_end(json.loads(text), config)
        path = corpus.signatures(int(verdicts.name.split(".")[0]))
        if path.exists():
            signatures.append(path)
    signed = read_config(corpus).dedup
    survivors = pa.array([index for index, (_, reason) in ends.items() if reason == KEPT], pa.int64())
    # Bands are joined as they were signed: keep, against and the two switches alone can differ.
    rows = dedup.read_signatures(signatures, signed)
    rows = rows.filter(pc.is_in(rows["index"], value_set=survivors))
    compared = set(rows["index"].to_pylist())
    with old_corpus.held(config.dedup.against, Hashes()):
        old = [old_corpus.signatures(Path(folder), signed) for folder in config.dedup.against]
    going = dedup.find_duplicates(rows, config.dedup, pa.concat_tables(old) if old else None)
    for index, kind in zip(going["index"].to_pylist(), going["kind"].to_pylist(), strict=True):
        ends[index] = ("dedup", f"{kind}_duplicate")
    for index in survivors.to_pylist():
        if index not in compared:
            ends[index] = ("dedup", NOT_COMPARED)
    return ends


def _left_out(corpus: Corpus) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, numbers) of rows that were surely in another language, so that they were never extracted."""
    for verdicts in sorted(corpus.folder("extract").glob("[0-9]*.verdicts.parquet")):
        table = pq.read_table(verdicts, columns=["index", "reason", "numbers"])
        for row in table.filter(pc.equal(table["reason"], "language")).to_pylist():
            yield row["index"], json.loads(row["numbers"])


def _fits_language(numbers: dict[str, Any], config: CorpusConfig) -> bool:
    keep, least = config.language.keep, config.language.min_score
    return not keep or (numbers["language"] in keep and float(numbers["language_score"]) >= least)


def _filter_end(numbers: dict[str, Any], config: CorpusConfig) -> tuple[str, str]:
    if not _fits_language(numbers, config):
        return "filter", "language"
    if "characters" not in numbers:
        return "filter", NOT_MEASURED
    try:
        return "filter", quality.judge(numbers, config.quality) or KEPT
    except KeyError as e:
        raise ConfigError(
            [f"what_if={config.what_if}: needs {e.args[0]}, which this corpus did not measure; run the command with it"]
        ) from None


def what_if(config: CorpusConfig) -> int:
    """Print the table; return 0. Raises InputError where there is nothing to replay."""
    corpus = Corpus(Path(config.out))
    if not any(corpus.folder("filter").glob("[0-9]*.verdicts.parquet")):
        raise InputError(f"out={config.out}: no stage `filter` was run there; give the folder of a finished corpus")
    now = read_config(corpus)
    if not is_address(now.out):
        now.out = config.out  # as it may have been moved
    then = parse(config.what_if, now)
    if then.dedup.near and not now.dedup.near:
        raise ConfigError(
            ["what_if=dedup.near=true: this corpus was signed without bands; run the command with dedup.near=true"]
        )
    then.dedup.against = _local_against(then.dedup.against, config)
    print_table(stored_ends(corpus), replay(corpus, then), ", ".join(config.what_if))
    return 0


def _local_against(against: list[str], config: CorpusConfig) -> list[str]:
    """The folders of `dedup.against`, those in a bucket as local copies. Raises InputError where one is not there."""
    inputs = Inputs(
        CorpusConfig(work=config.work, storage=config.storage, dedup=DedupConfig(against=against)),
        work_folder(config.work),
    )
    if inputs.faults:
        raise InputError("\n".join(inputs.faults))
    return inputs.config.dedup.against


def print_table(before: Ends, after: Ends, title: str) -> None:
    """Reasons and their counts on standard output, and how many rows come and go."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("stage", "reason", "now", "then", "change"):
        table.add_column(name, justify="left" if name in ("stage", "reason") else "right", no_wrap=True)
    # What is kept was kept by all stages, whichever spoke last.
    before, after = ({i: ("", KEPT) if end[1] == KEPT else end for i, end in ends.items()} for ends in (before, after))
    counts = Counter(before.values()), Counter(after.values())
    rows = sorted({*counts[0], *counts[1]}, key=lambda end: (end[1] == KEPT, end[0] != "filter", -counts[0][end], end))
    for end in rows:
        old, new = counts[0][end], counts[1][end]
        table.add_row(end[0], end[1], f"{old:,}", f"{new:,}", f"{new - old:+,}" if new != old else "")
    kept = [
        {index for index, (_, reason) in ends.items() if reason in (KEPT, NOT_COMPARED)} for ends in (before, after)
    ]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"what if {title}", markup=False)
    console.print(table)
    console.print(
        f"kept by filter and dedup: {len(kept[0]):,} now, {len(kept[1]):,} then; "
        f"{len(kept[0] - kept[1]):,} would go, {len(kept[1] - kept[0]):,} would come"
    )
    if len({index for index, (_, reason) in after.items() if reason in (NOT_MEASURED, NOT_COMPARED)}):
        console.print("rows that were not measured or not compared may still be dropped; only a run can tell")
