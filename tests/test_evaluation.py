"""`evaluate` as a command: its record, ranks, kills, contamination, reports; and tasks while a model trains."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import training
from evaluations import (  # noqa: F401 (fixtures)
    ALONE,
    SEEN,
    TINY,
    UNSEEN,
    data_fixture,
    eight_grams,
    lively,
    plain_nats,
    read_evaluation,
    run_fixture,
    write_shards,
)
from safetensors.torch import save_file
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.config import ModelConfig
from gpt2train.distributed import World
from gpt2train.errors import ConfigError, NonFiniteError
from gpt2train.evaluate import evaluate
from gpt2train.evaluation import contamination, likelihood, measure, sources, suite, tasks, writing
from gpt2train.evaluation.config import EvaluateCommandConfig
from gpt2train.evaluation.items import LastWord
from gpt2train.evaluation.tasks import TASKS
from gpt2train.evaluation.work import shared_out
from gpt2train.evaluation.writing import Writing
from gpt2train.model import GPT
from gpt2train.release.card import model_card
from gpt2train.release.hf import hf_config, to_hf_state
from gpt2train.report import report

# -- work that is shared out, and killed


def _blocking_work(folder: str, stop_after: int) -> None:
    done = []

    def work(i: int) -> np.ndarray:
        if len(done) == stop_after:
            multiprocessing.Event().wait()  # until it is killed
        done.append(i)
        return np.full((2, 3), i / 7)

    shared_out(work, [2] * 9, 3, world=ALONE, folder=Path(folder), key="k")


def test_work_that_was_killed_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_blocking_work, args=(str(tmp_path), 4))
    process.start()
    journal = tmp_path / "rank_0.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    with open(journal, "ab") as file:
        file.write(b'{"batch": 4, "rows": [[')  # as a crash in the middle of a line leaves it
    again: list[int] = []

    def work(i: int) -> np.ndarray:
        again.append(i)
        return np.full((2, 3), i / 7)

    rows = shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="k")
    assert again == [4, 5, 6, 7, 8]
    assert np.array_equal(np.concatenate(rows)[:, 0], np.repeat(np.arange(9) / 7, 2))
    again.clear()
    shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="k")
    assert again == []
    shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="other")
    assert again == list(range(9)), "results of other work count for nothing"


def _rank(rank: int, world_size: int, store: str, out: str, run: str, data: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used: the ranks meet at the file
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, torch.device("cpu"))
    made: list[int] = []

    def work(i: int) -> np.ndarray:
        made.append(i)
        return np.array([[i / 3, rank]])

    rows = shared_out(work, [1] * 5, 2, world=world, folder=Path(out), key="k")
    Path(out, f"{rank}.json").write_text(json.dumps([made, np.concatenate(rows).tolist()]))
    assert evaluate(of_all_kinds(run, data, f"{out}/ours")) == 0
    torch.distributed.destroy_process_group()


def of_all_kinds(run: str, data: str, out: str) -> EvaluateCommandConfig:
    return EvaluateCommandConfig(
        run=run, tasks=["lambada", "ptb", "openbookqa", "triviaqa"], task_data=[data], stride=16, batch=1, out=out
    )


def _words() -> sources.TestSet:
    items = [LastWord(f"Text {i} of the {'very ' * (i % 7)}small", f" number{i}") for i in range(40)]
    return sources.TestSet(list(items), "words", "")


def test_two_ranks_share_the_work_and_agree_with_one(run: Path, data: Path, tmp_path: Path) -> None:
    """Batches in turn, one of them done before; and the whole command writes what one process writes, bit for bit."""
    (tmp_path / "rank_7.jsonl").write_text('{"key": "k"}\n{"batch": 2, "rows": [[0.5, 9]]}\n')
    arguments = (2, str(tmp_path / "store"), str(tmp_path), str(run), str(data))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
    (made_0, rows_0), (made_1, rows_1) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert (made_0, made_1) == ([0, 3], [1, 4])
    assert rows_0 == rows_1 == [[0, 0], [1 / 3, 1], [0.5, 9], [1, 0], [4 / 3, 1]]
    assert evaluate(of_all_kinds(str(run), str(data), str(tmp_path / "alone"))) == 0
    ours, alone = read_evaluation(tmp_path / "ours"), read_evaluation(tmp_path / "alone")
    assert ours == alone
    assert all("contamination" in record for record in ours["tasks"])


def test_a_model_that_diverged_is_told() -> None:
    model = lively()
    with torch.no_grad():
        model.ln_f.weight.fill_(math.nan)
    prepared = measure.prepare(TASKS["lambada"], _words(), load_tokenizer(), TINY, stride=64, budget=256)
    with pytest.raises(NonFiniteError, match="lambada: the model's log-likelihoods are not finite"):
        measure.measure(prepared, suite.subject(model, EvaluateCommandConfig().precision), load_tokenizer())
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        writing.write(model, [np.array([1], np.uint16)], Writing(2, (), 1), load_tokenizer())


# -- contamination


@pytest.mark.parametrize("block_tokens", [7, 50, 1 << 20])
def test_overlap_is_counted_exactly(tmp_path: Path, block_tokens: int) -> None:
    """Against sets of strings; whatever the blocks, no document is cut and none counts twice."""
    filler = [f"Document {i} speaks of {'many ' * (i % 9)}things, of rain and of {i * i} stones." for i in range(40)]
    texts = [*filler[:20], f"As they say: {SEEN.upper()}", *filler[20:], f"Held out: {UNSEEN}"]
    shards = TokenShards.open(write_shards(tmp_path / "tokens", texts))
    sets = {"half": [SEEN, UNSEEN], "none": [UNSEEN], "short": ["Too few words"]}
    found = contamination.overlaps(sets, shards, load_tokenizer(), world=ALONE, block_tokens=block_tokens)
    train = set().union(*(eight_grams(text) for text in texts[:-1]))
    for name, of_set in sets.items():
        wanted = set().union(*(eight_grams(text) for text in of_set))
        assert (found[name]["ngrams"], found[name]["found"]) == (len(wanted), len(wanted & train))
    assert 0 < found["half"]["share"] < 1
    assert found["none"]["share"] == found["short"]["share"] == 0
    split = shards.split("train")
    starts = range(0, split.tokens, block_tokens)
    documents = [
        load_tokenizer().decode(tokens)
        for start in starts
        for tokens in contamination.documents(split, start, min(start + block_tokens, split.tokens), reach=3)
    ]
    assert documents == texts[:-1]


# -- the command


def test_the_command_measures_and_records(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateCommandConfig(
        run=str(run), tasks=["table3", "openbookqa", "triviaqa"], task_data=[str(data)], stride=32
    )
    assert evaluate(config) == 0
    said = capsys.readouterr()
    assert "cbt_cn: left out, no folder of task_data holds cbtest_CN_valid_2000ex.txt" in said.err
    assert "45.99 %" in said.out
    first = read_evaluation(run)
    by_name = {record["name"]: record for record in first["tasks"]}
    assert list(by_name) == ["lambada", "ptb", "openbookqa", "triviaqa"]
    assert first["weights_sha256"] == measure.weights_sha256(lively())
    assert first["results"][0]["name"] == "validation"
    ptb = by_name["ptb"]
    assert ptb["units"] == 30 * 12
    tokens = np.concatenate(
        [[END_OF_TEXT], load_tokenizer().encode("no it wasn't black monday\nbut while <unk> fell\n" * 30)]
    )
    nats = plain_nats(lively(), tokens, context=128, stride=32)
    assert ptb["scores"]["perplexity"]["value"] == pytest.approx(math.exp(nats / 360), rel=1e-5)
    words = [(SEEN.rstrip("."), 0), (UNSEEN.rstrip("."), 1)]
    lambada = by_name["lambada"]
    assert lambada["items"] == 3
    wanted = eight_grams(words[0][0]) | eight_grams(words[1][0])
    assert lambada["contamination"]["ngrams"] == len(wanted)
    assert lambada["contamination"]["found"] == len(eight_grams(words[0][0]))
    assert lambada["data"]["sha256"] == hashlib.sha256((data / "lambada_test.jsonl").read_bytes()).hexdigest()
    assert not (run / "evaluation").exists()

    # Again: nothing is asked of the model. Other data or again=true, and all is.
    monkeypatch.setattr(likelihood, "score", None)
    assert evaluate(dataclasses.replace(config, validation=False, tasks=["lambada"])) == 0
    assert "lambada: measured before" in capsys.readouterr().err
    assert read_evaluation(run) == first
    with pytest.raises(TypeError):
        evaluate(dataclasses.replace(config, validation=False, tasks=["lambada"], again=True))
    corrected = (data / "openbook_qa.jsonl").read_text().replace('"gold": 1', '"gold": 0')
    (data / "openbook_qa.jsonl").write_text(corrected)
    with pytest.raises(TypeError):
        evaluate(dataclasses.replace(config, validation=False, tasks=["openbookqa"]))


def _killed_evaluation(run: str, data: str, after: int) -> None:
    torch.set_num_threads(1)
    real, calls = likelihood.score, []

    def score(*arguments: Any, **more: Any) -> np.ndarray:
        if len(calls) == after:
            multiprocessing.Event().wait()
        calls.append(1)
        return real(*arguments, **more)

    likelihood.score = score  # type: ignore[assignment]
    evaluate(settings_of(run, data))


def settings_of(run: str, data: str) -> EvaluateCommandConfig:
    return EvaluateCommandConfig(
        run=run, tasks=["lambada", "ptb", "openbookqa"], task_data=[data], stride=16, batch=1, validation=False
    )


def test_an_evaluation_that_was_killed_ends_as_an_undisturbed_one(run: Path, data: Path, tmp_path: Path) -> None:
    """Killed within the second task: the first is not done again, the second goes on, the record is the same."""
    undisturbed = tmp_path / "undisturbed"
    evaluate(dataclasses.replace(settings_of(str(run), str(data)), out=str(undisturbed)))
    expected = read_evaluation(undisturbed)
    batches_of_lambada = 1
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_evaluation, args=(str(run), str(data), batches_of_lambada + 3)
    )
    process.start()
    journal = run / "evaluation" / "ptb" / "rank_0.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    assert [record["name"] for record in read_evaluation(run)["tasks"]] == ["lambada"]
    calls = []
    real = likelihood.score
    patch = pytest.MonkeyPatch()
    patch.setattr(likelihood, "score", lambda *a, **k: calls.append(1) or real(*a, **k))
    try:
        evaluate(settings_of(str(run), str(data)))
    finally:
        patch.undo()
    assert read_evaluation(run) == expected
    model, tokenizer = lively(), load_tokenizer()
    ready = suite.prepare(
        ["lambada", "ptb", "openbookqa"],
        [str(data)],
        tokenizer,
        suite.subject(model, EvaluateCommandConfig().precision),
        config=settings_of(str(run), str(data)),
        tell=print,
    )
    assert len(ready[0].rows) == batches_of_lambada
    assert len(calls) == len(ready[1].rows) - 3 + len(ready[2].rows)


def test_an_exported_model_has_the_same_hash_and_scores(run: Path, data: Path, tmp_path: Path) -> None:
    """A Hugging Face folder, and `out` for its record; bf16 rounds; a limit is told."""
    model = lively()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(TINY)))
    save_file(to_hf_state(model.state_dict(), TINY), folder / "model.safetensors")
    config = EvaluateCommandConfig(
        run=str(folder), tasks=["lambada"], task_data=[str(data)], out=str(tmp_path / "out"), limit=2
    )
    assert evaluate(config) == 0
    found = read_evaluation(tmp_path / "out")
    assert found["weights_sha256"] == measure.weights_sha256(model)
    (record,) = found["tasks"]
    assert (record["items"], record["of_items"]) == (2, 3)
    assert "contamination" not in record, "no training data is known"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    rounded = dataclasses.replace(config, precision=type(config.precision).bf16)
    assert evaluate(rounded) == 0
    (bf16,) = read_evaluation(tmp_path / "out")["tasks"]
    exact, near = (r["scores"]["perplexity"]["value"] for r in (record, bf16))
    assert near != exact
    assert near == pytest.approx(exact, rel=0.2)


def test_all_faults_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(
            EvaluateCommandConfig(
                run=str(tmp_path / "none"),
                limit=-1,
                tasks=["lambda"],
                harness_path=str(tmp_path / "no"),
                out=str(Path(__file__)),
            )
        )
    assert [fault.split("=")[0] for fault in caught.value.faults] == ["run", "limit", "harness_path", "out", "tasks"]


def test_tasks_need_gpt2s_vocabulary(tmp_path: Path, data: Path) -> None:
    small = ModelConfig("small", layers=1, channels=8, heads=1, context=16, vocabulary=100)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(small)))
    save_file(to_hf_state(GPT(small).state_dict(), small), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="its 100 tokens are fewer than GPT-2's 50257"):
        evaluate(EvaluateCommandConfig(run=str(tmp_path), tasks=["lambada"], task_data=[str(data)]))


def test_scores_are_in_the_report_and_in_the_model_card(run: Path, data: Path) -> None:
    """The report has the table, escaped, beside GPT-2's sizes; the model card each main score with its overlap."""
    (run / "config.yaml").write_text("run_dir: x\n")
    evaluate(EvaluateCommandConfig(run=str(run), tasks=["lambada"], task_data=[str(data)], validation=False))
    found = read_evaluation(run)
    found["tasks"][0]["title"] = "LAMBADA <b>"
    (run / "evaluation.json").write_text(json.dumps(found))
    lines = [
        {"step": s, "loss": 9.0, "lambada/accuracy_last_token": s / 9, "copa/accuracy": 0.5, "ptb/perplexity": 90.0}
        for s in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run).read_text()
    assert "lambada/accuracy_last_token" in page
    assert "ptb/perplexity" in page
    assert "LAMBADA &lt;b&gt;" in page
    assert "45.99 %" in page
    assert "1542M" in page
    assert tasks.TASKS["lambada"].source.split(",")[0] in page
    newest = run / "checkpoints" / "step_00000040"
    card = model_card(newest, checkpoint.read_state(newest))
    assert r"accuracy\_last\_token (3 items, 47.37% of its 8-grams in the training data) | 0.00 % ± 0.00 %" in card


