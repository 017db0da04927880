"""All settings of the corpus pipeline: defaults, units and the sentence that explains each field.

They stand in one room that imports nothing heavy, so that `--help`, tab completion and the report of wrong settings
answer at once. Files in `configs/corpus/` hold only what a recipe changes. `check` reports all faults together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum

STAGES = ("urls", "fetch", "extract", "filter", "dedup", "decontaminate", "tokenize")


class Source(Enum):
    urls = "urls"
    warc = "warc"
    dataset = "dataset"


class Executor(Enum):
    local = "local"


class Keep(Enum):
    """Which document of a near-duplicate cluster stays."""

    longest = "longest"
    earliest = "earliest"
    first = "first"


# Media, archives, binaries and documents that are no HTML; the endings seen most in link lists.
BLOCKED_EXTENSIONS = tuple(
    "jpg jpeg png gif webp svg ico bmp tif tiff mp3 mp4 m4a ogg oga ogv wav flac avi mov mkv webm flv wmv "
    "pdf ps djvu doc docx xls xlsx ppt pptx odt ods epub mobi zip gz tgz bz2 xz 7z rar tar iso dmg exe msi deb rpm "
    "apk jar bin css js json xml rss atom csv ttf woff woff2 swf torrent".split()
)


@dataclass
class UrlListConfig:
    column: str = ""
    """Name of the column or key that holds the URL; empty: `url`, `URL`, `link`, or the only column."""
    score_column: str = "score"
    """Name of the column or key that holds a link's karma, for `min_score`."""
    min_score: int = 0
    """Drop links below this karma (WebText: 3). 0: no such rule. A link without a score passes."""
    max_url_bytes: int = 8192
    """Drop URLs longer than this many bytes."""
    blocked_domains: list[str] = field(default_factory=list)
    """Registrable domains or hosts to leave out, with all their subdomains."""
    blocked_extensions: list[str] = field(default_factory=lambda: list(BLOCKED_EXTENSIONS))
    """Endings of the path that are never HTML."""
    blocked_patterns: list[str] = field(default_factory=list)
    """Regular expressions; a URL in which one is found is left out."""
    strip_tracking: bool = True
    """Remove query parameters that only track where a click came from (utm_*, gclid, fbclid, ...)."""


@dataclass
class FetchConfig:
    contact: str = ""
    """Where site owners reach you (https:// page or mail address); it goes into the user agent. Needed for any
    address that is not listed in `allow_addresses`."""
    user_agent: str = "gpttrain"
    """Product token that robots.txt rules are matched against."""
    allow_addresses: list[str] = field(default_factory=list)
    """Exact `ip:port` pairs that may be connected to although they are not public (a local mirror, a test server)."""
    hosts_file: str = ""
    """Names to resolve from a file in the format of hosts(5) before DNS; the addresses are vetted all the same."""
    concurrency: int = 128
    """Requests under way at once, over all hosts (one at a time to each), in one process. A request that takes longer
    than 5 s no longer counts; of those there may be eight times as many."""
    processes: int = 1
    """Fetching processes; each owns whole registrable domains."""
    delay_s: float = 1.0
    """Least time between the starts of two requests to one host, in seconds; a longer robots.txt crawl-delay wins."""
    max_crawl_delay_s: float = 60.0
    """A robots.txt crawl-delay above this drops the host's URLs (reason `crawl_delay`)."""
    connect_timeout_s: float = 10.0
    """Time for name look-up, connection and TLS, in seconds."""
    timeout_s: float = 60.0
    """Time for one URL with all its redirects, in seconds; a body that drips is cut here."""
    max_page_bytes: int = 5_000_000
    """Largest body, in bytes, before and after decompression; above it the page fails as `too_large`."""
    max_header_bytes: int = 32_768
    """Largest response header block, in bytes."""
    max_redirects: int = 5
    """Redirects followed for one URL; each target is vetted like the first."""
    retries: int = 2
    """Further tries after a failure that may pass (connection reset, time-out, 429, 5xx)."""
    retry_wait_s: float = 2.0
    """Wait before the first retry, in seconds; doubled each time, with jitter; Retry-After wins."""
    max_retry_after_s: float = 300.0
    """A Retry-After beyond this ends the URL as failed instead of waiting."""
    robots: bool = True
    """Obey robots.txt (RFC 9309). Off only for sites you own."""
    respect_noai: bool = True
    """Drop pages whose X-Robots-Tag or <meta name=robots> says noindex, noai or none."""
    max_warc_bytes: int = 1_000_000_000
    """A WARC file is closed and the next begun beyond this many bytes."""
    tail_budget_s: float = 0.0
    """Once 99 % of URLs are done, the rest get this long, in seconds, then end as `out_of_budget`. 0: no bound."""


