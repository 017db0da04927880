"""All settings of the corpus pipeline: defaults, units and the sentence that explains each field.

They stand in one room that imports nothing heavy, so that `--help`, tab completion and the report of wrong settings
answer at once; what keeps them from working stands in bounds.py. Files in `configs/corpus/` hold only what a recipe
changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

STAGES = ("urls", "fetch", "extract", "filter", "dedup", "decontaminate", "tokenize")


# The fetch's typed reasons (crawl/fetch.py lists what each means); `retry` may name any of them.
FETCH_REASONS = tuple(
    "dns connect tls timeout http_status too_large header_too_large truncated protocol bad_encoding robots_unreachable "
    "redirect_loop too_many_redirects retry_after out_of_budget "
    "robots noindex wrong_type blocked_address bad_scheme crawl_delay".split()
)

# The languages that py3langid tells apart (ISO 639-1), and "und" for a text without a letter.
LANGUAGES = tuple(
    "af am an ar as az be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr ga gl gu he hi hr ht hu hy id "
    "is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mk ml mn mr ms mt nb ne nl nn no oc or pa pl ps pt qu ro ru "
    "rw se si sk sl sq sr sv sw ta te th tl tr ug uk ur vi vo wa xh zh zu und".split()
)


class Source(Enum):
    urls = "urls"
    warc = "warc"
    dataset = "dataset"


class Executor(Enum):
    local = "local"
    ray = "ray"


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
    blocked_domains_file: str = ""
    """A file with more of them, one a line; empty lines and lines that begin with # do not count. Its content is part
    of the stage's input: a changed file redoes the stage."""
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
    than 5 s (1 s if the host has not answered quickly before) no longer counts; of those there may be eight times as
    many."""
    processes: int = 1
    """Fetching processes; each owns whole registrable domains, and they take turns at hosts that redirects lead to."""
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
    """Drop pages whose X-Robots-Tag or <meta name=robots> says noindex, noai or none, or whose tdm-reservation is 1;
    with source=warc, by the headers that are archived."""
    max_warc_bytes: int = 1_000_000_000
    """A WARC file is closed and the next begun beyond this many bytes."""
    tail_budget_s: float = 0.0
    """Once 99 % of URLs are done, the rest get this long, in seconds, then end as `out_of_budget`. 0: no bound."""
    since: str = ""
    """Folder of an earlier corpus: its pages are asked for with If-None-Match or If-Modified-Since, and one that did
    not change is taken from that corpus's WARC files, which must stay where they are. Needs the same `shards`."""
    rescue: str = ""
    """WARC file or folder in which links that turned out dead are looked up; a page found there is kept, and marked
    `rescued` in the ledger and in the document."""


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
    """Take resiliparse's main content where it covers most of the visible text, which is as good as trafilatura's
    there and five times as fast; off: trafilatura judges every page."""
    skip_other_languages: bool = True
    """Leave out pages whose visible text is surely in none of the languages of `language.keep`, before extraction
    (reason `language`)."""
    favor_recall: bool = False
    """Keep more of a page when in doubt; for documentation and reference pages, which are lists rather than prose."""
    tables: bool = True
    """Text in tables, too."""
    metadata: bool = True
    """Title, author and date (9 ms a page)."""
    respect_noai: bool = True
    """Drop pages whose <meta name=robots> says noindex, none or noai, or whose <meta name=tdm-reservation> says 1
    (reason `noindex`)."""


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
    """Least words of a document (Gopher: 50)."""
    max_words: int = 0
    """Most words of a document (Gopher: 100,000). 0: no upper bound."""
    min_tokens: int = 0
    """Least GPT-2 tokens (OpenWebText: 128)."""
    min_mean_word_characters: float = 0.0
    """Least mean length of a document's words, in characters (Gopher: 3)."""
    max_mean_word_characters: float = 0.0
    """Largest mean length of a document's words, in characters (Gopher: 10). 0: no upper bound."""
    max_symbol_word_ratio: float = 1.0
    """`#` per word, and ellipses per word (Gopher: 0.1)."""
    max_bullet_line_ratio: float = 1.0
    """Share of lines that begin with a bullet (Gopher: 0.9)."""
    max_ellipsis_line_ratio: float = 1.0
    """Share of lines that end with an ellipsis (Gopher: 0.3)."""
    min_alphabetic_word_ratio: float = 0.0
    """Share of words that hold a letter (Gopher: 0.8)."""
    min_stop_words: int = 0
    """How many of `the, be, to, of, and, that, have, with` must occur (Gopher: 2)."""
    max_duplicate_line_ratio: float = 1.0
    """Share of lines that occurred before in the document (Gopher: 0.3)."""
    max_duplicate_line_character_ratio: float = 1.0
    """Share of characters in such lines (Gopher: 0.2)."""
    max_duplicate_paragraph_ratio: float = 1.0
    """Share of paragraphs that occurred before in the document (Gopher: 0.3)."""
    max_duplicate_paragraph_character_ratio: float = 1.0
    """Share of characters in such paragraphs (Gopher: 0.2)."""
    max_top_ngram_character_ratios: list[float] = field(default_factory=list)
    """Share of characters in the most frequent n-gram, for n = 2, 3, 4 (Gopher: .20, .18, .16); empty: off."""
    max_duplicate_ngram_character_ratios: list[float] = field(default_factory=list)
    """Share of characters in n-grams that occur more than once, for n = 5 to 10 (Gopher: .15, .14, .13, .12, .11, .10);
    empty: off."""
    c4_lines: bool = False
    """C4's line rules: lines of fewer than three words, with `javascript` or a policy notice go."""
    c4_terminal_punctuation: bool = False
    """C4's rule that a line must end in . ? ! or a quotation mark (FineWeb leaves it out)."""
    c4_min_sentences: int = 0
    """Least sentences of a document (C4: 5)."""
    c4_drop_curly_bracket: bool = False
    """Drop documents that hold `{` (C4)."""
    c4_drop_lorem_ipsum: bool = False
    """Drop documents that hold "lorem ipsum" (C4)."""
    min_punctuated_line_ratio: float = 0.0
    """Share of lines that end in punctuation (FineWeb: 0.12)."""
    max_short_line_ratio: float = 1.0
    """Share of lines of at most 30 characters (FineWeb: 0.67)."""
    max_repeated_line_character_ratio: float = 1.0
    """Share of characters in lines that occur more than once (FineWeb: 0.01)."""
    max_newline_word_ratio: float = 0.0
    """Newlines per word (FineWeb: 0.3). 0: off."""
    blocked_words_file: str = ""
    """A file of words or phrases, one a line; a document that holds one, in whatever case, is dropped (C4's rule about
    bad words, with your list). A changed file redoes the stage."""


