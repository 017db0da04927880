"""Commands that join packages: `launch` and `sweep` start training processes, `report` looks into a folder.

launch/ knows nothing of training: it is handed command lines that were checked here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2train.bounds import check
from gpt2train.commands.planned import planned_overrides
from gpt2train.commands.table import DATA, LADDER
from gpt2train.compose import CONFIG_FOLDER, choices, compose, leaves, quoted, takes_text
from gpt2train.config import ReportConfig, TrainConfig
from gpt2train.errors import REQUEUE_EXIT_CODE, ConfigError, GPT2TrainError
from gpt2train.planning.choose import with_kept
from gpt2train.planning.config import SweepConfig
from gpt2train.run_folder import CONFIG
from launch import config as launch_config

WANDB_GROUP_CHARACTERS = 128
"""The longest name that Weights & Biases takes for a group (its documentation of `wandb.init`)."""


def build_corpus(overrides: Sequence[str]) -> int:
    """The pipeline, handed checked settings; before a take-down, the steps of `runs` that saw what will be gone."""
    from data_pipeline.bounds import check as check_corpus
    from data_pipeline.config import CorpusConfig

    settings = compose(
        CorpusConfig,
        [_quoted_list(text, "what_if") for text in overrides],
        groups=CONFIG_FOLDER / "corpus",
        check=check_corpus,
    )
    from data_pipeline import pipeline
    from data_pipeline.forget import TakeDown

    def tell_steps(takedown: TakeDown) -> None:
        if settings.runs:
            _print_steps(settings.runs, set(takedown.documents["url"].to_pylist()))

    return pipeline.build_corpus(settings, tell_steps)


def _quoted_list(override: str, key: str) -> str:
    """`key=[a=1,b=[2,3]]` or `key=a=1` as Hydra's grammar reads it, which knows no `=` within a value."""
    if not override.startswith(f"{key}=") or '"' in override or "'" in override:
        return override
    value = override.removeprefix(f"{key}=")
    value = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    # Commas within brackets belong to an item.
    items = [item.strip() for item in re.split(r",(?![^\[]*\])", value)]
    return f"{key}=[{','.join(quoted(item) for item in items if item)}]"


def _print_steps(runs: Sequence[str], urls: set[str]) -> None:
    """One line a run on standard output: how many of its steps saw the documents of `urls`, and which."""
    from gpt2train.run_folder import read_run_config
    from gpt2train.trace import documents_of_urls, open_data, other_batches, steps_done, steps_of_documents

    for run in runs:
        split, done = open_data(Path(run)).split("train"), steps_done(run)
        documents = documents_of_urls(split, urls)
        steps = sorted(
            {
                s.step
                for s in steps_of_documents(
                    split, read_run_config(run), documents, last_step=done, batches=other_batches(run)
                )
            }
        )
        which = f": {_ranges(steps)}" if steps else ""
        print(f"{run}: {len(steps)} of {done} steps saw {len(documents)} texts that are to be forgotten{which}")


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] → "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def launch_training(overrides: Sequence[str]) -> int:
    """Settings of the launch go to `launch`; the rest is checked here once and handed to every rank as it is."""
    from launch.run import launch

    faults: list[str] = []
    launch_overrides, train_overrides = _split(overrides, launch_config.LaunchConfig)
    if "plan.apply=true" in train_overrides:
        train_overrides = with_kept(train_overrides)
    how = _launch_config(faults, launch_overrides, train_overrides)
    ranks = _ranks(faults, how)
    config = _train_config(faults, train_overrides, ranks)
    if faults:
        raise ConfigError(faults)
    here = how.launcher is launch_config.Launcher.local
    train_overrides = planned_overrides(config, train_overrides, ranks, here=here)
    return int(launch(how, train_command(train_overrides, how.python), Path(config.run_dir)))