@dataclass
class ExtractConfig:
    timeout_s: float = 5.0
    """Most processor time for one page, in seconds, so that a busy machine drops no other pages than an idle one; on
    the clock a page gets twice as long. Then its process is killed and replaced, and the page fails."""
    max_html_bytes: int = 2_000_000
    """Pages with more HTML than this are not extracted (reason `html_too_large`)."""
    max_memory_mb: int = 2_000
    """Address space of the extracting process beyond what it starts with, in MiB."""
    min_characters: int = 100
    """Pages whose text is shorter drop as `no_text`."""
    fast: bool = True
    """trafilatura without its fallback extractors first; pages under 500 characters get the full way."""
    favor_recall: bool = False
    """Keep more of a page when in doubt; for documentation and reference pages, which are lists rather than prose."""
    tables: bool = True
    """Text in tables, too."""
    metadata: bool = True
    """Title, author and date (about 30 % more time)."""
    respect_noai: bool = True
    """Drop pages whose <meta name=robots> says noindex, none or noai (reason `noindex`)."""


@dataclass
class LanguageConfig:
    keep: list[str] = field(default_factory=lambda: ["en"])
    """ISO 639-1 codes of the languages that stay; empty: all."""
    min_score: float = 0.65
    """Least probability of the language found (FineWeb: 0.65)."""


@dataclass
class QualityConfig:
    """A bound of 0 (for a minimum) or 1 (for a ratio's maximum) switches its rule off. Sources: see quality.py."""

    min_words: int = 0
    max_words: int = 0
    """0: no upper bound."""
    min_tokens: int = 0
    """Least GPT-2 tokens (OpenWebText: 128)."""
    min_mean_word_characters: float = 0.0
    max_mean_word_characters: float = 0.0
    """0: no upper bound."""
    max_symbol_word_ratio: float = 1.0
    """`#` per word, and ellipses per word (Gopher: 0.1)."""
    max_bullet_line_ratio: float = 1.0
    max_ellipsis_line_ratio: float = 1.0
    min_alphabetic_word_ratio: float = 0.0
    min_stop_words: int = 0
    max_duplicate_line_ratio: float = 1.0
    max_duplicate_line_character_ratio: float = 1.0
    max_duplicate_paragraph_ratio: float = 1.0
    max_duplicate_paragraph_character_ratio: float = 1.0
    max_top_ngram_character_ratios: list[float] = field(default_factory=list)
    """For n = 2, 3, 4 (Gopher: .20, .18, .16); empty: off."""
    max_duplicate_ngram_character_ratios: list[float] = field(default_factory=list)
    """For n = 5 to 10 (Gopher: .15, .14, .13, .12, .11, .10); empty: off."""
    c4_lines: bool = False
    """C4's line rules: lines of fewer than three words, with `javascript` or a policy notice go."""
    c4_terminal_punctuation: bool = False
    """C4's rule that a line must end in . ? ! or a quotation mark (FineWeb leaves it out)."""
    c4_min_sentences: int = 0
    c4_drop_curly_bracket: bool = False
    c4_drop_lorem_ipsum: bool = False
    min_punctuated_line_ratio: float = 0.0
    """FineWeb: 0.12."""
    max_short_line_ratio: float = 1.0
    """Lines of at most 30 characters (FineWeb: 0.67)."""
    max_repeated_line_character_ratio: float = 1.0
    """Characters in lines that occur more than once (FineWeb: 0.01)."""
    max_newline_word_ratio: float = 0.0
    """Newlines per word (FineWeb: 0.3). 0: off."""