# -- while a model trains


def test_tasks_while_training(tmp_path: Path, data: Path) -> None:
    """Two ranks at ZeRO 3: the scores in metrics.jsonl are those of `evaluate` on the checkpoint of the same step."""
    tokens = training.write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    settings = training.TINY | {
        "model.vocabulary": VOCABULARY,
        "data.path": str(tokens),
        "run_dir": str(tmp_path / "run"),
        "steps": 4,
        "zero.stage": 3,
        "evaluate.every_steps": 0,
        "evaluate.tasks": ["lambada", "ptb", "openbookqa"],
        "evaluate.task_data": [str(data)],
        "evaluate.tasks_every_steps": 2,
        "checkpoint.every_steps": 2,
    }
    ranks = training.Ranks(tmp_path / "ranks", [{"train": settings}], 2)
    assert ranks.wait() == [0, 0], ranks.stderr()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    scores = {line["step"]: line for line in lines if "lambada/accuracy_last_token" in line}
    assert sorted(scores) == [2, 4]
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08}"
        config = EvaluateCommandConfig(
            run=str(folder),
            tasks=["lambada", "ptb", "openbookqa"],
            task_data=[str(data)],
            stride=8,
            out=str(tmp_path / f"out{step}"),
            validation=False,
            contamination=False,
        )
        assert evaluate(config) == 0
        for record in read_evaluation(tmp_path / f"out{step}")["tasks"]:
            for metric in {record["metric"], *(p["metric"] for p in record["published"])}:
                found = scores[step][f"{record['name']}/{metric}"]
                assert found == pytest.approx(record["scores"][metric]["value"], rel=1e-4)
    assert scores[2]["ptb/perplexity"] != scores[4]["ptb/perplexity"]
