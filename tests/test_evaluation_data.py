"""Test sets as others publish them → items: files, formats, de-tokenizers; no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2train.evaluation import prompts, sources, tasks
from gpt2train.evaluation.asked import task_faults
from gpt2train.evaluation.detokenizers import BOOKS, NEWS, PTB, STYLES, WIKITEXT, Style, redo, undo, undo_text
from gpt2train.evaluation.items import Completions, LastWord, Question, Stretch, TaskDataError
from gpt2train.evaluation.tasks import TASKS

# -- de-tokenizers


@pytest.mark.parametrize(
    ("style", "tokenized", "natural"),
    [
        (
            WIKITEXT,
            ' The 1 @,@ 200 @-@ ton ship , 3 @.@ 5 m long ( at most ) , wasn \'t " lost " ; it cost $ 5 , or 10 % . ',
            'The 1,200-ton ship, 3.5 m long (at most), wasn\'t "lost"; it cost $5, or 10%.',
        ),
        (WIKITEXT, " = = Early life = = ", "== Early life =="),
        (WIKITEXT, " ", ""),
        (WIKITEXT, " J. R. Smith 's and the soldiers ' <unk> @-@ like song . ", None),
        (PTB, " mr. <unk> does n't own N % of the company 's $ N million ", None),
        (
            BOOKS,
            "`` Do n't go , '' said Mr. Hill -LRB- the baker 's son -RRB- ; `` it 's late ! ''",
            '"Don\'t go," said Mr. Hill (the baker\'s son); "it\'s late!"',
        ),
        (
            NEWS,
            "He said : \" We 're not sure , \" and didn 't leave .",
            "He said: \"We're not sure,\" and didn't leave.",
        ),
    ],
)
def test_known_lines_come_back(style: Style, tokenized: str, natural: str | None) -> None:
    undone = undo(tokenized, style)
    assert natural is None or undone == natural
    assert redo(undone, style) == tokenized


WORD = st.from_regex(r"[a-z]{2,8}|[A-Z][a-z]{1,7}|<unk>", fullmatch=True).filter(
    lambda word: not word.endswith(("s", "n")) and word.lower() not in {"mr", "st", "no", "op", "pp", "vs", "ed"}
)
PLURAL = st.from_regex(r"[a-z]{2,6}s", fullmatch=True)


@st.composite
def sentence(draw: st.DrawFn, style: Style) -> str:
    """Prose as people write it, with what each style parts: marks, clitics, quotes, brackets, numbers, compounds."""
    parts = []
    for kind in draw(st.lists(st.sampled_from("wwwwcnpqbh$%"), min_size=1, max_size=12)):
        word = draw(WORD)
        if kind == "c":
            word += draw(st.sampled_from(["'s", "'re", "'ll", "'ve", "'d"]))
        elif kind == "n":
            word = draw(st.sampled_from(["don't", "didn't", "wasn't", "couldn't"]))
        elif kind == "p":
            word = draw(PLURAL) + "'"
        elif kind in "qb" and style.punctuation:
            inner = " ".join(draw(st.lists(WORD, min_size=1, max_size=3)))
            word = f'"{inner}"' if kind == "q" else f"({inner})"
        elif kind == "h" and style.escapes:
            word = draw(st.sampled_from([f"{word}-{draw(WORD)}", "1,234", "3.25", "1,234.5-ton"]))
        elif kind == "$":
            word = "$" + draw(st.sampled_from(["N", "7"]))
        elif kind == "%":
            word = draw(st.sampled_from(["N%", "12%"]))
        if style.punctuation and kind in "wcb" and draw(st.booleans()):
            word += draw(st.sampled_from([",", ";", ":", "!", "?"]))
        parts.append(word)
    end = draw(st.sampled_from([".", "!", "?", '."'])) if style.punctuation else ""
    if end == '."':
        parts[0] = '"' + parts[0].replace('"', "")
        parts = [parts[0], *(part.replace('"', "") for part in parts[1:])]
    if style.punctuation and parts[-1].endswith((",", ";", ":", "!", "?", "'")):
        parts.append("here")
    return " ".join(parts) + end


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_a_tokenizer_did_is_undone(style: Style, data: st.DataObject) -> None:
    """Text → the style's tokens → text, and the tokens again: both ways exact."""
    text = data.draw(sentence(style))
    tokenized = redo(text, style)
    assert undo(tokenized, style) == text
    assert redo(undo(tokenized, style), style) == tokenized


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
@settings(max_examples=150, deadline=None)
@given(line=st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=80))
def test_no_letter_is_lost_of_any_line(style: Style, line: str) -> None:
    """Whatever the line, only spaces and the style's own signs change."""

    def letters(text: str) -> str:
        for token, sign in [("@-@", "-"), ("@,@", ","), ("@.@", "."), ("``", '"'), ("''", '"')]:
            text = text.replace(token, sign)
        for token, sign in zip(["-LRB-", "-RRB-", "-LSB-", "-RSB-", "-LCB-", "-RCB-"], "()[]{}", strict=True):
            text = text.replace(token, sign)
        return text.replace(" ", "")

    assert letters(undo(line, style)) == letters(line)


