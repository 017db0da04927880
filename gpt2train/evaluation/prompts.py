"""Rows of published test sets → items, in the words that each task's protocol gives the model.

In: dictionaries as the files or the Hub hold them; a test set comes in several shapes, and each function takes those
that are about. Out: items. A row that lacks a field raises KeyError, which `sources` turns into a line with file and
row number.

Multiple choice follows the prompts of EleutherAI's lm-evaluation-harness 0.4 (lm_eval/tasks/*/*.yaml), so that
numbers compare; generation follows the paper (Radford et al. 2019, sections 3.5 to 3.8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt2train.evaluation.detokenizers import BOOKS, undo
from gpt2train.evaluation.items import Completions, Item, LastWord, Question

Row = Mapping[str, Any]
Build = Callable[[Sequence[Row]], list[Item]]

BLANK = "XXXXX"
"""The missing word of a Children's Book Test query."""
SHOTS = 5
"""Example pairs before a question or a translation; the paper gives none, saying only that there were some."""


def each(row_to_item: Callable[[Row], Item]) -> Build:
    """Row by row."""
    return lambda rows: [row_to_item(row) for row in rows]


# ------------------------------------------------------------------------------------------------------- likelihood


def last_word(row: Row) -> LastWord:
    """{context, continuation}, or {text}, whose last word it is."""
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
    else:
        context, word = row["context"], row["continuation"].strip()
    return LastWord(context, f" {word}")


def plain_last_word(row: Row) -> LastWord:
    """{text} in LAMBADA's own tokenization, which is undone first."""
    return last_word({"text": undo(row["text"], BOOKS)})


def cloze(row: Row) -> Completions:
    """Children's Book Test: each choice with the rest of its sentence (section 3.2). {sentences, question, answer,
    options}; the Penn Treebank style is undone."""
    story = " ".join(undo(sentence, BOOKS) for sentence in row["sentences"])
    before, _, after = undo(row["question"], BOOKS).partition(BLANK)
    space = " " if before.endswith(" ") or not before else ""
    context = f"{story} {before}".rstrip(" ")
    options = list(row["options"])
    return Completions(tuple((context, f"{space}{option}{after}") for option in options), options.index(row["answer"]))


def _ready(row: Row, cue: str = "") -> Completions | None:
    """{query, choices, gold}: a row whose question is already put in words, all but the `cue` before the answer."""
    if "query" not in row:
        return None
    query = row["query"].rstrip("\n") + cue
    return Completions(tuple((query, f" {choice}") for choice in row["choices"]), int(row["gold"]))