@dataclass
class DedupConfig:
    exact: bool = True
    """Drop documents whose normalized text was seen before."""
    near: bool = True
    """Drop near-duplicates found by MinHash."""
    ngram: int = 5
    """Words in a shingle."""
    bands: int = 14
    """Documents whose signatures agree in all rows of one band are near-duplicates (FineWeb: 14 bands of 8 rows)."""
    rows: int = 8
    """bands × rows permutations; two documents of Jaccard similarity s meet with probability 1-(1-s^rows)^bands."""
    keep: Keep = Keep.longest
    """Which document of a cluster stays: `longest`, `earliest` (by date), or `first` (of the list)."""
    against: list[str] = field(default_factory=list)
    """Folders of other corpora: documents that they keep already are dropped here as `old_exact_duplicate` or
    `old_near_duplicate`. They need the same ngram, bands and rows."""
    plant: int = 0
    """Known near-duplicates to plant, and as many texts that are merely alike, to measure recall and precision of this
    very run; they are counted in summary.json and never reach the corpus. 0: none."""


@dataclass
class DecontaminateConfig:
    paths: list[str] = field(default_factory=list)
    """Evaluation sets: .txt files, or .jsonl files whose string values are all used."""
    ngram: int = 8
    """Words in an n-gram of the contamination report (the paper's: 8)."""
    drop: bool = False
    """Drop documents that share an n-gram of `drop_ngram` words with an evaluation set."""
    drop_ngram: int = 13
    """Words in an n-gram that `drop` and `remove_spans` look for (GPT-3's: 13)."""
    remove_spans: bool = False
    """Cut the shared n-grams of `drop_ngram` words out of the documents instead of dropping these."""


@dataclass
class DocumentsConfig:
    mask_personal_data: bool = False
    """Replace e-mail addresses, public IP addresses and telephone numbers in the texts by examples that belong to
    nobody; the ledger counts them. Titles, authors and URLs stay as they are."""


@dataclass
class TokenizeConfig:
    validation_fraction: float = 0.005
    """Share of documents, by hash of their text, that goes to the validation split."""
    shard_tokens: int = 100_000_000
    """Tokens in one .bin file (2 bytes each)."""
    seed: int = 0
    """Seed of the order of documents."""


@dataclass
class StorageConfig:
    """For `out=s3://…` and for inputs in a bucket; see docs/storage.md."""

    transfers: int = 8
    """Files on their way at once."""
    sync_every_s: float = 120.0
    """How often what the fetch has added so far is stored, in seconds: so much of it a lost machine costs at most."""
    lease_s: float = 60.0
    """A run that was not heard of for this long, in seconds, may be taken over by another machine."""
    retry_s: float = 300.0
    """A request that fails is tried again for this long, in seconds; then the run ends with code 4."""


