"""lm-evaluation-harness's own code around our scoring, beside our own tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluations import data_fixture, lively, plain_nats, read_evaluation, run_fixture  # noqa: F401 (fixtures)
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.errors import ConfigError
from gpt2train.evaluate import evaluate
from gpt2train.evaluation.config import EvaluateCommandConfig

LAMBADA_YAML = """task: local_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
CHOICE_YAML = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE_YAML = """task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING_YAML = """task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn of their own affairs
def test_lm_evaluation_harness_has_the_same_numbers(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both have a task: the harness's own code around our scoring, beside our own tasks."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yaml = tmp_path / "yaml"
    yaml.mkdir()
    for name, text, file in (
        ("lambada", LAMBADA_YAML, "lambada_test.jsonl"),
        ("choice", CHOICE_YAML, "openbook_qa.jsonl"),
        ("write", WRITE_YAML, "triviaqa.jsonl"),
        ("rolling", ROLLING_YAML, "lambada_test.jsonl"),
    ):
        (yaml / f"{name}.yaml").write_text(text.format(file=data / file))
    names = ["local_lambada", "local_choice", "local_write", "local_rolling"]
    config = EvaluateCommandConfig(
        run=str(run),
        tasks=["lambada", "openbookqa"],
        task_data=[str(data)],
        harness=names,
        harness_path=str(yaml),
        validation=False,
    )
    assert evaluate(config) == 0
    found = read_evaluation(run)
    ours = {record["name"]: {k: s["value"] for k, s in record["scores"].items()} for record in found["tasks"]}
    theirs = {name: found["harness"][name]["scores"] for name in names}
    assert theirs["local_lambada"]["perplexity,none"] == pytest.approx(ours["lambada"]["perplexity"], rel=1e-6)
    assert theirs["local_lambada"]["acc,none"] == ours["lambada"]["accuracy"]
    assert theirs["local_choice"]["acc,none"] == ours["openbookqa"]["accuracy"]
    assert theirs["local_choice"]["acc_norm,none"] == ours["openbookqa"]["accuracy_norm"]
    assert theirs["local_write"]["exact_match,none"] == 0
    texts = [json.loads(line)["text"] for line in (data / "lambada_test.jsonl").read_text().split("\n")]
    nats = [
        plain_nats(lively(), np.concatenate([[END_OF_TEXT], load_tokenizer().encode(t)]), context=128, stride=128)
        for t in texts
    ]
    expected = math.exp(sum(nats) / sum(len(t.encode()) for t in texts))
    assert theirs["local_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)
    assert "lm-evaluation-harness" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_the_harness_does_not_know_is_told(run: Path) -> None:
    """Reading the names of all its tasks takes it long."""
    with pytest.raises(ConfigError, match=r"harness=no_such_task: lm-evaluation-harness .* has no such task"):
        evaluate(EvaluateCommandConfig(run=str(run), harness=["no_such_task"], validation=False))
