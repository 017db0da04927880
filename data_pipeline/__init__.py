"""URL list → token shards. Never imports torch, deepspeed or gpt2train.

The rooms, in the order the data flows:

    config         every setting, its default and its sentence
    records        the tables between stages, the errors, the ledger's vocabulary
    urls           URL lists → normalized, blocked, unique URLs, in shards by registrable domain
    url_syntax     one URL: its normal form, its registrable domain, its shard
    addresses      which address may be connected to; the connector that enforces it
    robots         robots.txt by RFC 9309
    fetch          URLs → responses in WARC files, politely and safely; each URL in one typed state
    scheduler      when each host has its turn, and what becomes of each URL
    fetch_queue    shards read bit by bit, and the queue of each host
    fetch_journal  what is decided so far, on disk, so that kill -9 loses nothing
    robots_cache   robots.txt of each origin, fetched once
    http_get       one HTTP request, bounded in every direction
    page_rules     which responses are pages
    http_body      codings undone within a bound; is it HTML?
    warc           writing WARC records; reading responses back, by offset or all of a file
    warc_records   records of any WARC or ARC file, whole or broken
    extract        HTML → text, in a process that can be killed
    html_text      one page's bytes → clean text: what extract's process runs
    language       which language a text is in
    quality        rules of Gopher, C4, FineWeb and OpenWebText → kept, or dropped with a reason
    dedup          exact and near duplicates; the best of a cluster stays
    ngrams         words → 64-bit hashes of n-grams, by a fixed, versioned function
    contamination  n-grams of evaluation sets in the corpus
    tokenizer      GPT-2 byte-pair encoding, checked by hash, without a download
    pack           documents → shuffled token shards, train and validation
    token_shards   the on-disk format of tokens: written here, read by training
    texts          text datasets → documents, for source=dataset
    layout         where each file of a corpus lies
    store          atomic files, hashes, markers, the lock
    executors      shard tasks on this machine's cores
    ledger         one row a URL; totals that must add up
    report         summary → one HTML file
    card           the dataset card
    why            what became of a URL
    progress       bars, rates, times to go
    tasks          one shard of one stage: files in, files out
    pipeline       the only room that knows the stages' order
"""
