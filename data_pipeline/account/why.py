"""`gpt2train why URL`: what became of a URL, from the ledger, the documents and the token shards."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import UrlListConfig
from data_pipeline.crawl import url_syntax, urls
from data_pipeline.layout import Corpus
from data_pipeline.records import KEPT, ConfigError, InputError
from data_pipeline.storage.place import FOR_WHY, reading
from data_pipeline.store import corruption_errors


@dataclass
class WhyConfig:
    """`gpt2train why URL corpus=corpus/`: what became of a URL."""

    url: str = ""
    """The URL, as it stood in the list or normalized."""
    corpus: str = "corpus"
    """Folder of the corpus, or its address (s3://bucket/corpus)."""


def find(corpus: Corpus, url: str) -> list[dict[str, Any]]:
    """The ledger's rows of `url`, as given, without a password, and as normalized."""
    spellings = {url, url_syntax.without_credentials(url)}
    with contextlib.suppress(urls.InvalidUrl):  # such a URL stands in the ledger as it was given
        spellings.add(urls.normalize(url, UrlListConfig()))
    rows: list[dict[str, Any]] = []
    for file in sorted(corpus.folder("ledger").glob("[0-9]*.parquet")):
        with corruption_errors(file):
            table = pq.read_table(file)
        for spelling in spellings:
            rows += table.filter(pc.equal(table["url"], spelling)).to_pylist()
    return rows


def why(config: WhyConfig) -> int:
    """Print each row of the URL; return 0 when it is known, 1 when it is not. Raises ConfigError for what is no URL."""
    if not config.url:
        raise ConfigError(["url='': must name a URL; give `gpt2train why URL corpus=corpus/`"])
    try:
        config.url.encode()
    except UnicodeEncodeError:  # bytes of the command line come as surrogates
        fault = f"url={config.url!a}: is not UTF-8; give it percent-encoded, as the ledger has it"
        raise ConfigError([fault]) from None
    corpus = Corpus(reading("corpus", config.corpus, FOR_WHY))
    if not corpus.folder("ledger").is_dir():
        raise InputError(f"corpus={config.corpus}: holds no ledger; run `gpt2train corpus` first")
    rows = find(corpus, config.url)
    if not rows:
        print(f"{url_syntax.without_credentials(config.url)}: never seen in {config.corpus}")
        return 1
    for row in rows:
        end = "" if row["state"] == KEPT else f" at {row['stage']}: {row['reason']}"
        detail = f" ({row['detail']})" if row["detail"] else ""
        print(f"{row['url']}\n  {row['state']}{end}{detail}")
        for name, value in json.loads(row["numbers"] or "{}").items():
            print(f"  {name} = {value}")
        if row["state"] == KEPT:
            _print_tokens(corpus, row["index"])
    return 0


def _print_tokens(corpus: Corpus, index: int) -> None:
    path = corpus.tokens / "documents.parquet"
    if not path.exists():
        return
    with corruption_errors(path):
        table = pq.read_table(path, filters=[("index", "=", index)])
    for row in table.to_pylist():
        print(f"  tokens: {row['tokens']:,} from position {row['position']:,} of the {row['split']} split")
