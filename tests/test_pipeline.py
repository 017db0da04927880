"""The pipeline as a whole: nothing unaccounted for, the same bytes after kills and with any workers, damage noticed."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow.parquet as pq
import pytest
from killing import finished_steps, kill_again_and_again
from omegaconf import OmegaConf

from data_pipeline import stages
from data_pipeline.account.ledger import funnel
from data_pipeline.config import CorpusConfig, Source
from data_pipeline.layout import Corpus
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import AccountingError, InputError
from data_pipeline.token_shards import TokenShards

PROSE = [text for _, text in sorted(topics.items()) if len(text) > 1_500][:40]
GERMAN = (
    "Dies ist ein langer deutscher Text über das Wetter, die Landschaft und die Menschen, die in den Bergen wohnen. "
    "Sie erzählen einander Geschichten, die von ihren Großeltern stammen, und trinken dabei Tee aus kleinen Tassen. "
) * 12


def page(title: str, text: str, head: str = "") -> bytes:
    paragraphs = "".join(f"<p>{escape(p)}</p>" for p in text.split("\n\n"))
    top = f"<html><head><title>{escape(title)}</title>{head}</head>"
    return f"{top}<body><article>{paragraphs}</article></body></html>".encode()


def pages() -> dict[str, tuple[int, str, bytes]]:
    """path → (status, content type, body) of a small site whose every page's end is known."""
    html = "text/html; charset=utf-8"
    site = {f"/good/{i}": (200, html, page(f"Topic {i}", text)) for i, text in enumerate(PROSE)}
    site["/same/0"] = (200, html, page("Other title", PROSE[0]))
    words = PROSE[1].split(" ")
    site["/near/1"] = (
        200,
        html,
        page("Nearly", " ".join([*words[: len(words) // 2], "indeed", *words[len(words) // 2 :]])),
    )
    site["/german"] = (200, html, page("Deutsch", GERMAN))
    site["/short"] = (200, html, page("Short", "Only a few words here, too few to learn from."))
    site["/noindex"] = (200, html, page("Hidden", PROSE[2], '<meta name="robots" content="noindex">'))
    site["/image"] = (200, "image/png", b"\x89PNG\r\n\x1a\n")
    site["/gone"] = (410, html, b"gone")
    site["/private/secret"] = (200, html, page("Private", PROSE[3]))
    site["/robots.txt"] = (200, "text/plain", b"User-agent: *\nDisallow: /private/\n")
    return site


class Handler(http.server.BaseHTTPRequestHandler):
    site = pages()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, kind, body = self.site.get(self.path, (404, "text/html", b"not found"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def url_list(folder: Path, address: str) -> Path:
    """Addresses of three hosts, which all are the one server; some that must end otherwise."""
    port = address.split(":")[1]
    hosts = ["alpha.test", "beta.test", "www.gamma.test"]
    (folder / "hosts").write_text("".join(f"127.0.0.1 {h}\n" for h in hosts))
    lines = [f"http://{hosts[i % 3]}:{port}{path}" for i, path in enumerate(Handler.site) if path != "/robots.txt"]
    lines += [lines[0], f"http://alpha.test:{port}/missing", f"http://alpha.test:{port}/paper.pdf", "http://10.1.2.3/x",
              "mailto:somebody@example.org", "http://unknown.invalid/"]  # fmt: skip
    path = folder / "urls.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, address: str, out: Path) -> list[str]:
    return [
        f"urls={folder / 'urls.txt'}",
        f"out={out}",
        f"fetch.allow_addresses=[{address}]",
        f"fetch.hosts_file={folder / 'hosts'}",
        "fetch.contact=https://example.org/crawler",
        "fetch.delay_s=0",
        "fetch.retries=0",
        "fetch.connect_timeout_s=5",
        "tokenize.validation_fraction=0.2",
        "workers=2",
        "shards=3",
        "progress=false",
    ]


def corpus_command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "gpt2train", "corpus", *overrides]


def run(*overrides: str, code: int = 0) -> str:
    result = subprocess.run(corpus_command(*overrides), capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def tree(out: Path, *folders: str) -> dict[str, str]:
    """sha256 of every file of the result."""
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for folder in folders
        for p in sorted((out / folder).rglob("*"))
        if p.is_file()
    }


RESULT = ("documents", "ledger", "tokens")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, address: str) -> tuple[Path, Path, str]:
    """(folder with the list, corpus folder, what the run said)."""
    folder = tmp_path_factory.mktemp("corpus")
    url_list(folder, address)
    out = folder / "out"
    return folder, out, run(*settings(folder, address, out))


def ledger_rows(out: Path) -> list[dict[str, object]]:
    return [row for file in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_every_line_of_the_list_ends_in_the_state_it_must(built: tuple[Path, Path, str]) -> None:
    folder, out, _ = built
    rows = ledger_rows(out)
    lines = [line for line in (folder / "urls.txt").read_text().split("\n") if line]
    assert len(rows) == len(lines)
    assert sorted(int(str(row["index"])) for row in rows) == list(range(len(lines)))
    ends = {
        str(row["url"]).split(".test", 1)[-1].split("/", 1)[-1]: row for row in rows if row["reason"] != "duplicate_url"
    }
    expected = {
        "german": ("dropped", "extract", "language"),  # surely German: it is not even extracted
        "noindex": ("dropped", "fetch", "noindex"),
        "image": ("dropped", "fetch", "wrong_type"),
        "gone": ("failed", "fetch", "http_status"),
        "missing": ("failed", "fetch", "http_status"),
        "private/secret": ("dropped", "fetch", "robots"),
        "paper.pdf": ("dropped", "urls", "blocked_extension"),
        "good/5": ("kept", "decontaminate", None),
    }
    for path, end in expected.items():
        assert (ends[path]["state"], ends[path]["stage"], ends[path]["reason"]) == end, path
    by_url = {str(row["url"]): row for row in rows}
    assert by_url["http://10.1.2.3/x"]["reason"] == "blocked_address"
    assert by_url["http://unknown.invalid/"]["reason"] == "dns"
    assert by_url["mailto:somebody@example.org"]["reason"] == "scheme_not_allowed"
    assert ends["short"]["state"] == "dropped"
    reasons = Counter(str(row["reason"]) for row in rows)
    assert reasons["duplicate_url"] == 1
    assert reasons["exact_duplicate"] == 1
    pair = [by_url[u] for u in by_url if u.endswith(("/good/1", "/near/1"))]
    assert sorted((str(r["state"]), str(r["reason"])) for r in pair) == [
        ("dropped", "near_duplicate"),
        ("kept", "None"),
    ]


def test_the_totals_of_every_stage_add_up(built: tuple[Path, Path, str]) -> None:
    summary = json.loads((built[1] / "summary.json").read_text())
    stages = summary["stages"]
    assert [s["stage"] for s in stages] == ["urls", "fetch", "extract", "filter", "dedup", "decontaminate"]
    for before, after in itertools.pairwise(stages):
        assert before["kept"] == after["in"]
    for row in stages:
        assert row["in"] == row["kept"] + row["dropped"] + row["failed"]
        assert sum(row["reasons"].values()) == row["dropped"] + row["failed"]
    urls = summary["urls"]
    assert urls["in"] == urls["kept"] + urls["dropped"] + urls["failed"]
    assert urls["kept"] == summary["documents"] == sum(s["documents"] for s in summary["tokens"]["splits"].values())


def test_totals_that_do_not_add_up_stop_the_run() -> None:
    good = {"in": 2, "kept": 1, "dropped": 1, "failed": 0, "reasons": {"dropped:x": 1}}
    last = {"in": 1, "kept": 1, "dropped": 0, "failed": 0, "reasons": {}}
    assert funnel([{"stages": {"a": good, "b": last}}], ["a", "b"])["urls"]["kept"] == 1
    for wrong in ({**good, "kept": 0}, {**good, "reasons": {}}):
        with pytest.raises(AccountingError):
            funnel([{"stages": {"a": wrong, "b": last}}], ["a", "b"])
    with pytest.raises(AccountingError, match="a kept 1, b took in 2"):
        funnel([{"stages": {"a": good, "b": {**last, "in": 2, "kept": 2}}}], ["a", "b"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets_loads_the_corpus_folder(built: tuple[Path, Path, str], tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset(str(built[1]), split="train", cache_dir=str(tmp_path))
    assert len(rows) == json.loads((built[1] / "summary.json").read_text())["documents"]
    assert {"url", "text", "title", "language", "domain", "warc_file", "warc_offset", "digest"} <= set(
        rows.column_names
    )
    for row in rows:
        assert row["digest"] == hashlib.sha256(row["text"].encode()).hexdigest()
        assert row["language"] == "en"


def test_tokens_are_the_texts_and_lead_back_to_their_urls(built: tuple[Path, Path, str]) -> None:
    from data_pipeline import tokenizer

    out = built[1]
    texts = {
        r["digest"]: r for f in sorted((out / "documents").glob("*.parquet")) for r in pq.read_table(f).to_pylist()
    }
    shards = TokenShards.open(out / "tokens")
    seen = set()
    for name in ("train", "validation"):
        split = shards.split(name)
        stream = np.concatenate([np.memmap(p, dtype=np.uint16) for p in sorted((out / "tokens").glob(f"{name}_*.bin"))])
        assert len(stream) == split.tokens
        for span in split.documents(0, split.tokens):
            tokens = stream[span.start : span.stop]
            assert tokens[-1] == tokenizer.END_OF_TEXT
            assert tokenizer.load().decode(tokens[:-1]) == texts[span.digest]["text"]
            assert span.url == texts[span.digest]["url"]
            seen.add(span.digest)
    assert seen == set(texts)


def test_a_second_run_does_nothing_again(built: tuple[Path, Path, str], address: str) -> None:
    folder, out, _ = built
    before = tree(out, *RESULT, "warc")
    times = {p: p.stat().st_mtime_ns for p in (out / "tokens").iterdir()}
    said = run(*settings(folder, address, out))
    assert "again" not in said
    assert said.count("nothing to do") >= 4
    assert tree(out, *RESULT, "warc") == before
    assert {p: p.stat().st_mtime_ns for p in (out / "tokens").iterdir()} == times


def archived(built: tuple[Path, Path, str], out: Path) -> Path:
    """A new corpus folder that holds the archived responses alone."""
    out.mkdir()
    for name in ("warc", "urls", "fetch"):
        shutil.copytree(built[1] / name, out / name)
    shutil.copy(built[1] / "shards.json", out / "shards.json")
    return out


def test_one_worker_gives_the_same_bytes_as_two(built: tuple[Path, Path, str], address: str, tmp_path: Path) -> None:
    out = archived(built, tmp_path / "one")
    run(*settings(built[0], address, out), "workers=1")
    assert tree(out, *RESULT) == tree(built[1], *RESULT)


def test_a_large_shard_in_parts_gives_the_same_bytes(
    built: tuple[Path, Path, str], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = archived(built, tmp_path / "parts")
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(CorpusConfig), OmegaConf.load(built[1] / "config.yaml"))
    )
    assert isinstance(config, CorpusConfig)
    config.out = str(out)
    monkeypatch.setattr(stages, "LEAST_PART_ROWS", 4)
    assert build_corpus(config) == 0
    assert not (out / "extract_parts").exists()
    assert tree(out, *RESULT, "extract") == tree(built[1], *RESULT, "extract")
    largest = max(pq.read_metadata(p).num_rows for p in (out / "fetch").glob("[0-9]*[0-9].parquet"))
    assert largest > 8  # so there were parts


@pytest.mark.timeout(900)
def test_kill_9_again_and_again_changes_no_byte(built: tuple[Path, Path, str], address: str, tmp_path: Path) -> None:
    out = archived(built, tmp_path / "killed")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            corpus_command(*settings(built[0], address, out)),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    moments = kill_again_and_again(start, out, kills=5, steps=finished_steps(built[1]), seed=7)
    assert not any(moment.startswith("ended") for moment in moments), moments
    run(*settings(built[0], address, out))
    assert tree(out, *RESULT) == tree(built[1], *RESULT)
    assert not list(out.rglob(".*.tmp"))


def test_a_changed_setting_redoes_exactly_the_stages_concerned(
    built: tuple[Path, Path, str], address: str, tmp_path: Path
) -> None:
    out = tmp_path / "changed"
    shutil.copytree(built[1], out)
    said = run(*settings(built[0], address, out), "quality.min_words=400")
    assert "filter: 3 of 3 shards again: settings changed: quality.min_words 0 → 400" in said
    for untouched in ("urls", "fetch", "extract"):
        assert f"{untouched}: finished before, nothing to do" in said
    # One line, though the three shards name different files.
    assert "dedup signatures: 3 of 3 shards again: input changed: filter/*." in said
    assert tree(out, "warc", "extract") == tree(built[1], "warc", "extract")
    run(*settings(built[0], address, out))
    assert tree(out, *RESULT) == tree(built[1], *RESULT)


DAMAGE = (
    "extract/00001.parquet",
    "filter/00000.verdicts.parquet",
    "dedup/duplicates.parquet",
    "documents/00002.parquet",
    "fetch/00000.parquet",
    "tokenize/00001.tokens",
    "tokens/train_00000.bin",
    "tokens/manifest.json",
)


def test_damaged_files_are_named_and_made_again(built: tuple[Path, Path, str], address: str, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(built[1], out)
    rng = random.Random(3)
    for number, name in enumerate(DAMAGE):
        path = out / name
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            path.unlink()
        elif number % 3 == 1:
            path.write_bytes(data[: len(data) // 2])
        else:
            data[rng.randrange(len(data))] ^= 1
            path.write_bytes(data)
    said = run(*settings(built[0], address, out))
    for name in DAMAGE:
        assert Path(name).name in said, name
    assert tree(out, *RESULT) == tree(built[1], *RESULT)


def test_a_damaged_warc_record_costs_its_page_alone(
    built: tuple[Path, Path, str], address: str, tmp_path: Path
) -> None:
    out = archived(built, tmp_path / "rotten")
    pages = pq.read_table(out / "fetch" / "00000.parquet").to_pylist()
    path = out / pages[0]["warc_file"]
    data = bytearray(path.read_bytes())
    data[pages[0]["warc_offset"] + 200] ^= 0xFF
    path.write_bytes(data)
    run(*settings(built[0], address, out))
    ends = {row["url"]: (row["state"], row["reason"]) for row in ledger_rows(out)}
    assert ends[pages[0]["url"]] == ("failed", "warc_damaged")
    assert [end for end in ends.values() if end[1] == "warc_damaged"] == [("failed", "warc_damaged")]


def test_a_second_run_at_once_is_refused(built: tuple[Path, Path, str], address: str, tmp_path: Path) -> None:
    out = archived(built, tmp_path / "busy")
    first = subprocess.Popen(
        corpus_command(*settings(built[0], address, out)), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while not (out / ".lock").exists() or not (out / ".lock").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGSTOP)  # or it might be done before the second one has started
        said = run(*settings(built[0], address, out), code=3)
        assert f"in use by process {first.pid}" in said
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_no_room_ends_with_code_4_and_goes_on_later(
    built: tuple[Path, Path, str], address: str, tmp_path: Path
) -> None:
    out = archived(built, tmp_path / "full")

    def no_file_over_8_kib() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    overrides = settings(built[0], address, out)
    result = subprocess.run(
        corpus_command(*overrides),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=no_file_over_8_kib,
    )
    assert result.returncode == 4, result.stderr
    assert "earlier results are intact" in result.stderr
    assert "Traceback" not in result.stderr
    run(*overrides)
    assert tree(out, *RESULT) == tree(built[1], *RESULT)


def test_some_stages_only_and_what_they_need(built: tuple[Path, Path, str], address: str, tmp_path: Path) -> None:
    out = archived(built, tmp_path / "some")
    said = run(*settings(built[0], address, out), "stages=[dedup]", code=2)
    assert "dedup needs filter/00000.verdicts.parquet, which filter makes; add filter" in said
    run(*settings(built[0], address, out), "stages=[urls,fetch,extract,filter]")
    assert [s["stage"] for s in json.loads((out / "summary.json").read_text())["stages"]][-1] == "filter"


def test_why_tells_what_became_of_a_url(built: tuple[Path, Path, str]) -> None:
    urls = [line for line in (built[0] / "urls.txt").read_text().split("\n") if line]
    german = next(u for u in urls if u.endswith("/german"))
    good = next(u for u in urls if u.endswith("/good/5"))
    for url, code, parts in (
        (german, 0, ["dropped at extract: language", "language_score"]),
        (good, 0, ["kept", "tokens: "]),
        ("http://never.test/", 1, ["never seen"]),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "gpt2train", "why", url, f"corpus={built[1]}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        for part in parts:
            assert part in result.stdout


def dataset_config(path: Path, out: Path, **changes: object) -> CorpusConfig:
    config = CorpusConfig(source=Source.dataset, path=str(path), out=str(out), progress=False, workers=2)
    config.language.keep = []
    config.tokenize.validation_fraction = 0.2
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("shards", [0, 3])
def test_text_datasets_enter_as_documents(tmp_path: Path, shards: int) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text(PROSE[0])
    rows = [{"text": text, "url": f"http://x.test/{i}"} for i, text in enumerate(PROSE[1:8])]
    rows += [{"text": None, "url": "http://x.test/none"}, {"text": "  ", "url": "http://x.test/blank"}]
    (source / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(__import__("pyarrow").table({"text": PROSE[8:12]}), source / "c.parquet")
    out = tmp_path / "out"
    assert build_corpus(dataset_config(source, out, shards=shards)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["urls"] == {"in": 14, "kept": 12, "dropped": 2, "failed": 0}
    assert TokenShards.open(out / "tokens").split("train").tokens > 1_000
    documents = [r for f in sorted((out / "documents").glob("*.parquet")) for r in pq.read_table(f).to_pylist()]
    assert sorted(d["text"] for d in documents) == sorted(PROSE[:12])
    assert "dataset:a.txt#0" in {d["url"] for d in documents}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ('{"body": "x"}\n', "text_column=text: not in .*, which has body"),
        ("[1]\n", "line 1 is no JSON"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        build_corpus(dataset_config(tmp_path / "d.jsonl", tmp_path / "out"))


def test_a_warc_file_of_ours_comes_back_in_as_source_warc(built: tuple[Path, Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CorpusConfig(source=Source.warc, path=str(built[1] / "warc"), out=str(out), progress=False, workers=2)
    config.tokenize.validation_fraction = 0.2
    assert build_corpus(config) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["urls"]["in"] == summary["urls"]["kept"] + summary["urls"]["dropped"] + summary["urls"]["failed"]

    def texts(folder: Path) -> set[str]:
        return {t for f in folder.glob("*.parquet") for t in pq.read_table(f, columns=["digest"])["digest"].to_pylist()}

    assert len(texts(out / "documents")) >= 35
    assert texts(out / "documents") & texts(built[1] / "documents")
    assert Corpus(out).report.read_text().startswith("<!doctype html>")