def sweep_training(overrides: Sequence[str]) -> int:
    """Every combination of comma-separated values is a trial with its own run folder under `out`."""
    from gpt2train.planning import trials as specs
    from gpt2train.planning.runs import body_parameter_count, kind_of
    from gpt2train.planning.sweep import findings, summarize
    from launch.sweep import Trial, exit_code, sweep

    faults: list[str] = []
    sweep_overrides, rest = _split(overrides, SweepConfig)
    launch_overrides, rest = _split(rest, launch_config.LaunchConfig)
    how = _launch_config(faults, launch_overrides, rest)
    where = _composed(faults, SweepConfig, sweep_overrides)
    faults += _faults_of_sweep(where, how, rest)
    ranks = _ranks(faults, how, where.parallel)
    sizes, wrong = specs.size_axis(where.sizes)
    faults += wrong
    axes: list[specs.Axis] = [[(o.removeprefix("model="), [o]) for o in axis] for axis in _axes(faults, rest)]
    axes = [sizes, *axes] if sizes else axes

    group = [] if any(o.startswith("logging.wandb_group=") for o in rest) else [_wandb_group(where)]

    wrong_in: dict[str, list[str]] = {}

    def trial(spec: specs.Spec) -> tuple[Trial, TrainConfig]:
        run_dir = Path(where.out) / spec.name
        settings = [*spec.overrides, *group, f"run_dir={quoted(str(run_dir))}"]
        of_trial: list[str] = []
        config = _train_config(of_trial, settings, ranks)
        for fault in of_trial:
            wrong_in.setdefault(fault, []).append(spec.name)
        return Trial(spec.name, train_command(settings, how.python), run_dir), config

    made = [trial(spec) for spec in specs.specs(axes)]
    faults += _faults_of_trials(wrong_in, len(made), axes)
    if faults:
        raise ConfigError(faults)
    trials = [t for t, _ in made]
    run: list[Trial] = []
    results: list[Any] = []
    if where.rates:
        # The smallest sizes first, by what they are and not by where they stand.
        parameters = {t.name: body_parameter_count(c.model) for t, c in made}
        by_size = sorted({(parameters[t.name], c.model.name) for t, c in made})
        smallest = [name for _, name in by_size[: where.rate_sizes]]
        run = [trial(spec)[0] for spec in specs.grid(axes, where.rates, smallest)]
        results = [] if where.summary_only else sweep(run, how, parallel=where.parallel)
        if how.dry_run or exit_code(results) == REQUEUE_EXIT_CODE:
            return exit_code(results)
        ended = _finished(run)
        kinds = [kind_of(config) for _, config in made]
        rules = {kind: findings(kind, [r for r in ended if r.kind == kind], {}).rule for kind in set(kinds)}
        found = [rule.rate(parameters[t.name]) for (t, _), k in zip(made, kinds, strict=True) if (rule := rules[k])]
        if len(found) < len(made):
            without = ", ".join(sorted(kind for kind, rule in rules.items() if rule is None))
            raise GPT2TrainError(
                f"{where.out}: of {without}, no two trials of the grid rates={where.rates} have ended; see their logs"
            )
        trials = [trial(spec)[0] for spec in specs.at_rates(axes, found)]
        trials = [t for t in trials if t.run_dir not in {r.run_dir for r in run}]
    if how.launcher is launch_config.Launcher.slurm and not where.summary_only:
        return _sweep_by_slurm(how, where, trials, [*sweep_overrides, *rest])
    results += [] if where.summary_only else sweep(trials, how, parallel=where.parallel)
    if how.dry_run or exit_code(results) == REQUEUE_EXIT_CODE:
        return exit_code(results)
    last = made[-1][1].model
    models = {}
    if where.forecast:
        asked = _train_config([], [f"model={where.forecast}"], 1).model
        models[where.forecast] = replace(asked, vocabulary=last.vocabulary, context=last.context)
    begun = [t.run_dir for t in [*run, *trials] if (t.run_dir / CONFIG).exists()]
    for t in [*run, *trials]:
        if t.run_dir not in begun:
            print(f"sweep: {t.name}: not in the table, since it has not begun", file=sys.stderr)
    if not begun:
        return exit_code(results) or GPT2TrainError.exit_code
    code = int(summarize(begun, Path(where.out), models=models))
    return exit_code(results) or code


