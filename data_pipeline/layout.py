"""Where each file of a corpus folder lies. Shards have the same number in every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from data_pipeline.config import CorpusConfig


@dataclass(frozen=True)
class Corpus:
    """Paths below `out`; `k` is a shard's number."""

    out: Path

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def table(self, stage: str, k: int) -> Path:
        """What a stage hands on: urls (URL_SCHEMA), fetch (PAGE_SCHEMA), extract and documents (DOCUMENT_SCHEMA)."""
        return self.out / stage / f"{k:05d}.parquet"

    def verdicts(self, stage: str, k: int) -> Path:
        """VERDICT_SCHEMA: one row for each row that entered the stage."""
        return self.out / stage / f"{k:05d}.verdicts.parquet"

    def changes(self, k: int) -> Path:
        """What the filter found of its documents: index, language, and the text where a rule changed it."""
        return self.out / "filter" / f"{k:05d}.changes.parquet"

    def signatures(self, k: int) -> Path:
        return self.out / "dedup" / f"{k:05d}.signatures.parquet"

    @property
    def duplicates(self) -> Path:
        return self.out / "dedup" / "duplicates.parquet"

    def planted(self, k: int) -> Path:
        """Signatures of known near-duplicates, for measuring alone."""
        return self.out / "dedup" / f"{k:05d}.planted.parquet"

    @property
    def planting(self) -> Path:
        """Recall and precision by the planted ones."""
        return self.out / "dedup" / "planting.json"

    def cut(self, k: int) -> Path:
        """What decontamination and masking made of texts: index, and the text where it changed."""
        return self.out / "decontaminate" / f"{k:05d}.changes.parquet"

    @property
    def forget_list(self) -> Path:
        """Domains and URLs that were taken down; see forget.py."""
        return self.out / "forget.json"

    @property
    def tombstones(self) -> Path:
        """Places that forgotten documents had among the token shards."""
        return self.out / "tokenize" / "forgotten.parquet"

    def found_ngrams(self, k: int) -> Path:
        return self.out / "decontaminate" / f"{k:05d}.found.parquet"

    @property
    def contamination(self) -> Path:
        return self.out / "decontaminate" / "contamination.json"

    def part(self, k: int) -> tuple[Path, Path]:
        """Tokens of one shard's documents before the shuffle: raw uint16, and the documents' lengths."""
        return self.out / "tokenize" / f"{k:05d}.tokens", self.out / "tokenize" / f"{k:05d}.documents.parquet"

    @property
    def tokens(self) -> Path:
        return self.out / "tokens"

    def ledger(self, k: int) -> Path:
        return self.out / "ledger" / f"{k:05d}.parquet"

    @property
    def summary(self) -> Path:
        return self.out / "summary.json"

    @property
    def config(self) -> Path:
        return self.out / "config.yaml"

    @property
    def report(self) -> Path:
        return self.out / "report.html"


def read_config(corpus: Corpus) -> CorpusConfig:
    """The settings that a corpus was last run with. Raises InputError where there are none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from data_pipeline.config import CorpusConfig
    from data_pipeline.records import InputError

    try:
        stored = OmegaConf.merge(OmegaConf.structured(CorpusConfig), OmegaConf.load(corpus.config))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{corpus.out}: is no corpus folder (no config.yaml); run `gpt2train corpus` first") from None
    except OmegaConfBaseException as e:
        raise InputError(
            f"{corpus.config}: of another version ({str(e).splitlines()[0]}); run `gpt2train corpus` there again first"
        ) from None
    return cast(CorpusConfig, OmegaConf.to_object(stored))
