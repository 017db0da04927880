"""The command line: quick help, completion, and faults in one go without a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2train.bounds import check
from gpt2train.cli import main
from gpt2train.commands.help import command_help, complete
from gpt2train.commands.table import COMMANDS, load
from gpt2train.compose import CONFIG_FOLDER, choices, compose, leaves, quoted
from gpt2train.config import Precision, TrainConfig
from gpt2train.errors import REQUEUE_EXIT_CODE, ConfigError
from launch.sweep import TrialResult

TRAIN = CONFIG_FOLDER / "train"
RUNNABLE = ["data.path=x", "run_dir=y", "steps=1"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpt2train", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("corpus", "--help"), ("launch", "--help")])
def test_help_answers_in_under_a_second(arguments: tuple[str, ...]) -> None:
    """By the processor's clock, which a busy machine does not stretch; the help waits for nothing else."""
    seconds = []
    for _ in range(3):
        before = os.times()
        result = run(*arguments)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert result.returncode == 0
        assert "gpt2train" in result.stdout
    assert min(seconds) < 1.0


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_names_every_setting_of_every_command(name: str) -> None:
    text = command_help(name)
    for key in leaves(load(COMMANDS[name].schema)):
        assert f"  {key}=" in text


def test_all_faults_are_told_at_once() -> None:
    result = run("train", "steps=many", "optimizer.lr=-1", "modle=nano", "model=nanoo", "batch.micro=3", "zero.stage=7")
    lines = result.stderr.strip().split("\n")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in (
        "steps=many",
        "optimizer.lr=-1.0: must be above 0; give 6e-4",
        "modle=nano: there is no such setting; did you mean model?",
        "model=nanoo: must be among",
        "zero.stage=7: must be 0, 1, 2 or 3; give 1",
        "data='': must name a folder of token shards; give data=corpus/tokens",
        "batch.sequences=512 must be a multiple of batch.micro × 1 processes",
    ):
        assert any(part in line for line in lines), part
    assert not any(line.startswith("gpt2train train: steps=0") for line in lines)  # its value was refused, not missing


def test_defaults_then_group_then_value() -> None:
    config = compose(
        TrainConfig,
        ["model=nano", "model.dropout=0.1", "data=shards", *RUNNABLE[1:]],
        groups=TRAIN,
        aliases={"data": "data.path"},
    )
    assert config.model.name == "nano"
    assert config.model.layers != TrainConfig().model.layers
    assert config.model.dropout == 0.1
    assert config.data.path == "shards"
    assert config.precision is Precision.bf16


def test_any_key_goes_below_deepspeed_extra() -> None:
    config = compose(TrainConfig, ["deepspeed.extra.zero_optimization.overlap_comm=true", *RUNNABLE], groups=TRAIN)
    assert config.deepspeed.extra == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize("group", ["model", "recipe"])
def test_every_shipped_choice_composes_and_can_run(group: str) -> None:
    names = choices(TRAIN, group)
    assert names
    for name in names:
        config = compose(TrainConfig, [f"{group}={name}", *RUNNABLE], groups=TRAIN)
        assert check(config) == []
        assert (config.model.name if group == "model" else config.recipe) == name


def test_every_corpus_recipe_composes() -> None:
    from data_pipeline.bounds import check as check_corpus
    from data_pipeline.config import CorpusConfig

    names = choices(CONFIG_FOLDER / "corpus", "recipe")
    assert {"webtext", "openwebtext", "gopher", "c4", "fineweb", "extract_only"} <= set(names)
    for name in names:
        config = compose(CorpusConfig, [f"recipe={name}", "urls=x"], groups=CONFIG_FOLDER / "corpus")
        assert config.recipe == name
        assert check_corpus(config) == []


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "it's",
        'say "x"',
        "$(touch x)",
        "a,b=c",
        "back\\slash",
        "back\\'quote",
        "end\\",
        "null",
        "1e3",
        "",
        "runs/a b",
        "http://a/?b=c&d=[1]",
    ],
)
def test_quoted_text_reaches_the_setting_as_it_is(text: str) -> None:
    config = compose(TrainConfig, [f"run_dir={quoted(text)}"])
    assert config.run_dir == text


def test_completion() -> None:
    assert complete(["tr"]) == ["train", "trace"]
    assert "model=" in complete(["train", "mo"])
    assert "small" in complete(["train", "model=s"])
    assert complete(["train", "precision="]) == ["fp32", "bf16"]
    assert complete(["train", "overwrite=t"]) == ["true"]
    assert "processes=" in complete(["launch", "pro"])
    assert complete(["nonsense", "x"]) == []


