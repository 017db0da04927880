"""The table of tasks: of each its data, its prompt, its metric, its protocol, its source, and what GPT-2 scored.

In: nothing. Out: `TASKS` by name, and groups of them: `table3` (the paper's zero-shot table), `reasoning` (multiple
choice), `generation`. A new task is one more `Task(...)` here and, where its rows have a shape of their own, a function
in `prompts`. Nothing heavy is imported, so settings are checked and help is given at once.

Published numbers stand in the metric's own unit: perplexities and bits as they are, accuracies as shares of 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpt2train.evaluation import prompts
from gpt2train.evaluation.detokenizers import NEWS, PTB, WIKITEXT, Style
from gpt2train.evaluation.prompts import SHOTS, Build

SIZES = ("117M", "345M", "762M", "1542M")
"""The paper's four models as it names them; counted, they have 124M, 355M, 774M and 1558M parameters."""
PAPER = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"
LLM_C = "llm.c, dev/data/hellaswag.py, OpenAI's checkpoints"

TABLE3, REASONING, GENERATION = "table3", "reasoning", "generation"


@dataclass(frozen=True)
class Published:
    """What others measured for GPT-2's four sizes (None: not told), by which metric, and where it stands."""

    metric: str
    values: tuple[float | None, float | None, float | None, float | None]
    source: str


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    group: str
    files: tuple[str, ...]
    """Usual names of the file, relative to a folder of `task_data`; the first that is there is taken."""
    metric: str
    """The one number for a table; the result has all that the protocol gives."""
    protocol: str
    source: str
    """Who made the test set."""
    hub: str = ""
    """`name::config::split` for the datasets library; empty: not on the Hub in a form that loads without code."""
    build: Build | None = None
    """Rows → items; None for a stretch of text."""
    unit: str = ""
    """Of a stretch: word, byte or character."""
    style: Style | None = None
    """Of a stretch: the tokenization to undo."""
    tail_bytes: int = 0
    """Of a stretch: only the end of a longer file is the test set."""
    max_new_tokens: int = 0
    """Above 0 the model writes."""
    stop: str = "\n"
    """Ends what the model writes."""
    top_k: int = 1
    """1: greedy."""
    answers: str = ""
    """How what was written is compared: match (exact match and F1), rouge or bleu."""
    published: tuple[Published, ...] = field(default=())

    @property
    def generates(self) -> bool:
        return self.max_new_tokens > 0


def _paper(metric: str, *values: float | None, where: str = "table 3") -> Published:
    small, medium, large, full = values
    return Published(metric, (small, medium, large, full), f"{PAPER}, {where}")


_CHOICE = (
    "zero-shot, completion likelihood; accuracy: highest log-likelihood, accuracy_norm: per character of the "
    "completion, accuracy_token_norm: per token of it"
)
_PARTIAL = "zero-shot, partial scoring: likelihood of the words after the pronoun or blank, given each reading"
_WINDOW = "one stream from <|endoftext|>, sliding window of the model's context"
_WORDS = f"{_WINDOW}; perplexity per original word and line end"

_LAMBADA_METRICS = (
    "word: all tokens of the last word, greedy, as in lm-evaluation-harness; stop words: the word's first token is "
    "sought among those that are no stop word (paper, section 3.3); last token: the last token of the passage given "
    "all before it, which reproductions of the paper's numbers found it to measure (openai/gpt-2 issue 131)"
)


def _cbt(kind: str, name: str, title: str, *accuracy: float) -> Task:
    return Task(
        name,
        title,
        TABLE3,
        (f"cbtest_{kind}_valid_2000ex.txt", f"cbtest_{kind}_test_2500ex.txt", f"cbtest_{kind}_valid.jsonl"),
        "accuracy",
        "likelihood of each of 10 choices and the rest of its sentence, given the 20 sentences before it; Penn "
        "Treebank style undone; the paper scores the validation set, since a test book is in WebText (section 3.2)",
        "Hill et al. 2016, The Goldilocks Principle",
        hub=f"cam-cst/cbt::{kind}::validation",
        build=prompts.each(prompts.cloze),
        published=(_paper("accuracy", *(a / 100 for a in accuracy)),),
    )