@dataclass
class DedupConfig:
    exact: bool = True
    """Drop documents whose normalized text was seen before."""
    near: bool = True
    """Drop near-duplicates found by MinHash."""
    ngram: int = 5
    """Words in a shingle."""
    bands: int = 14
    rows: int = 8
    """bands × rows permutations; two documents of Jaccard similarity s meet with probability 1-(1-s^rows)^bands."""
    keep: Keep = Keep.longest


@dataclass
class DecontaminateConfig:
    paths: list[str] = field(default_factory=list)
    """Evaluation sets: .txt files, or .jsonl files whose string values are all used."""
    ngram: int = 8
    """Words in an n-gram of the contamination report (the paper's: 8)."""
    drop: bool = False
    """Drop documents that share an n-gram of `drop_ngram` words with an evaluation set."""
    drop_ngram: int = 13


@dataclass
class TokenizeConfig:
    validation_fraction: float = 0.005
    """Share of documents, by hash of their text, that goes to the validation split."""
    shard_tokens: int = 100_000_000
    """Tokens in one .bin file (2 bytes each)."""
    seed: int = 0
    """Seed of the order of documents."""


@dataclass
class CorpusConfig:
    """`gpt2train corpus`: URL list, WARC files or text datasets → documents and token shards."""

    urls: str = ""
    """URL list for source=urls: .txt, .csv, .tsv, .jsonl, .parquet (also .gz, .xz, .zst), or a folder of them."""
    out: str = "corpus"
    """Folder of the corpus; run again with the same folder to go on."""
    source: Source = Source.urls
    """Where the documents come from: a URL list, WARC files, or a dataset of texts."""
    path: str = ""
    """For source=warc a WARC file or folder; for source=dataset a file or folder of .txt, .jsonl or .parquet, or the
    name of a Hugging Face dataset."""
    text_column: str = "text"
    """For source=dataset: the column or key that holds the text."""
    stages: list[str] = field(default_factory=list)
    """Stages to run, in any order; empty: all."""
    recipe: str = ""
    """Name of the recipe in force; choose with recipe=NAME."""
    executor: Executor = Executor.local
    workers: int = 0
    """Worker processes; 0: one per core."""
    shards: int = 0
    """Shards that the work is cut into; 0: one per 5,000 rows, at least 8. It is part of the result's order."""
    progress: bool = True
    """Progress bars with a rate and a time to go, on standard error."""
    url_list: UrlListConfig = field(default_factory=UrlListConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)


