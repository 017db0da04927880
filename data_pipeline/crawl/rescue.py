"""Dead links, looked up in WARC files at hand.

The index of those files flows in, cut by the same rule into the same shards as the URL list; for a URL that nobody
answers any more flows out the newest archived page. What its owner refuses (robots.txt, 401, 403, 451, noindex in the
archived copy) is not dead and is not rescued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import FetchConfig, UrlListConfig
from data_pipeline.crawl.robots import refusal_in_headers, refusal_in_html
from data_pipeline.crawl.spill import Spill
from data_pipeline.crawl.url_syntax import InvalidUrl, host_of, normalize, registrable_domain, shard_of
from data_pipeline.crawl.warc import WarcError, read_response
from data_pipeline.records import DROPPED, KEPT, PAGE_SCHEMA, Verdict
from data_pipeline.store import storage_errors, write_table

DEAD_REASONS = frozenset(
    "dns connect tls timeout truncated protocol bad_encoding redirect_loop too_many_redirects retry_after".split()
)
DEAD_STATUSES = frozenset(("404", "410"))
"""RFC 9110, 15.5.5 and 15.5.11; with them all 5xx. Other statuses say that somebody is there and means it."""


def is_dead(reason: str, detail: str | None) -> bool:
    """Whether a failure means that the page is gone rather than refused."""
    status = (detail or "")[:3]
    return reason in DEAD_REASONS or (
        reason == "http_status" and (status in DEAD_STATUSES or (status.isdigit() and status[0] == "5"))
    )


def split_index(indexes: Sequence[Path], outputs: Sequence[Path], config: UrlListConfig) -> dict[str, Any]:
    """Page tables of WARC files → one table for each shard of the URL list; of one URL's pages the newest stays.

    Memory: one row group of a table, or one shard, whatever the number of pages.
    """
    rows = 0
    with storage_errors(outputs[0]), Spill(outputs[0].parent / ".spill.tmp") as spill:
        for index in indexes:
            with pq.ParquetFile(index) as table:
                for batch in table.iter_batches(batch_size=10_000):
                    for row in batch.to_pylist():
                        try:
                            url = normalize(row["url"], config)
                        except InvalidUrl:
                            continue
                        domain = registrable_domain(host_of(url))
                        page = {**row, "url": url, "final_url": row["url"], "domain": domain}
                        spill.add(shard_of(domain, len(outputs)), [page])
        for shard, output in enumerate(outputs):
            newest: dict[str, dict[str, Any]] = {}
            for (page,) in spill.read(shard):
                known = newest.get(page["url"])
                if known is None or known["fetched_at"] < page["fetched_at"]:
                    newest[page["url"]] = page
            table_rows = [newest[url] for url in sorted(newest)]
            write_table(pa.Table.from_pylist(table_rows, schema=PAGE_SCHEMA), output)
            rows += len(table_rows)
    return {"rows": rows}


@dataclass(frozen=True)
class Rescue:
    """`table`: a shard's archived pages, as `split_index` wrote them; `config`: whether their noindex is heeded."""

    table: Path
    config: FetchConfig

    def find(self, urls: Iterable[str]) -> dict[str, dict[str, Any]]:
        """URL → row of PAGE_SCHEMA, for those of `urls` that are archived."""
        pages = pq.read_table(self.table)
        wanted = pa.array(list(urls), type=pa.string())
        return {row["url"]: row for row in pages.filter(pc.is_in(pages["url"], value_set=wanted)).to_pylist()}

    def verdict(self, failed: Verdict, archived: dict[str, Any]) -> Verdict:
        """What becomes of a dead link now that an archived page of it was found: kept, or dropped, or still failed."""
        why = f"{failed.reason}: {failed.detail}"
        numbers = {**(failed.numbers or {}), "rescued": str(failed.reason)}
        place = Path(archived["warc_file"])
        try:
            response = read_response(place, archived["warc_offset"], self.config.max_page_bytes)
        except (WarcError, OSError) as e:
            detail = f"{failed.detail}; the copy in {place.name} at {archived['warc_offset']} is damaged: {e}"
            return Verdict(failed.index, failed.url, failed.state, failed.reason, detail, failed.numbers)
        if self.config.respect_noai:
            agent = self.config.user_agent
            refusal = refusal_in_headers(response.header_values, agent) or refusal_in_html(response.body, agent)
            if refusal:
                detail = f"{why}; its copy in {place.name} says {refusal}"
                return Verdict(failed.index, failed.url, DROPPED, "noindex", detail, failed.numbers)
        return Verdict(failed.index, failed.url, KEPT, None, f"{why}; rescued from {place.name}", numbers)