def _wandb_group(where: SweepConfig) -> str:
    """All runs of one sweep stand together in Weights & Biases, under the name of its folder."""
    return f"logging.wandb_group={quoted(Path(where.out).absolute().name[:WANDB_GROUP_CHARACTERS])}"


def _finished(trials: Sequence[Any]) -> list[Any]:
    from gpt2train.planning.runs import summary

    return [summary(t.run_dir, t.name) for t in trials if (t.run_dir / CONFIG).exists()]


def _faults_of_sweep(where: SweepConfig, how: launch_config.LaunchConfig, rest: Sequence[str]) -> list[str]:
    """What keeps a sweep's own settings from working, one line each."""
    faults = []
    keys = {o.split("=", 1)[0] for o in rest}
    models = choices(CONFIG_FOLDER / "train", "model")
    if not where.out:
        faults.append("out='': must name the sweep's folder; give out=runs/NAME")
    elif Path(where.out).exists() and not Path(where.out).is_dir():
        faults.append(f"out={where.out}: is a file; give a folder")
    if "run_dir" in keys:
        faults.append("run_dir: each trial gets its own below out=; leave it out")
    if where.sizes and keys & {"model", "model.layers", "model.channels", "model.heads"}:
        faults.append(
            "sizes: says what model=, model.layers, model.channels and model.heads would; give one or the other"
        )
    if where.rates and "optimizer.lr" in keys:
        faults.append("rates: says what optimizer.lr would; give one or the other")
    if where.rates and how.launcher is launch_config.Launcher.slurm:
        faults.append("rates: needs its grid's results between two jobs; give optimizer.lr=…, or launcher=local")
    if any(not 0 < rate < float("inf") for rate in where.rates) or len(where.rates) == 1:
        faults.append(f"rates={where.rates}: must be two or more above 0; give rates=[0.001,0.002,0.004]")
    if where.rate_sizes < 1:
        faults.append(f"rate_sizes={where.rate_sizes}: must be at least 1; give rate_sizes=3")
    if where.forecast and where.forecast not in models:
        faults.append(f"forecast={where.forecast}: must be among {', '.join(models)}, or empty; give forecast=full")
    return faults


def _faults_of_trials(wrong_in: dict[str, list[str]], trials: int, axes: Sequence[Any]) -> list[str]:
    """One line a fault: with the names of its trials, unless it is of all of them or names a value that was swept."""
    swept = {o.split("=", 1)[0] for axis in axes if len(axis) > 1 for _, overrides in axis for o in overrides}
    return [
        fault if len(names) == trials or fault.split("=", 1)[0] in swept else f"{', '.join(names)}: {fault}"
        for fault, names in wrong_in.items()
    ]


def _sweep_by_slurm(
    how: launch_config.LaunchConfig, where: SweepConfig, trials: Sequence[Any], overrides: Sequence[str]
) -> int:
    """An array job with a task for each trial, and a job behind it that writes the sweep's table and picture."""
    from launch import slurm

    name = Path(where.out).absolute().name
    return int(
        slurm.submit(
            how,
            [slurm.Job(t.name, t.command, t.run_dir) for t in trials],
            name=name,
            folder=Path(where.out) / "logs",
            afterward=[sys.executable, "-m", "gpt2train", "sweep", *overrides, "summary_only=true"],
        )
    )


def train_command(overrides: Sequence[str], python: str = "") -> list[str]:
    """The command line of one rank."""
    return [python or sys.executable, "-m", "gpt2train", "train", *overrides]