def hellaswag(row: Row) -> Completions:
    """{ctx_a, ctx_b, activity_label, endings, label}, or ready {query, choices, gold}."""
    if ready := _ready(row):
        return ready
    context = _without_wikihow_signs(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = tuple((context, f" {_without_wikihow_signs(ending)}") for ending in row["endings"])
    return Completions(endings, int(row["label"]))


def _without_wikihow_signs(text: str) -> str:
    """Parts of HellaSwag come from WikiHow with headings in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def piqa(row: Row) -> Completions:
    """{goal, sol1, sol2, label}."""
    if ready := _ready(row, "\nAnswer:"):
        return ready
    context = f"Question: {row['goal']}\nAnswer:"
    return Completions(((context, f" {row['sol1']}"), (context, f" {row['sol2']}")), int(row["label"]))


def arc(row: Row) -> Completions:
    """{question, choices: {text, label}, answerKey}, or AI2's own {question: {stem, choices: [{text, label}]}, …}."""
    if ready := _ready(row, "\nAnswer:"):
        return ready
    question, choices = row["question"], row.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    texts, labels = _choices(choices)
    context = f"Question: {question}\nAnswer:"
    return Completions(tuple((context, f" {text}") for text in texts), labels.index(row["answerKey"]))


def openbookqa(row: Row) -> Completions:
    """{question_stem, choices, answerKey}, or AI2's own {question: {stem, choices}, answerKey}."""
    if ready := _ready(row):
        return ready
    stem, choices = row.get("question_stem"), row.get("choices")
    if stem is None:
        stem, choices = row["question"]["stem"], row["question"]["choices"]
    texts, labels = _choices(choices)
    return Completions(tuple((stem, f" {text}") for text in texts), labels.index(row["answerKey"].strip()))


def _choices(choices: Any) -> tuple[list[str], list[str]]:
    """Texts and labels, of a mapping of lists or a list of mappings."""
    if isinstance(choices, Mapping):
        return list(choices["text"]), list(choices["label"])
    return [choice["text"] for choice in choices], [choice["label"] for choice in choices]


def boolq(row: Row) -> Completions:
    """{passage, question, answer or label}: yes or no."""
    if ready := _ready(row, "\nAnswer:"):
        return ready
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    gold = row["label"] if "label" in row else row["answer"]
    return Completions(((context, " no"), (context, " yes")), int(gold))


def copa(row: Row) -> Completions:
    """{premise, choice1, choice2, question: cause or effect, label}."""
    if ready := _ready(row):
        return ready
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    context = f"{row['premise'].strip()[:-1]} {connector}"
    choices = (row["choice1"], row["choice2"])
    pairs = tuple((context, f" {choice[:1].lower()}{choice[1:]}") for choice in choices)
    return Completions(pairs, int(row["label"]))


def winograd(row: Row) -> Completions:
    """Partial scoring: the words after the pronoun, given each of its readings (Trinh and Le 2018, section 3.1).

    {context_options, continuation, gold}, or {text, pronoun, pronoun_loc, options, label}.
    """
    if "context_options" in row:
        return _partial(row)
    start = int(row["pronoun_loc"])
    before, after = row["text"][:start], row["text"][start + len(row["pronoun"]) :]
    pairs = tuple((before + _within_sentence(option, before), after) for option in row["options"])
    return Completions(pairs, int(row["label"]))


def _within_sentence(option: str, before: str) -> str:
    """A reading's article loses its capital where the reading does not open the sentence."""
    first, space, rest = option.partition(" ")
    small = first in ("The", "A", "An", "My", "His", "Her", "Their", "Our", "Your")
    return f"{first.lower()}{space}{rest}" if small and before.strip() and before.rstrip()[-1] not in ".!?" else option


def winogrande(row: Row) -> Completions:
    """{sentence with _, option1, option2, answer: 1 or 2}; partial scoring as for Winograd's schemas."""
    if "context_options" in row:
        return _partial(row)
    before, _, after = row["sentence"].partition("_")
    pairs = tuple((before + row[name], f" {after.strip()}") for name in ("option1", "option2"))
    return Completions(pairs, int(row["answer"]) - 1)


def _partial(row: Row) -> Completions:
    return Completions(
        tuple((context, f" {row['continuation']}") for context in row["context_options"]), int(row["gold"])
    )


# ------------------------------------------------------------------------------------------------------- generation


def trivia(row: Row) -> Question:
    """{context ending in "Answer:", answer, aliases}, or TriviaQA's own {question, answer: {value, aliases}}."""
    if "context" in row:
        return Question(row["context"], "", _unique([row["answer"], *row["aliases"]]))
    answer = row["answer"]
    names = [answer["value"], *answer.get("aliases", ())] if isinstance(answer, Mapping) else _listed(answer)
    return Question(f"Question: {row['question']}\nAnswer:", "", _unique(names))


def natural_questions(rows: Sequence[Row]) -> list[Item]:
    """{question, answer: text or list}; the first `SHOTS` rows are the examples before every other (section 3.8)."""
    pairs = [(row["question"].strip(), _listed(row["answer"])) for row in rows]
    shots = "".join(f"Q: {question}\nA: {answers[0]}\n\n" for question, answers in pairs[:SHOTS])
    return [Question(f"{shots}Q: {question}\nA:", "", _unique(answers)) for question, answers in pairs[SHOTS:]]


def coqa(rows: Sequence[Row]) -> list[Item]:
    """CoQA's stories: the document, the conversation so far, and "A:" (section 3.5)."""
    items: list[Item] = []
    for row in rows:
        talk = f"{row['story']}\n\n"
        more = row.get("additional_answers", {})
        for turn, (asked, said) in enumerate(zip(row["questions"], row["answers"], strict=True)):
            others = [answers[turn]["input_text"] for answers in more.values()]
            talk += f"Q: {asked['input_text']}\nA:"
            items.append(Question(talk, "", _unique([said["input_text"], *others])))
            talk += f" {said['input_text']}\n"
    return items


def summary(row: Row) -> Question:
    """{article, highlights}, or {prompt, completion}: the article, then "TL;DR:" (section 3.6)."""
    if "article" in row:
        article, highlights = row["article"], row["highlights"]
    else:
        article = row["prompt"].strip().removeprefix("Summarise the article:")
        highlights = row["completion"].removesuffix("<|endoftext|>")
    return Question(article.strip(), "\nTL;DR:", (highlights.strip(),), cut_end=True)


def translation(source: str, target: str) -> Build:
    """Rows of {source: …, target: …} by language code, also below `translation`: "english = french" (section 3.7).

    The first `SHOTS` rows are the examples before every other.
    """

    def build(rows: Sequence[Row]) -> list[Item]:
        pairs = [row.get("translation", row) for row in rows]
        lines = [(pair[source].strip(), pair[target].strip()) for pair in pairs]
        shots = "".join(f"{a} = {b}\n" for a, b in lines[:SHOTS])
        return [Question(f"{shots}{a} =", "", (b,)) for a, b in lines[SHOTS:]]

    return build


def _listed(answer: Any) -> list[str]:
    return [answer] if isinstance(answer, str) else list(answer)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