_TABLE3 = (
    Task(
        "lambada",
        "LAMBADA",
        TABLE3,
        ("lambada_openai.jsonl", "lambada_test.jsonl", "lambada/lambada_test.jsonl"),
        "accuracy_last_token",
        _LAMBADA_METRICS,
        "Paperno et al. 2016, in OpenAI's version with its own punctuation",
        hub="EleutherAI/lambada_openai::default::test",
        build=prompts.each(prompts.last_word),
        published=(
            _paper("perplexity_last_token", 35.13, 15.60, 10.87, 8.63),
            _paper("accuracy_last_token", 0.4599, 0.5548, 0.6012, 0.6324),
        ),
    ),
    Task(
        "lambada_plain",
        "LAMBADA, tokenized",
        "",
        ("lambada_test_plain_text.txt", "lambada/lambada_test_plain_text.txt"),
        "accuracy",
        f"LAMBADA's own lower-case file, its tokenization undone; {_LAMBADA_METRICS}",
        "Paperno et al. 2016, The LAMBADA dataset",
        build=prompts.each(prompts.plain_last_word),
    ),
    _cbt("CN", "cbt_cn", "Children's Book Test, common nouns", 87.65, 92.35, 93.45, 93.30),
    _cbt("NE", "cbt_ne", "Children's Book Test, named entities", 83.4, 87.1, 88.0, 89.05),
    Task(
        "wikitext2",
        "WikiText-2",
        TABLE3,
        (
            "wikitext-2/wiki.test.tokens",
            "wikitext-2-v1/wiki.test.tokens",
            "wikitext-2_test.txt",
            "wiki.test.tokens",
            "wikitext-2/wiki.valid.tokens",
            "wikitext-2_valid.txt",
        ),
        "perplexity",
        f"{_WORDS}; WikiText style undone",
        "Merity et al. 2016, Pointer Sentinel Mixture Models",
        unit="word",
        style=WIKITEXT,
        published=(_paper("perplexity", 29.41, 22.76, 19.93, 18.34),),
    ),
    Task(
        "ptb",
        "Penn Treebank",
        TABLE3,
        ("ptb.test.txt", "ptb/ptb.test.txt", "simple-examples/data/ptb.test.txt"),
        "perplexity",
        f"{_WORDS}; Mikolov's style undone",
        "Marcus et al. 1993, as prepared by Mikolov et al. 2010",
        unit="word",
        style=PTB,
        published=(_paper("perplexity", 65.85, 47.33, 40.31, 35.76),),
    ),
    Task(
        "enwik8",
        "enwik8",
        TABLE3,
        ("enwik8.test", "enwik8/test.txt.raw", "enwik8/enwik8", "enwik8"),
        "bits_per_byte",
        f"{_WINDOW}; the last 5,000,000 bytes as they are; bits per byte",
        "Hutter 2006, the Human Knowledge Compression Contest",
        unit="byte",
        tail_bytes=5_000_000,
        published=(_paper("bits_per_byte", 1.16, 1.01, 0.97, 0.93),),
    ),
    Task(
        "text8",
        "text8",
        TABLE3,
        ("text8.test", "text8/test.txt.raw", "text8/text8", "text8"),
        "bits_per_character",
        f"{_WINDOW}; the last 5,000,000 characters as they are; bits per character",
        "Mahoney 2011, Large Text Compression Benchmark",
        unit="character",
        tail_bytes=5_000_000,
        published=(_paper("bits_per_character", 1.17, 1.06, 1.02, 0.98),),
    ),
    Task(
        "wikitext103",
        "WikiText-103",
        TABLE3,
        (
            "wikitext-103/wiki.test.tokens",
            "wikitext-103-v1/wiki.test.tokens",
            "wikitext-103_test.txt",
            "wikitext-103/wiki.valid.tokens",
        ),
        "perplexity",
        f"{_WORDS}; WikiText style undone",
        "Merity et al. 2016, Pointer Sentinel Mixture Models",
        unit="word",
        style=WIKITEXT,
        published=(_paper("perplexity", 37.50, 26.37, 22.05, 17.48),),
    ),
    Task(
        "lm1b",
        "1 Billion Word",
        TABLE3,
        (
            "news.en.heldout-00000-of-00050",
            "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050",
            "1-billion-word-language-modeling-benchmark-r13output/heldout-monolingual.tokenized.shuffled/"
            "news.en.heldout-00000-of-00050",
        ),
        "perplexity",
        f"{_WORDS}; news style undone; its sentences are shuffled",
        "Chelba et al. 2013, One Billion Word Benchmark",
        unit="word",
        style=NEWS,
        published=(_paper("perplexity", 75.20, 55.72, 44.575, 42.16),),
    ),
)