def _ranks(faults: list[str], how: launch_config.LaunchConfig, parallel: int = 1) -> int:
    """Processes of a launch, of which `parallel` share this machine; 1, with what is wrong added to `faults`, where
    they cannot be known."""
    from launch.packed import share_faults
    from launch.run import rank_count
    from launch.sweep import usable_gpus

    if launch_config.check(how):  # told already
        return 1
    gpus = usable_gpus(how) if parallel != 1 else None
    if wrong := share_faults(how, parallel, gpus or 0):
        faults += wrong
        return 1
    try:
        return int(rank_count(how, gpus // parallel if gpus is not None else None))
    except launch_config.ConfigError as e:
        faults += e.faults
        return 1


def write_report(overrides: Sequence[str]) -> int:
    """The report of a corpus or of a run, by what lies in the folder; prints where it is."""
    config = compose(ReportConfig, overrides)
    folder = Path(config.path)
    if "://" in config.path:
        from data_pipeline.storage.place import FOR_REPORT, reading

        folder = reading("path", config.path, FOR_REPORT)
    if not config.path or not folder.is_dir():
        raise ConfigError(
            [f"path={config.path}: must be the folder of a corpus or a run; give gpt2train report FOLDER"]
        )
    if (folder / "summary.json").exists():
        from data_pipeline.account.report import write_corpus_report
        from data_pipeline.layout import Corpus

        print(write_corpus_report(Corpus(folder)))
    elif (folder / "metrics.jsonl").exists():
        from gpt2train.report import report

        print(report(folder))
    else:
        raise ConfigError([f"path={folder}: holds neither summary.json (a corpus) nor metrics.jsonl (a run)"])
    return 0


def _split(overrides: Sequence[str], schema: type) -> tuple[list[str], list[str]]:
    """Overrides of `schema`, and the others."""
    known = set(leaves(schema))
    folders = {key.split(".")[0] for key in known if "." in key}  # a misspelt slurm.partition is a slurm setting, too

    def is_own(override: str) -> bool:
        key = override.split("=", 1)[0]
        return key in known or key.split(".")[0] in folders

    return [o for o in overrides if is_own(o)], [o for o in overrides if not is_own(o)]


def _composed(
    faults: list[str], schema: type, overrides: Sequence[str], check: Callable[[Any], list[str]] | None = None
) -> Any:
    """The config, or the schema's defaults with what is wrong added to `faults`."""
    try:
        return compose(schema, overrides, check=check)
    except ConfigError as e:
        faults += e.faults
        return schema()


def _launch_config(
    faults: list[str], overrides: Sequence[str], train_overrides: Sequence[str]
) -> launch_config.LaunchConfig:
    """The launch's own settings. Training on the CPU asks for no GPU."""
    on_cpu = ["gpus=none"] if "device=cpu" in train_overrides else []
    config: launch_config.LaunchConfig = _composed(
        faults, launch_config.LaunchConfig, [*overrides, *on_cpu], check=launch_config.check
    )
    return config


def _train_config(faults: list[str], overrides: Sequence[str], ranks: int) -> Any:
    try:
        return compose(
            TrainConfig,
            overrides,
            groups=CONFIG_FOLDER / "train",
            aliases=DATA,
            check=lambda config: check(config, world_size=ranks),
        )
    except ConfigError as e:
        faults += e.faults
        return TrainConfig()


def _axes(faults: list[str], overrides: Sequence[str]) -> list[list[str]]:
    """Of each override all its values, as Hydra's own grammar reads them; `model=ladder` stands for the ladder."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    known = leaves(TrainConfig)
    axes = []
    for text in overrides:
        try:
            override = parser.parse_override(f"model={','.join(LADDER)}" if text == "model=ladder" else text)
        except HydraException:
            if takes_text(text, known, DATA):
                axes.append([text])
            else:
                faults.append(f"{text}: not of the form key=value[,value…] that Hydra reads")
            continue
        if override.is_sweep_override():
            axes.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    return axes
