"""A model and test sets → the paper's zero-shot table, and more of its kind.

The rooms, in the order of the data:

    config         the settings of `evaluate`, and their bounds
    items          the four things that a test set may ask
    detokenizers   test sets' own tokenization ↔ text as people write it
    prompts        rows of published test sets → items, in each task's words
    tasks          the table of tasks: data, prompt, metric, protocol, source, GPT-2's own scores
    sources        where a test set lies: files under usual names, or the Hub
    asked          what keeps tasks that are asked for from being measured
    stop_words     function words, for LAMBADA's filter
    likelihood     token sequences → how likely a model finds their ends, in batches by length
    writing        prompts → what a model writes, many at a time
    work           batches over ranks, kept as they come
    metrics        what was measured item by item → scores with their errors
    measure        one task: prepare, measure, record
    contamination  what share of a test set's 8-grams the model was trained on
    harness        lm-evaluation-harness through its own interface
    during         tasks while a model trains
    suite          all tasks that a command asks for → evaluation.json
    table          records beside GPT-2's four sizes

A new task is a declaration in `tasks`. Up to `asked` nothing imports torch.
"""
