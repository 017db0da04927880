"""The dataset card: README.md of a corpus folder, with the front matter that `datasets` and the Hub read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.layout import Corpus
from data_pipeline.store import write_atomic


def write_dataset_card(corpus: Corpus, summary: Mapping[str, Any]) -> None:
    """Write out/README.md, so that `datasets.load_dataset(out)` finds the documents."""
    u = summary["urls"]
    reasons = "\n".join(
        f"| {row['stage']} | {reason} | {n:,} |" for row in summary["stages"] for reason, n in row["reasons"].items()
    )
    funnel = "\n".join(
        f"| {row['stage']} | {row['in']:,} | {row['kept']:,} | {row['dropped']:,} | {row['failed']:,} |"
        for row in summary["stages"]
    )
    tokens = ""
    if "tokens" in summary:
        tokens = "\n".join(
            f"- {name}: {split['tokens']:,} GPT-2 tokens in {split['documents']:,} documents"
            for name, split in summary["tokens"]["splits"].items()
        )
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: documents/*.parquet
task_categories:
- text-generation
size_categories:
- {_size_category(summary["documents"])}
---

# A text corpus in the manner of WebText

Made by gpt2train {summary["versions"]["gpt2train"]} with the recipe `{summary["recipe"] or "none"}` from
source `{summary["source"]}`. Of {u["in"]:,} rows that went in, {u["kept"]:,} were kept, {u["dropped"]:,} dropped and
{u["failed"]:,} failed; `ledger/` says of each which, at which stage and why.

{tokens}

## From stage to stage

| stage | in | kept | dropped | failed |
|---|---:|---:|---:|---:|
{funnel}

## What was left out

| stage | state and reason | rows |
|---|---|---:|
{reasons}

## Fields

`url`, `text`, `title`, `author`, `date`, `language`, `domain`, `fetched_at`, `warc_file` and `warc_offset` (where
the response lies that the text was taken from), `digest` (SHA-256 of the text), `numbers` (JSON: what the filters
measured).

## Before you use or publish it

The texts belong to those who wrote them, and may hold errors, prejudice and personal data. The filters remove what
their rules name, no more. Robots.txt and robots metadata were obeyed unless `config.yaml` beside this file says
otherwise.
"""
    with write_atomic(corpus.out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _size_category(documents: int) -> str:
    """The Hub's names of orders of magnitude."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    bounds += [(10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M")]
    return next((name for bound, name in bounds if documents < bound), "100M<n<1B")