def test_wikitext_2_comes_back(shared: Path) -> None:
    """Merity et al. 2016, table 1: 217,646 tokens of validation; nearly all of its lines survive both ways."""
    test_set = sources.read(TASKS["wikitext2"], shared / "lm" / "wikitext-2_valid.txt")
    (stretch,) = test_set.items
    assert isinstance(stretch, Stretch)
    assert stretch.units == 217_646
    assert stretch.restored_lines > 0.98
    assert " @-@ " not in stretch.text
    assert " , " not in stretch.text


def test_the_share_of_restored_lines_is_told() -> None:
    text = " A line . \n Structures Ltd . The firm . \n \n"  # the dot of Ltd. was parted here, which no rule can know
    undone, restored = undo_text(text, WIKITEXT)
    assert undone == "A line.\nStructures Ltd. The firm.\n\n"
    assert restored == 0.5


# -- files

COUNTS = {
    "lambada": 500,
    "hellaswag": 1000,
    "winograd": 73,
    "winogrande": 267,
    "piqa": 338,
    "arc_easy": 376,
    "arc_challenge": 172,
    "boolq": 270,
    "copa": 20,
    "openbookqa": 100,
    "summarization": 40,
    "triviaqa": 500,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_files_are_read(shared: Path, name: str) -> None:
    found = sources.find(TASKS[name], [str(shared / "eval")])
    assert isinstance(found, Path)
    test_set = sources.read(TASKS[name], found)
    assert len(test_set.items) == COUNTS[name]
    assert test_set.sha256 == hashlib.sha256(found.read_bytes()).hexdigest()
    for item in test_set.items:
        if isinstance(item, Completions):
            assert 0 <= item.gold < len(item.pairs) >= 2
            assert all(context.strip() == context and text.startswith(" ") for context, text in item.pairs)
        elif isinstance(item, LastWord):
            assert item.word.startswith(" ")
            assert " " not in item.word[1:]
        else:
            assert isinstance(item, Question)
            assert item.answers


def read(name: str, path: Path) -> list:
    found = sources.find(TASKS[name], [str(path.parent)])
    assert found == path
    return sources.read(TASKS[name], found).items


def test_childrens_book_test(tmp_path: Path) -> None:
    lines = [f"{i} Sentence {i} , `` it '' is ." for i in range(1, 21)]
    options = "dog|cat|hen|ox|ewe|ant|bee|fly|cow|owl"
    lines.append(f"21 The XXXXX did n't see -LRB- it -RRB- .\tcat\t\t{options}")
    path = tmp_path / "cbtest_CN_valid_2000ex.txt"
    path.write_text("\n".join(lines) + "\n\n" + "\n".join(lines) + "\n\n")
    first, second = read("cbt_cn", path)
    assert first == second
    assert len(first.pairs) == 10
    context, continuation = first.pairs[first.gold]
    assert context.startswith('Sentence 1, "it" is. Sentence 2, "it" is.')
    assert context.endswith('Sentence 20, "it" is. The')
    assert continuation == " cat didn't see (it)."


def test_the_end_of_enwik8_is_the_test_set(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes(b"x" * 1000 + b"y" * 5_000_000)
    (stretch,) = read("enwik8", path)
    assert (set(stretch.text), stretch.units) == ({"y"}, 5_000_000)
    path.write_text("é" * 10, encoding="utf-8")
    assert read("enwik8", path)[0].units == 20
    (tmp_path / "text8").write_text("a cat " * 10)
    assert read("text8", tmp_path / "text8")[0].units == 60


def test_words_and_line_ends_are_the_units(tmp_path: Path) -> None:
    path = tmp_path / "ptb.test.txt"
    path.write_text(" no it was n't black monday \n but while <unk> fell \n")
    (stretch,) = read("ptb", path)
    assert stretch.text == "no it wasn't black monday\nbut while <unk> fell\n"
    assert stretch.units == 6 + 4 + 2
    assert stretch.restored_lines == 1.0


ROWS = {
    "lambada": ({"text": "one two three"}, {"context": "one two", "continuation": "three"}),
    "piqa": (
        {"goal": "dresser", "sol1": "a b", "sol2": "c d", "label": 1},
        {"query": "Question: dresser\n", "choices": ["a b", "c d"], "gold": 1},
    ),
    "arc_easy": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"query": "Question: Why?", "choices": ["x", "y"], "gold": 1},
        {
            "question": {"stem": "Why?", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
            "answerKey": "2",
        },
    ),
    "openbookqa": (
        {"question_stem": "Cats", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        {"query": "Cats", "choices": ["x", "y"], "gold": 0},
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        {"query": "P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "P.", "question": "is it", "label": 1},
    ),
    "copa": (
        {"premise": "It rained.", "choice1": "We left.", "choice2": "I sang.", "question": "effect", "label": 0},
        {"query": "It rained therefore", "choices": ["we left.", "i sang."], "gold": 0},
    ),
    "winogrande": (
        {"sentence": "Ann paid Bo so _ was glad.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"context_options": ["Ann paid Bo so Ann", "Ann paid Bo so Bo"], "continuation": "was glad.", "gold": 1},
    ),
    "winograd": (
        {
            "text": "The cup fell off the shelf because it was full.",
            "pronoun": "it",
            "pronoun_loc": 35,
            "options": ["The cup", "The shelf"],
            "label": 1,
        },
        {
            "context_options": [f"The cup fell off the shelf because {x}" for x in ("the cup", "the shelf")],
            "continuation": "was full.",
            "gold": 1,
        },
    ),
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "endings": ["naps [step] well.", "stands."],
            "label": "0",
        },
        {"query": "Roof: A man sits. He", "choices": ["naps well.", "stands."], "gold": 0},
    ),
    "triviaqa": (
        {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Anne", "Ann"]}},
        {"context": "Question: Who?\nAnswer:", "answer": "Ann", "aliases": ["Anne"]},
    ),
    "summarization": (
        {"article": "It rained.", "highlights": "Rain"},
        {"prompt": "Summarise the article:\n\nIt rained.\n", "completion": "Rain<|endoftext|>"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_all_shapes_of_a_row_are_one_item(name: str) -> None:
    build = TASKS[name].build
    assert build is not None
    items = {build([row])[0] for row in ROWS[name]}
    assert len(items) == 1, items


def test_examples_stand_before_a_question(tmp_path: Path) -> None:
    pairs = [{"question": f"q{i}", "answer": [f"a{i}", "b"]} for i in range(7)]
    (tmp_path / "natural_questions.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    items = read("natural_questions", tmp_path / "natural_questions.jsonl")
    assert [item.answers for item in items] == [("a5", "b"), ("a6", "b")]
    assert items[0].prompt == "".join(f"Q: q{i}\nA: a{i}\n\n" for i in range(5)) + "Q: q5\nA:"


def test_translation_from_two_files(tmp_path: Path) -> None:
    (tmp_path / "newstest2014.fr").write_text("".join(f"fr {i}\n" for i in range(7)))
    (tmp_path / "newstest2014.en").write_text("".join(f"en {i}\n" for i in range(7)))
    items = read("translation_fr_en", tmp_path / "newstest2014.fr")
    assert items[1].prompt.endswith("fr 4 = en 4\nfr 6 =")
    assert items[1].answers == ("en 6",)
    assert read("translation_en_fr", tmp_path / "newstest2014.en")[0].answers == ("fr 5",)
    (tmp_path / "newstest2014.en").write_text("en\n")
    with pytest.raises(TaskDataError, match=r"unequal numbers of lines, \{'en': 1, 'fr': 7\}"):
        read("translation_fr_en", tmp_path / "newstest2014.fr")


def test_a_conversation_is_one_question_a_turn() -> None:
    row = {
        "story": "Once.",
        "questions": [{"input_text": "Who?"}, {"input_text": "Where?"}],
        "answers": [{"input_text": "Ann"}, {"input_text": "here"}],
        "additional_answers": {"0": [{"input_text": "Anne"}, {"input_text": "home"}]},
    }
    first, second = prompts.coqa([row])
    assert (first.prompt, first.answers) == ("Once.\n\nQ: Who?\nA:", ("Ann", "Anne"))
    assert (second.prompt, second.answers) == ("Once.\n\nQ: Who?\nA: Ann\nQ: Where?\nA:", ("here", "home"))


def test_labels_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}, {"goal": "h", "sol1": "c", "sol2": "d"}]
    (tmp_path / "piqa" / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "piqa" / "valid-labels.lst").write_text("1\n0\n")
    found = sources.find(TASKS["piqa"], [str(tmp_path)])
    assert found == tmp_path / "piqa" / "valid.jsonl"
    assert [item.gold for item in sources.read(TASKS["piqa"], found).items] == [1, 0]


def test_the_datasets_library_is_a_source_too(tmp_path: Path) -> None:
    """By the library's own loader, from a folder of this machine instead of the Hub."""
    rows = [{"text": "one two three"}, {"text": "four five six"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = dataclasses.replace(TASKS["lambada"], hub=f"{tmp_path / 'set'}::::test")
    assert sources.find(task, [str(tmp_path), "hub"]) == "hub"
    items = sources.read(task, "hub").items
    assert items == [LastWord("one two", " three"), LastWord("four five", " six")]
    gone = dataclasses.replace(task, hub=f"{tmp_path / 'none'}::::test")
    with pytest.raises(TaskDataError, match=r"cannot be loaded .*; fetch the file and name its folder in task_data"):
        sources.read(gone, "hub")


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("lambada", "lambada_test.jsonl", '{"text": "a b"}\n{"text"', r"line 2: no JSON \(.*\); mend the line"),
        ("lambada", "lambada_test.jsonl", '{"words": "a b"}', r"KeyError: 'context'.* the first has the fields words"),
        ("lambada", "lambada_test.jsonl", "\n", "holds no item"),
        ("hellaswag", "hellaswag_val_6line.txt", "one\n2\n", "2 lines are no multiple of six"),
        ("ptb", "ptb.test.txt", " \n", "holds no text"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, file: str, content: str, said: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(TaskDataError, match=said) as caught:
        sources.read(TASKS[name], tmp_path / file)
    assert str(tmp_path / file) in str(caught.value)
    assert caught.value.exit_code == 2


# -- what is asked for


def test_groups_and_names() -> None:
    assert tasks.select(["lambada", "table3"])[:2] == ["lambada", "cbt_cn"]
    assert len(tasks.select(["table3"])) == 9
    assert len(tasks.select(["reasoning"])) == 9
    paper = [p for name in tasks.select(["table3"]) for p in TASKS[name].published]
    assert [p.values for p in paper if p.metric == "bits_per_byte"] == [(1.16, 1.01, 0.97, 0.93)]
    for task in TASKS.values():
        assert all((task.protocol, task.source, task.files))
        assert all(p.metric and p.source for p in task.published)


def test_all_faults_of_tasks_are_told(tmp_path: Path) -> None:
    assert task_faults(["lambda", "table4"], [], "tasks", "task_data", writing=True) == [
        "tasks=lambda: there is no such task or group; did you mean lambada?",
        "tasks=table4: there is no such task or group; did you mean table3?",
    ]
    (fault,) = task_faults(["piqa"], [str(tmp_path)], "tasks", "task_data", writing=True)
    assert fault.startswith("tasks=piqa: no folder of task_data holds piqa.jsonl or ")
    assert fault.endswith("give its folder, or `hub`")
    (fault,) = task_faults(["reasoning"], [str(tmp_path)], "tasks", "task_data", writing=True)
    assert fault.startswith("tasks=reasoning: no folder of task_data holds a file of its tasks")
    (fault,) = task_faults(["triviaqa"], ["hub"], "evaluate.tasks", "evaluate.task_data", writing=False)
    assert fault.startswith("evaluate.tasks=triviaqa: writes text; measure it with `gpt2train evaluate`")
    (fault,) = task_faults([], [str(tmp_path / "none")], "tasks", "task_data", writing=True)
    assert "there is no such folder" in fault
    assert task_faults(["table3"], ["hub"], "tasks", "task_data", writing=True) == []


def test_tasks_are_known_without_torch() -> None:
    code = (
        "import sys, gpt2train.evaluation.asked;"
        "print(sorted({'torch', 'datasets', 'numpy', 'pyarrow', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