def _choices(name: str, title: str, build: Build, files: tuple[str, ...], source: str, **more: object) -> Task:
    return Task(name, title, REASONING, files, build=build, source=source, **{"protocol": _CHOICE, **more})  # type: ignore[arg-type]


_REASONING = (
    _choices(
        "hellaswag",
        "HellaSwag",
        prompts.each(prompts.hellaswag),
        ("hellaswag_val.jsonl", "hellaswag_val_6line.txt", "hellaswag/hellaswag_val.jsonl"),
        "Zellers et al. 2019",
        metric="accuracy_token_norm",
        hub="Rowan/hellaswag::default::validation",
        published=(Published("accuracy_token_norm", (0.2945, 0.3752, 0.4320, 0.4889), LLM_C),),
    ),
    _choices(
        "winograd",
        "Winograd schemas",
        prompts.each(prompts.winograd),
        ("winograd_wsc.jsonl", "wsc273.jsonl"),
        "Levesque et al. 2012",
        metric="accuracy",
        protocol=_PARTIAL,
        published=(_paper("accuracy", None, None, None, 0.7070, where="section 3.4"),),
    ),
    _choices(
        "winogrande",
        "WinoGrande",
        prompts.each(prompts.winogrande),
        ("winogrande.jsonl", "winogrande_1.1/dev.jsonl"),
        "Sakaguchi et al. 2019",
        metric="accuracy",
        protocol=_PARTIAL,
        hub="allenai/winogrande::winogrande_xl::validation",
    ),
    _choices(
        "piqa",
        "PIQA",
        prompts.each(prompts.piqa),
        ("piqa.jsonl", "piqa/valid.jsonl", "physicaliqa-train-dev/dev.jsonl"),
        "Bisk et al. 2019",
        metric="accuracy_norm",
        hub="baber/piqa::default::validation",
    ),
    _choices(
        "arc_easy",
        "ARC, easy",
        prompts.each(prompts.arc),
        ("arc_easy.jsonl", "ARC-Easy-Test.jsonl", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl"),
        "Clark et al. 2018",
        metric="accuracy_norm",
        hub="allenai/ai2_arc::ARC-Easy::test",
    ),
    _choices(
        "arc_challenge",
        "ARC, challenge",
        prompts.each(prompts.arc),
        ("arc_challenge.jsonl", "ARC-Challenge-Test.jsonl", "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl"),
        "Clark et al. 2018",
        metric="accuracy_norm",
        hub="allenai/ai2_arc::ARC-Challenge::test",
    ),
    _choices(
        "boolq",
        "BoolQ",
        prompts.each(prompts.boolq),
        ("boolq.jsonl", "boolq/dev.jsonl", "BoolQ/val.jsonl"),
        "Clark et al. 2019",
        metric="accuracy",
        hub="google/boolq::default::validation",
    ),
    _choices(
        "copa",
        "COPA",
        prompts.each(prompts.copa),
        ("copa.jsonl", "COPA/val.jsonl"),
        "Roemmele et al. 2011",
        metric="accuracy",
    ),
    _choices(
        "openbookqa",
        "OpenBookQA",
        prompts.each(prompts.openbookqa),
        ("openbook_qa.jsonl", "openbookqa.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
        "Mihaylov et al. 2018",
        metric="accuracy_norm",
        hub="allenai/openbookqa::main::test",
    ),
)

_MATCH = "exact match and F1 after SQuAD's normalization, the best over all answers"
_TRANSLATE = (
    f'context of {SHOTS} pairs "source = target" from the head of the file, greedy, the first line; BLEU by sacrebleu'
)

_GENERATION = (
    Task(
        "summarization",
        "CNN/DailyMail",
        GENERATION,
        ("cnndm_news_summary.jsonl", "cnn_dailymail_test.jsonl"),
        "rouge_mean",
        'the article, then "TL;DR:"; 100 tokens by top-k sampling with k = 2, the first 3 sentences (section 3.6); '
        "ROUGE-1, -2 and -L (of the summary) F1 by rouge-score with stemming",
        "See et al. 2017, Hermann et al. 2015",
        hub="abisee/cnn_dailymail::3.0.0::test",
        build=prompts.each(prompts.summary),
        max_new_tokens=100,
        stop="",
        top_k=2,
        answers="rouge",
        published=(
            _paper("rouge1", None, None, None, 0.2934, where="table 4"),
            _paper("rouge2", None, None, None, 0.0827, where="table 4"),
            _paper("rougeL", None, None, None, 0.2658, where="table 4"),
            _paper("rouge_mean", None, None, None, 0.2140, where="table 4"),
        ),
    ),
    Task(
        "coqa",
        "CoQA",
        GENERATION,
        ("coqa-dev-v1.0.json", "coqa/coqa-dev-v1.0.json"),
        "f1",
        f'the document, the conversation so far, "A:", greedy, the first line (section 3.5); {_MATCH}',
        "Reddy et al. 2018",
        build=prompts.coqa,
        max_new_tokens=32,
        answers="match",
        published=(_paper("f1", None, None, None, 0.55, where="section 3.5"),),
    ),
    Task(
        "triviaqa",
        "TriviaQA",
        GENERATION,
        ("triviaqa_sm_sub.jsonl", "triviaqa.jsonl"),
        "exact_match",
        f'closed book, "Question: … Answer:", greedy, the first line; {_MATCH}',
        "Joshi et al. 2017",
        hub="mandarjoshi/trivia_qa::rc.nocontext::validation",
        build=prompts.each(prompts.trivia),
        max_new_tokens=24,
        answers="match",
    ),
    Task(
        "natural_questions",
        "Natural Questions",
        GENERATION,
        ("natural_questions.jsonl", "NQ-open.dev.jsonl"),
        "exact_match",
        f"closed book, {SHOTS} example pairs from the head of the file, greedy, the first line; {_MATCH}",
        "Kwiatkowski et al. 2019",
        hub="google-research-datasets/nq_open::nq_open::validation",
        build=prompts.natural_questions,
        max_new_tokens=24,
        answers="match",
        published=(_paper("exact_match", None, None, None, 0.041, where="section 3.8"),),
    ),
    Task(
        "translation_fr_en",
        "WMT-14 French to English",
        GENERATION,
        ("newstest2014.fr", "newstest2014.en", "wmt14_fr_en.jsonl"),
        "bleu",
        _TRANSLATE,
        "Bojar et al. 2014",
        hub="wmt/wmt14::fr-en::test",
        build=prompts.translation("fr", "en"),
        max_new_tokens=128,
        answers="bleu",
        published=(_paper("bleu", None, None, None, 11.5, where="section 3.7"),),
    ),
    Task(
        "translation_en_fr",
        "WMT-14 English to French",
        GENERATION,
        ("newstest2014.en", "newstest2014.fr", "wmt14_fr_en.jsonl"),
        "bleu",
        _TRANSLATE,
        "Bojar et al. 2014",
        hub="wmt/wmt14::fr-en::test",
        build=prompts.translation("en", "fr"),
        max_new_tokens=128,
        answers="bleu",
        published=(_paper("bleu", None, None, None, 5.0, where="section 3.7"),),
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in (*_TABLE3, *_REASONING, *_GENERATION)}
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(task.name for task in TASKS.values() if task.group == group)
    for group in (TABLE3, REASONING, GENERATION)
} | {"all": tuple(task.name for task in TASKS.values() if task.group)}


def select(names: Sequence[str]) -> list[str]:
    """Tasks by name, each once, groups spelled out. Names must be known."""
    return list(dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,))))


def faults(names: Sequence[str], field_name: str = "tasks") -> list[str]:
    """One line for each name that is neither a task nor a group."""
    found = []
    for name in names:
        if name not in TASKS and name not in GROUPS:
            near = difflib.get_close_matches(name, [*GROUPS, *TASKS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"give {', '.join([*GROUPS, *TASKS])}"
            found.append(f"{field_name}={name}: there is no such task or group; {hint}")
    return found