def check(config: CorpusConfig) -> list[str]:
    """All faults of `config`, one line each: field=value: bound; remedy. Empty when it can run."""
    faults: list[str] = []

    def require(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
        if not holds:
            faults.append(f"{name}={value}: {bound}; {remedy}")

    c, f = config, config.fetch
    if c.source is Source.urls:
        require(bool(c.urls), "urls", "''", "must name a URL list", "give urls=list.txt")
    else:
        require(bool(c.path), "path", "''", f"must name the input of source={c.source.value}", "give path=…")
    require(bool(c.out), "out", "''", "must name a folder", "give out=corpus")
    for stage in c.stages:
        require(stage in STAGES, "stages", stage, f"must be among {', '.join(STAGES)}", "name stages from that list")
    require(c.workers >= 0, "workers", c.workers, "must be 0 (one per core) or more", "give workers=2")
    require(c.shards >= 0, "shards", c.shards, "must be 0 (automatic) or more", "leave it out")
    for pattern in c.url_list.blocked_patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            require(False, "url_list.blocked_patterns", pattern, f"must be a regular expression ({e})", "mend it")
    for pair in f.allow_addresses:
        require(
            re.fullmatch(r"(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-fA-F:.]+\]):\d{1,5}", pair) is not None,
            "fetch.allow_addresses",
            pair,
            "must be an exact ip:port",
            "write 127.0.0.1:8000 or [::1]:8000",
        )
    require(
        re.fullmatch(r"[A-Za-z_-]+", f.user_agent) is not None,
        "fetch.user_agent",
        f.user_agent,
        "must be a product token of letters, - and _ (RFC 9309, 2.2.1)",
        "leave it out or give your crawler's name",
    )
    require(
        re.fullmatch(r"(https?://[^\s()]+|[^\s@()]+@[^\s@()]+)?", f.contact) is not None,
        "fetch.contact",
        f.contact,
        "must be a page or a mail address, as it goes into the user agent",
        "give https://example.org/crawler or crawler@example.org",
    )
    for name in ("concurrency", "processes", "max_page_bytes", "max_header_bytes", "max_warc_bytes"):
        require(getattr(f, name) > 0, f"fetch.{name}", getattr(f, name), "must be above 0", "leave it out")
    for name in ("connect_timeout_s", "timeout_s"):
        require(getattr(f, name) > 0, f"fetch.{name}", getattr(f, name), "must be above 0 s", "leave it out")
    for name in (
        "delay_s",
        "max_crawl_delay_s",
        "max_redirects",
        "retries",
        "retry_wait_s",
        "max_retry_after_s",
        "tail_budget_s",
    ):
        require(getattr(f, name) >= 0, f"fetch.{name}", getattr(f, name), "must be 0 or more", "leave it out")
    require(c.extract.timeout_s > 0, "extract.timeout_s", c.extract.timeout_s, "must be above 0 s", "leave it out")
    require(
        0 <= c.language.min_score <= 1, "language.min_score", c.language.min_score, "must lie in [0, 1]", "give 0.65"
    )
    require(
        len(c.quality.max_top_ngram_character_ratios) in (0, 3),
        "quality.max_top_ngram_character_ratios",
        c.quality.max_top_ngram_character_ratios,
        "must hold three ratios (n = 2, 3, 4) or none",
        "give [.20,.18,.16]",
    )
    require(
        len(c.quality.max_duplicate_ngram_character_ratios) in (0, 6),
        "quality.max_duplicate_ngram_character_ratios",
        c.quality.max_duplicate_ngram_character_ratios,
        "must hold six ratios (n = 5 to 10) or none",
        "give [.15,.14,.13,.12,.11,.10]",
    )
    for name in ("max_html_bytes", "max_memory_mb"):
        value = getattr(c.extract, name)
        require(value > 0, f"extract.{name}", value, "must be above 0", "leave it out")
    require(
        c.extract.min_characters >= 0,
        "extract.min_characters",
        c.extract.min_characters,
        "must be 0 or more",
        "give 100",
    )
    for rule in fields(QualityConfig):
        value = getattr(c.quality, rule.name)
        if not isinstance(value, bool):
            lowest = min(value, default=0) if isinstance(value, list) else value
            require(lowest >= 0, f"quality.{rule.name}", value, "must be 0 or more", "leave it out")
    for name in ("ngram", "drop_ngram"):
        value = getattr(c.decontaminate, name)
        require(value > 0, f"decontaminate.{name}", value, "must be above 0 words", "leave it out")
    for name in ("ngram", "bands", "rows"):
        require(getattr(c.dedup, name) > 0, f"dedup.{name}", getattr(c.dedup, name), "must be above 0", "leave it out")
    require(
        0 <= c.tokenize.validation_fraction < 1,
        "tokenize.validation_fraction",
        c.tokenize.validation_fraction,
        "must lie in [0, 1)",
        "give 0.005",
    )
    require(
        c.tokenize.shard_tokens >= 1024,
        "tokenize.shard_tokens",
        c.tokenize.shard_tokens,
        "must be at least 1024",
        "leave it out",
    )
    return faults