def test_completion_works_in_bash() -> None:
    script = f"""
    PATH={os.path.dirname(sys.executable)}:$PATH
    eval "$(gpt2train --completion)"
    COMP_LINE='gpt2train train model=sm' COMP_POINT=24
    compopt() {{ :; }}
    _gpt2train
    echo "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.strip() == "small"


def test_an_empty_command_line_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: gpt2train COMMAND" in capsys.readouterr().out


def test_errors_of_faulty_config_carry_their_list() -> None:
    with pytest.raises(ConfigError) as error:
        compose(TrainConfig, ["a=1", "b=2"])
    assert len(error.value.faults) == 2


TEXTS = [
    "In a shocking finding,",
    "Hello, world",
    "It's",
    "Who (what)?",
    "naïve café",
    "a=b",
    "[a]",
    "null",
    "true",
    "1e3",
    " leading space",
    "two\nlines",
    "$(touch x)",
    "~/x",
    "${x} and ${oc.env:HOME}",
    "\\${x}",
    "'Tis",
    '"',
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_setting_that_holds_text_takes_it_letter_by_letter(text: str) -> None:
    assert compose(TrainConfig, [f"run_dir={text}"]).run_dir == text
    assert compose(TrainConfig, [f"data={text}"], aliases={"data": "data.path"}).data.path == text


def test_text_in_quotes_is_what_stands_between_them() -> None:
    assert compose(TrainConfig, ["run_dir='a, b'"]).run_dir == "a, b"
    assert compose(TrainConfig, ['run_dir="it\'s"']).run_dir == "it's"


def test_a_refused_value_brings_no_faults_behind_it() -> None:
    with pytest.raises(ConfigError) as error:
        compose(TrainConfig, ["model=nan", "model.heads=5", "steps=1,2", *RUNNABLE[:2]], groups=TRAIN, check=check)
    assert [fault.split(":")[0] for fault in error.value.faults] == ["model=nan", "steps=1,2"]


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_a_run_that_is_none_is_told_before_torch_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for run_dir, part in ((tmp_path / "nope", "there is no such folder"), (tmp_path / "empty", "holds no checkpoint")):
        before = os.times()
        result = run(command, f"run={run_dir}")
        assert result.returncode == 2
        assert part in result.stderr
        assert os.times().children_user - before.children_user < 2.5  # without torch


def test_help_shows_the_defaults_that_are_in_force() -> None:
    assert "url_list.min_score=3 " in command_help("corpus")
    assert "recipe=webtext " in command_help("corpus")


def test_completion_knows_sweeps_and_launches() -> None:
    assert "out=" in complete(["sweep", "ou"])
    assert complete(["launch", "starter=t"]) == ["torchrun"]
    assert "ladder" in complete(["sweep", "model="])


def test_a_sweep_takes_text_settings_and_refuses_run_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model=nano,micro", "steps=1", "device=cpu", "batch.sequences=8", "dry_run=true"]
    odd = tmp_path / "é (1), 'x' $(touch y)"
    assert main(["sweep", *settings, f"out={odd}", f"data={odd}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("gpt2train train") == 2
    groups = [word for word in shlex.split(shown) if word.startswith("logging.wandb_group=")]
    assert [compose(TrainConfig, [word]).logging.wandb_group for word in groups] == [odd.name] * 2
    assert main(["sweep", *settings, f"out={odd}", f"data={odd}", "logging.wandb_group=mine"]) == 0
    assert capsys.readouterr().out.count("logging.wandb_group=") == 2, "the one that was given"
    assert main(["sweep", *settings, f"out={odd}", "data=x", "run_dir=y"]) == 2
    assert "each trial gets its own" in capsys.readouterr().err


def test_a_sweep_that_was_stopped_or_failed_before_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that have not begun are no fault of the settings."""
    asked = ["sweep", "model=nano,micro", "steps=1", "device=cpu", "batch.sequences=8", f"out={tmp_path}", "data=x"]
    for code, whole, told in (
        (REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE, ""),
        (9, 9, "sweep: nano: not in the table, since it has not begun\nsweep: micro: not in the table, "),
    ):
        ended = [TrialResult(name, code, 0.0) for name in ("nano", "micro")]
        monkeypatch.setattr("launch.sweep.sweep", lambda *_, ended=ended, **__: ended)
        assert main(asked) == whole
        err = capsys.readouterr().err
        assert err.startswith(told)
        assert bool(err) == bool(told)


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (["optimizer.lr=1e-3,abc"], ["optimizer.lr=abc: Value 'abc'"]),
        (["model=nano,micro", "optimizer.lr=1e-3,-1"], ["optimizer.lr=-1.0: must be above 0"]),
        (["model=nano,micro", "steps=-4"], ["steps=-4: must be above 0"]),
        (["model=nano,micro", "model.heads=96"], ["nano: model.channels=128: must be a multiple of model.heads=96"]),
    ],
)
def test_a_fault_of_a_sweep_is_told_once(
    settings: list[str], faults: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "steps=10", "device=cpu", "data=x", f"out={tmp_path}", *settings]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(f"gpt2train sweep: {fault}")


def test_the_deepspeed_launchers_argument_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("gpt2train train:")
    assert main(["--local_rank=1", "train", "steps=0"]) == 2
    assert "local_rank" not in capsys.readouterr().err
