"""URL list → token shards. Never imports torch, deepspeed or gpt2train.

The rooms:

    config         every setting, its default and its sentence
    bounds         what keeps settings from working
    records        the tables between stages, the errors, the ledger's vocabulary
    crawl/         URL list → responses in WARC files
    texts          text datasets → documents, for source=dataset
    clean/         responses → the documents worth keeping
    tokenizer      GPT-2 byte-pair encoding, checked by hash, without a download
    pack           documents → shuffled token shards, train and validation
    token_writer   writes the token shards of a corpus
    token_shards   the on-disk format of tokens, read by training
    lists          domains, words and URLs that a user gives by file
    forget         domains and URLs to take down → who they are in a corpus, and what is left of them
    old_corpus     another corpus, whose documents are not kept again
    layout         where each file of a corpus lies
    storage/       a corpus, or its inputs, in a bucket: s3://, gs://
    store          atomic files, hashes, markers, the lock
    executors      shard tasks on this machine's cores
    ray_executor   shard tasks on a Ray cluster
    progress       bars, rates, times to go
    tasks          one shard of one stage: files in, files out
    steps          doing the steps that do not stand
    entrances      the three ways in: URL list, WARC files, dataset
    stages         extract to tokenize: the steps that each is made of
    pipeline       the only room that knows the stages' order
    account/       what became of every URL: ledger, report, dataset card; what other thresholds would change
"""
