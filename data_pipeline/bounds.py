"""What keeps a corpus's settings from working: every fault at once, each in one line `field=value: bound; remedy`.

Nothing heavy is imported here, so wrong settings are told at once. What only a look at the files can tell, such as a
list that is not there, stands in entrances.py.
"""

from __future__ import annotations

import re
from dataclasses import fields
from difflib import get_close_matches

from data_pipeline.config import (
    FETCH_REASONS,
    LANGUAGES,
    STAGES,
    CorpusConfig,
    Executor,
    QualityConfig,
    Source,
    addresses,
)
from data_pipeline.storage.address import address_fault, is_address, same_place, shown

MOST_SHARDS = 10_000
"""Each shard has some 25 files and a dozen tasks, whether or not it has a row: so many take an hour by themselves. Of
5,000 rows each they hold 50 million, which is more than WebText's 45 million links."""


def check(config: CorpusConfig) -> list[str]:
    """All faults of `config`, one line each: field=value: bound; remedy. Empty when it can run."""
    faults: list[str] = []

    def require(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
        if not holds:
            faults.append(f"{name}={value}: {bound}; {remedy}")

    c, f = config, config.fetch
    require(not (c.what_if and c.forget), "forget", c.forget, "cannot go with what_if", "give one of them")
    if c.runs or c.forget_archive:
        name = "runs" if c.runs else "forget_archive"
        require(bool(c.forget), name, getattr(c, name), "belongs to forget", "give forget=domains.txt as well")
    if c.what_if or c.forget:
        pass  # the corpus knows where its documents came from
    elif c.source is Source.urls:
        require(bool(c.urls), "urls", "''", "must name a URL list", "give urls=list.txt")
    else:
        require(bool(c.path), "path", "''", f"must name the input of source={c.source.value}", "give path=…")
    require(bool(c.out), "out", "''", "must name a folder", "give out=corpus")
    for stage in c.stages:
        require(stage in STAGES, "stages", stage, f"must be among {', '.join(STAGES)}", "name stages from that list")
    require(c.workers >= 0, "workers", c.workers, "must be 0 (one per core) or more", "give workers=2")
    for setting, value in addresses(c):
        fault = address_fault(value)
        require(not fault, setting, shown(value), fault, "see docs/storage.md")
    remote = is_address(c.out) or any(is_address(value) for _, value in addresses(c))
    if is_address(f.since):
        require(False, "fetch.since", shown(f.since), "must be a local folder", "copy that corpus first")
    if c.executor is Executor.ray and remote:
        require(bool(c.work), "work", "''", "must name a folder that all machines share", "give work=/shared/work")
    if is_address(c.work):
        require(False, "work", shown(c.work), "must be a local folder", "leave it out")
    for name in ("transfers", "sync_every_s", "lease_s", "retry_s"):
        value = getattr(c.storage, name)
        least, unit = (1, "") if name == "transfers" else (1, " s")
        require(value >= least, f"storage.{name}", value, f"must be at least {least}{unit}", "leave it out")
    if c.executor is Executor.ray:
        address, bound = c.ray.address, "must be auto or host:port of a cluster that this machine belongs to"
        require(re.fullmatch(r"auto|[^\s/]+:\d{1,5}", address) is not None, "ray.address", address, bound, "give auto")
        require(c.ray.cpus > 0, "ray.cpus", c.ray.cpus, "must be above 0", "give 1")
        require(c.ray.memory_mb >= 0, "ray.memory_mb", c.ray.memory_mb, "must be 0 (none) or more", "give 4000")
        require(c.ray.retries >= 0, "ray.retries", c.ray.retries, "must be 0 or more", "give 3")
        timeout = c.ray.node_timeout_s
        require(timeout > 0, "ray.node_timeout_s", timeout, "must be above 0 s", "give 300")
    bound = f"must lie in [0, {MOST_SHARDS:,}], where 0 is automatic"
    require(0 <= c.shards <= MOST_SHARDS, "shards", c.shards, bound, "leave it out")
    for reason in c.retry:
        require(
            reason in FETCH_REASONS or re.fullmatch(r"(http_)?[1-5]\d\d", reason) is not None,
            "retry",
            reason,
            "must be a reason of the fetch or an HTTP status such as http_429",
            f"give some of {', '.join(FETCH_REASONS)}",
        )
    if c.retry:
        require(c.source is Source.urls, "retry", c.retry, "needs source=urls, as others fetch nothing", "leave it out")
        require(not c.stages or "fetch" in c.stages, "retry", c.retry, "needs the stage fetch", "add it to stages")
    if f.since:
        same = same_place(f.since, c.out)
        require(not same, "fetch.since", f.since, "must be another corpus than out", "give a new out=")
    for folder in c.dedup.against:
        same = same_place(folder, c.out)
        require(not same, "dedup.against", shown(folder), "must be another corpus than out", "take it out")
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
        re.fullmatch(r"(https?://[!-'*-~]+|[!-'*-?A-~]+@[!-'*-?A-~]+)?", f.contact) is not None,
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
    for code in c.language.keep:
        near = get_close_matches(code.lower()[:2], LANGUAGES, cutoff=0.5) or ["en"]
        bound = "must be the ISO 639-1 code of a language that is identified"
        require(code in LANGUAGES, "language.keep", code, bound, f"give {' or '.join(near)}")
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
        if not isinstance(value, bool | str):
            lowest = min(value, default=0) if isinstance(value, list) else value
            require(lowest >= 0, f"quality.{rule.name}", value, "must be 0 or more", "leave it out")
    for name in ("ngram", "drop_ngram"):
        value = getattr(c.decontaminate, name)
        require(value > 0, f"decontaminate.{name}", value, "must be above 0 words", "leave it out")
    require(
        not (c.decontaminate.drop and c.decontaminate.remove_spans),
        "decontaminate.remove_spans",
        "true",
        "cannot go with decontaminate.drop",
        "give one of them",
    )
    require(c.dedup.plant >= 0, "dedup.plant", c.dedup.plant, "must be 0 or more", "give 100")
    require(
        c.dedup.near or not c.dedup.plant, "dedup.plant", c.dedup.plant, "measures dedup.near", "give dedup.near=true"
    )
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
    seed = c.tokenize.seed
    require(-(2**63) <= seed < 2**63, "tokenize.seed", seed, "must lie in [-2⁶³, 2⁶³)", "give 0")
    return faults