@dataclass
class CorpusReportConfig:
    domains: str = ""
    """A list of domains to compare the corpus with, one a line, most frequent first, with or without a count (OpenAI's
    top 1,000 of WebText has this form): the report shows how many of them the corpus has, and how much of it they are.
    """


@dataclass
class RayConfig:
    """For executor=ray; see docs/ray.md."""

    address: str = "auto"
    """host:port of the cluster's head; auto: what RAY_ADDRESS says, or the cluster that this machine belongs to."""
    cpus: float = 1.0
    """Cores that one task reserves."""
    memory_mb: int = 0
    """Memory that one task reserves, in MiB; 0: tasks are placed by cores alone."""
    retries: int = 3
    """Further tries of a task whose worker or node died."""
    node_timeout_s: float = 300.0
    """The run ends when no living node has had what one task reserves for this long, in seconds."""


@dataclass
class CorpusConfig:
    """`gpt2train corpus`: URL list, WARC files or text datasets → documents and token shards."""

    urls: str = ""
    """URL list for source=urls: .txt, .csv, .tsv, .jsonl, .parquet (also .gz, .xz, .zst), or a folder of them."""
    out: str = "corpus"
    """Folder of the corpus, or its place in a bucket (s3://bucket/corpus, gs://…); run again with the same to go on."""
    work: str = ""
    """Folder for local copies where `out` or an input lies in a bucket; empty: gpt2train/ in the user's cache folder.
    executor=ray needs it on storage that all machines share."""
    source: Source = Source.urls
    """Where the documents come from: a URL list, WARC files, or a dataset of texts."""
    path: str = ""
    """For source=warc a WARC file or folder; for source=dataset a file or folder of .txt, .jsonl or .parquet, or the
    name of a Hugging Face dataset."""
    text_column: str = "text"
    """For source=dataset: the column or key that holds the text."""
    stages: list[str] = field(default_factory=list)
    """Stages to run, in any order; empty: all."""
    retry: list[str] = field(default_factory=list)
    """Reasons of the fetch whose URLs are fetched anew, [dns,timeout,http_429]: `http_429` is the status 429 alone,
    `http_status` any. What came of the earlier tries stays in the journal; the newest result counts."""
    recipe: str = ""
    """Name of the recipe in force; choose with recipe=NAME."""
    executor: Executor = Executor.local
    """Where shards are worked on: on this machine's cores, or on a Ray cluster that shares `out`."""
    workers: int = 0
    """Worker processes; 0: one per core (executor=ray: as many as the cluster has room for)."""
    shards: int = 0
    """Shards that the work is cut into, at most 10,000; 0: one per 5,000 rows, at least 8. It is part of the result's
    order."""
    progress: bool = True
    """Progress bars with a rate and a time to go, on standard error."""
    url_list: UrlListConfig = field(default_factory=UrlListConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    report: CorpusReportConfig = field(default_factory=CorpusReportConfig)
    what_if: list[str] = field(default_factory=list)
    """Settings to try on the numbers that the corpus `out` stores, such as [quality.min_words=400]: prints what would
    be kept and dropped, and writes nothing. Takes language.*, quality.*, dedup.exact, dedup.near, dedup.keep and
    dedup.against; all other settings are the ones that the corpus was made with."""
    forget: str = ""
    """Take-down: a file of domains and URLs, one a line, to remove from the corpus `out` for good. All other settings
    are the ones that the corpus was made with."""
    forget_archive: bool = False
    """With `forget`: blank the responses in the corpus's own WARC files, too. Offsets of all others stay."""
    runs: list[str] = field(default_factory=list)
    """With `forget`: folders of training runs; lists the steps that saw what is removed."""


def addresses(config: CorpusConfig) -> list[tuple[str, str]]:
    """(setting, value) of all settings that may be an address, those that are one alone."""
    c = config
    single = [("urls", c.urls), ("out", c.out), ("path", c.path), ("forget", c.forget)]
    single += [("url_list.blocked_domains_file", c.url_list.blocked_domains_file)]
    single += [("fetch.hosts_file", c.fetch.hosts_file), ("fetch.rescue", c.fetch.rescue)]
    single += [("quality.blocked_words_file", c.quality.blocked_words_file), ("report.domains", c.report.domains)]
    many = [("dedup.against", v) for v in c.dedup.against] + [("decontaminate.paths", v) for v in c.decontaminate.paths]
    return [(name, value) for name, value in (*single, *many) if "://" in value]
