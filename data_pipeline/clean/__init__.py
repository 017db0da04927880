"""Responses → the documents worth keeping: text, language, quality, duplicates, contamination.

The rooms:

    extract        HTML → text, in a process that can be killed
    html_text      one page's bytes → clean text: what extract's process runs
    main_content   a parsed page → its main text, where resiliparse's is as good as trafilatura's
    metadata       a parsed page → its title, author and date, by trafilatura's functions for these alone
    first_look     which pages are surely in another language, before extraction
    language       which language a text is in
    quality        rules of Gopher, C4, FineWeb and OpenWebText → kept, or dropped with a reason
    dedup          exact and near duplicates; the best of a cluster stays
    bands          the join of duplicates in parts, one a band, for more documents than one task should hold
    planting       known near-duplicates → recall and precision of this very run
    personal       e-mail, IP and telephone numbers in texts → examples that belong to nobody
    ngrams         words → 64-bit hashes of n-grams, by a fixed, versioned function
    contamination  n-grams of evaluation sets in the corpus
    spans          known n-grams → cut out of a text, in linear time
"""
