"""Token shards → a trained, evaluated, exported GPT-2.

The rooms, in the order a run meets them:

    config      the settings of training; each wing has those of its own commands
    errors      what ends a command with a clear line, and its exit code
    bounds      what keeps settings from working
    compose     Hydra groups and overrides → a checked dataclass; all faults at once
    run_folder  what lies where in a run's folder
    data        token shards → the batch of a step, from seed and step alone
    model       GPT-2 in plain PyTorch, and what has been learned since, by switches
    mup         how initial values, learning rates and multipliers follow the width
    network/    attention and the loss, its parts
    optim       parameter groups, the learning-rate schedule
    optimizers/ Muon, and how the ranks share its work
    distributed the run's processes: how they agree, and how a run ends when one does not answer
    engine      the one place that makes DeepSpeed's dictionary and starts it
    checkpoint  safetensors by parameter name: written beside, verified, published by a rename
    metrics     metrics.jsonl, the terminal line, Weights & Biases, TensorBoard
    faults      steps not to be trusted: skip, rewind or stop
    observe     norms by layer, a sample text, a profile of some steps
    claim       owning and opening a run folder: its lock, its identity, what it refuses
    train       the loop
    evaluate    validation loss, perplexity of texts, the command
    evaluation/ the paper's zero-shot tasks: test sets, likelihood, scores
    trace       a step → the documents it saw; a URL → the steps that saw it
    report      a run → one HTML file
    charts      pictures of curves, for both
    saving/     checkpoints beside the training, and to other storage
    generation/ sampling, hidden states, a local page and endpoint
    release/    Hugging Face format both ways, the model card
    planning/   memory, speed and cost before a run; scaling laws after several
    commands/   the table of commands, help and completion, commands that join packages
    cli         the command line

From data_pipeline only `token_shards` and `tokenizer` are imported (commands/joined aside, evaluation/contamination,
release/audit and saving/bucket, whose work must be the same on both sides); deepspeed only in engine and checkpoint.
"""
