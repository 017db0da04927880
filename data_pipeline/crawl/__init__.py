"""URL list → responses in WARC files, politely and safely; every URL in one typed state.

urls           URL lists → normalized, blocked, unique URLs, in shards by registrable domain
url_syntax     one URL: its normal form, its registrable domain, its shard
addresses      which address may be connected to; the connector that enforces it
robots         robots.txt by RFC 9309
fetch          the stage: shards of URLs → WARC files, a journal, pages and verdicts
scheduler      when each host has its turn, and what becomes of each URL
fetch_queue    shards read bit by bit, and the queue of each host
fetch_journal  what is decided so far, on disk, so that kill -9 loses nothing
robots_cache   robots.txt of each origin, fetched once
http_get       one HTTP request, bounded in every direction
page_rules     which responses are pages
http_body      codings undone within a bound; is it HTML?
warc           writing WARC records; reading responses back, by offset or all of a file
warc_records   records of any WARC or ARC file, whole or broken
"""
