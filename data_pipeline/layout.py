"""Where each file of a corpus folder lies. Shards have the same number in every stage."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from data_pipeline.config import STAGES, CorpusConfig

ADDRESSES = ".addresses.json"
"""Address → local copy, of the inputs in a bucket that the run under way has."""


@dataclass(frozen=True)
class Corpus:
    """Paths below `out`; `k` is a shard's number."""

    out: Path

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def table(self, stage: str, k: int) -> Path:
        """What a stage hands on: urls (URL_SCHEMA), fetch (PAGE_SCHEMA), extract and documents (DOCUMENT_SCHEMA)."""
        return self.out / stage / f"{k:05d}.parquet"

    def archive(self, warc_file: str) -> Path:
        """The WARC file that a page names: relative to `out`, absolute, or the address that it is a copy of."""
        if "://" not in warc_file:
            return self.out / warc_file  # joined to an absolute path, `out` vanishes
        for address, copy in json.loads((self.out / ADDRESSES).read_text(encoding="utf-8")).items():
            if warc_file == address or warc_file.startswith(f"{address}/"):
                return Path(copy + warc_file.removeprefix(address))
        raise FileNotFoundError(warc_file)

    def verdicts(self, stage: str, k: int) -> Path:
        """VERDICT_SCHEMA: one row for each row that entered the stage."""
        return self.out / stage / f"{k:05d}.verdicts.parquet"

    def changes(self, k: int) -> Path:
        """What the filter found of its documents: index, language, and the text where a rule changed it."""
        return self.out / "filter" / f"{k:05d}.changes.parquet"

    def signatures(self, k: int) -> Path:
        return self.out / "dedup" / f"{k:05d}.signatures.parquet"

    def links(self, part: int) -> Path:
        """What one part of the join found: pairs of documents."""
        return self.out / "dedup" / f"links_{part:03d}.parquet" if part >= 0 else self.out / "dedup/links_exact.parquet"

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


OWN_NAMES = frozenset(
    {*STAGES, "warc", "rescue", "documents", "ledger", "tokens", "README.md"}
    | {"config.yaml", "shards.json", "summary.json", "report.html"}
)
"""What a corpus has in its folder and writes over."""


def others_names(out: Path) -> list[str]:
    """Names of OWN_NAMES that something else has in the folder `out`, sorted; none where a corpus was begun, or where
    there is no folder."""
    if not out.is_dir():
        return []
    names = sorted(OWN_NAMES & {path.name for path in out.iterdir()})
    return [] if not names or _was_begun(Corpus(out)) else names


def _was_begun(corpus: Corpus) -> bool:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if corpus.forget_list.exists():  # carried to a corpus that is built anew, with its tombstones
        return True
    if any(any(corpus.folder(stage).glob("*.done.json")) for stage in (*STAGES, "documents")):
        return True
    with contextlib.suppress(OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {"source", "stages", "recipe"} <= set(OmegaConf.load(corpus.config))
    return any(corpus.folder("warc").glob("[0-9][0-9][0-9][0-9][0-9]*-[0-9][0-9][0-9].warc.gz"))


def config_text(config: CorpusConfig) -> str:
    """The settings as YAML that `read_config` reads back letter by letter."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(value: Any) -> Any:
    """`${` as OmegaConf writes the characters themselves: read back plainly, it would be looked up (even in the
    environment), and a path that holds it would be another path."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: str(m[1]) * 2 + "\\${", value)
    if isinstance(value, list):
        return [_escaped(v) for v in value]
    return {k: _escaped(v) for k, v in value.items()} if isinstance(value, dict) else value


def read_config(corpus: Corpus) -> CorpusConfig:
    """The settings that a corpus was last run with. Raises InputError where there are none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
