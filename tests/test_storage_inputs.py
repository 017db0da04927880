"""Addresses in settings, inputs that lie in buckets, and corpora and token shards that are read from there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from buckets import PROSE, QUICK, config_fixture, memory_fixture  # noqa: F401 (fixtures)
from corpora import files_of
from inline import inline  # noqa: F401 (a fixture)
from s3 import SECRET

from data_pipeline.account.why import WhyConfig, why
from data_pipeline.bounds import check
from data_pipeline.config import CorpusConfig, Executor, StorageConfig
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import InputError
from data_pipeline.storage.bucket import Bucket
from data_pipeline.token_shards import CorruptTokenShardsError, NotTokenShardsError, TokenShards, fetch_token_shards

# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("out", "bound"),
    [
        (f"s3://me:{SECRET}@bucket/corpus", "holds credentials"),
        (f"s3://bucket/corpus?X-Amz-Signature={SECRET}", "holds a query"),
        ("s3://bucket", "must name a bucket and a place in it"),
        ("https://example.org/corpus", "must be a local path or begin with s3://"),
        ("file://corpus", "absolute path"),
    ],
)
def test_addresses_that_cannot_be_are_refused_without_their_secrets(out: str, bound: str) -> None:
    for faults in (check(CorpusConfig(urls="x", out=out)), check(CorpusConfig(urls=out))):
        assert len(faults) == 1
        assert bound in faults[0]
        assert SECRET not in faults[0]


def test_settings_out_of_bounds_are_named() -> None:
    def faults(**changes: Any) -> list[str]:
        return [f.split("=")[0] for f in check(CorpusConfig(urls="x", **changes))]

    assert faults(out="s3://bucket/corpus") == []
    for name in ("transfers", "sync_every_s", "lease_s", "retry_s"):
        assert faults(storage=StorageConfig(**{name: 0})) == [f"storage.{name}"]
    assert faults(work="s3://bucket/work") == ["work"]
    assert faults(out="s3://bucket/corpus", executor=Executor.ray) == ["work"]


@pytest.mark.usefixtures("inline")
def test_file_addresses_are_local_folders(config: CorpusConfig, tmp_path: Path) -> None:
    build_corpus(replace(config, out=f"file://{tmp_path}/by_address", path=f"file://{config.path}"))
    assert (tmp_path / "by_address" / "tokens" / "manifest.json").exists()


# ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("inline")
def test_inputs_come_from_buckets_and_are_named_by_their_addresses(
    config: CorpusConfig, memory: str, tmp_path: Path
) -> None:
    place = Bucket(f"{memory}/in", retry_s=QUICK.retry_s)
    place.put("texts/a.jsonl", Path(config.path).read_bytes())
    place.put("test.txt", PROSE[3].encode())
    remote = replace(config, path=f"{memory}/in/texts", work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    remote.decontaminate.paths = [f"{memory}/in/test.txt"]
    build_corpus(remote)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["documents"] == len(PROSE)
    assert summary["contamination"][0]["name"] == "test"
    assert summary["contamination"][0]["share"] == 1.0
    marker = json.loads((tmp_path / "out" / "extract" / "all.done.json").read_text())
    assert marker["settings"]["path"] == f"{memory}/in/texts"
    copies = {p: p.stat().st_mtime_ns for p in (tmp_path / "work" / "inputs").rglob("*.jsonl")}
    assert len(copies) == 1
    build_corpus(remote)
    assert {p: p.stat().st_mtime_ns for p in copies} == copies  # compared, not brought again
    place.put("texts/b.txt", b"Another text of some words, which was not there before. " * 20)
    build_corpus(remote)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["documents"] == len(PROSE) + 1
    with pytest.raises(InputError) as error:
        build_corpus(replace(remote, path=f"{memory}/in/none", report=replace(remote.report, domains="/none")))
    assert [line.split("=")[0] for line in str(error.value).split("\n")] == ["path", "report.domains"]


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("inline")
def test_token_shards_are_brought_and_checked(config: CorpusConfig, memory: str, tmp_path: Path) -> None:
    build_corpus(config)
    local = Path(config.out) / "tokens"
    place = Bucket(f"{memory}/tokens", retry_s=QUICK.retry_s)
    for name, content in files_of(local).items():
        place.put(name, content)
    folder = fetch_token_shards(place.address, tmp_path / "cache")
    assert files_of(folder) == files_of(local)
    assert TokenShards.open(folder).fingerprint == TokenShards.open(local).fingerprint
    assert fetch_token_shards(str(local), tmp_path / "cache") == local
    # Damage here is mended from there, and nothing else is brought.
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "train_00000.bin").write_bytes(b"\0" * (folder / "train_00000.bin").stat().st_size)
    assert fetch_token_shards(place.address, tmp_path / "cache") == folder
    assert files_of(folder) == files_of(local)
    assert {n for n, t in times.items() if (folder / n).stat().st_mtime_ns != t} == {"train_00000.bin"}
    # Damage there is named.
    place.put("train_00000.bin", b"\0" * (local / "train_00000.bin").stat().st_size)
    place.remove(["documents.parquet"])
    with pytest.raises(CorruptTokenShardsError) as error:
        fetch_token_shards(place.address, tmp_path / "other")
    assert [d.split(":")[0] for d in error.value.defects] == ["train_00000.bin", "documents.parquet"]
    place.remove(["manifest.json"])
    with pytest.raises(NotTokenShardsError, match=r"holds no manifest\.json"):
        fetch_token_shards(place.address, tmp_path / "other")
    with pytest.raises(NotTokenShardsError, match="holds credentials") as refused:
        fetch_token_shards(f"s3://me:{SECRET}@bucket/tokens", tmp_path / "other")
    assert SECRET not in str(refused.value)


@pytest.mark.usefixtures("inline")
def test_a_corpus_in_a_bucket_is_looked_at(
    config: CorpusConfig,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gpt2train.commands.joined import write_report

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = replace(config, out=f"{memory}/corpus")  # and no `work`: it is below the user's cache
    build_corpus(remote)
    assert (tmp_path / "cache" / "gpt2train" / "corpora").is_dir()
    capsys.readouterr()
    assert why(WhyConfig("https://site3.test/3", remote.out)) == 0
    said = capsys.readouterr().out
    assert "kept" in said
    assert "tokens: " in said
    assert write_report([f"path={remote.out}"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.read_text().startswith("<!doctype html>")
    brought = {p.parent.name for p in page.parent.rglob("*.parquet")}
    assert {"ledger", "documents"} <= brought
    assert not list(page.parent.rglob("*.bin"))  # tokens are not needed, and not brought
    assert build_corpus(replace(remote, what_if=["dedup.near=false"])) == 0
    Bucket(f"{memory}/lists", retry_s=QUICK.retry_s).put("gone.txt", b"site3.test\n")
    build_corpus(replace(remote, forget=f"{memory}/lists/gone.txt"))
    assert why(WhyConfig("https://site3.test/3", remote.out)) == 0
    assert "dropped at extract: forgotten" in capsys.readouterr().out
    for place, bound in ((f"{memory}/nothing", "holds no corpus"), (f"s3://me:{SECRET}@b/c", "holds credentials")):
        with pytest.raises(InputError, match=bound) as error:
            why(WhyConfig("https://site3.test/3", place))
        assert SECRET not in str(error.value)
