"""URL list → responses in WARC files, politely and safely; every URL in one typed state.

The rooms, in the order a URL meets them, helpers last:

    urls           URL lists → normalized, blocked, unique URLs, in shards by registrable domain
    cc_index       Common Crawl's index lines as rows of a URL list
    spill          rows on their way to their shards, on disk
    url_syntax     one URL: its normal form, its registrable domain, its shard
    addresses      which address may be connected to; the connector that enforces it
    robots         robots.txt by RFC 9309
    fetch          the stage: shards of URLs → WARC files, a journal, pages and verdicts
    scheduler      when each host has its turn, and what becomes of each URL
    lanes          how many requests are under way, fast and slow
    shared_turns   turns of hosts that several processes may ask
    tail           what the end waits for: the hosts with the most left
    decision       one URL's end, as it is journaled and archived
    fetch_queue    shards read bit by bit, and the queue of each host
    fetch_journal  what is decided so far, on disk, so that kill -9 loses nothing
    retry          rounds that open failed URLs again
    earlier        the pages of an earlier corpus, asked for only if changed
    rescue         dead links, looked up in WARC files at hand
    robots_cache   robots.txt of each origin, fetched once
    http/          one GET request, bounded in every direction
    page_rules     which responses are pages
    warc           writing WARC records; reading responses back, by offset or all of a file
    warc_records   records of any WARC or ARC file, whole or broken
"""
