"""A launch as a Slurm job: a batch script that a person can read, change and submit by hand, and its submission.

In: commands and a LaunchConfig. Out: a script for sbatch, which

    runs `launch` on its first node, which starts the ranks of all nodes with srun (launch.hosts): restarts, logs,
    signals and exit codes are those of every other launch
    hands the signal that comes `slurm.warning_s` before the time limit on; at a preemption Slurm tells the ranks itself
    puts the job back into the queue when its ranks have saved (85), unless it was canceled

Several commands make an array job, one each. Slurm takes the submitter's environment along by itself; nothing of it is
written into the script.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import logs
from launch.config import (
    REQUEUE_EXIT_CODE,
    ConfigError,
    Gpus,
    LaunchConfig,
    Launcher,
    LaunchError,
    Over,
    SlurmConfig,
)
from launch.words import to_words

SUBMIT_TIMEOUT_S = 120.0
# The last task of an array has the number of the whole array as its SLURM_JOB_ID: Slurm would take it for all tasks.
ARRAY_TASK = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
SCRIPT, AFTERWARD = "job.sbatch", "summary.sbatch"


@dataclass(frozen=True)
class Job:
    """What one job, or one task of an array, does."""

    name: str
    command: list[str]
    """The arguments of one rank; run again, it goes on."""
    run_dir: Path


def processes_of(config: LaunchConfig) -> int:
    """Ranks of a job, on all its nodes."""
    return config.slurm.nodes * max(1, config.processes)


def render(config: LaunchConfig, jobs: Sequence[Job], *, name: str, output: Path, directory: Path) -> str:
    """The script. name: the job's, in the queue. output: the file of what it prints, with Slurm's %-patterns.

    directory: where it works. Raises ConfigError for a path that Slurm cannot take.
    """
    slurm = config.slurm
    options = {
        "job-name": re.sub(r"[^\w.-]", "_", name),
        "chdir": _quoted_path(directory.absolute(), "the working folder"),
        "output": _quoted_path(output.absolute(), "the run folder"),
        "open-mode": "append",
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_node or ("" if slurm.exclusive else max(1, config.processes)),
        "gpus-per-node": config.processes if config.gpus is not Gpus.none else "",
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "signal": f"B:USR1@{slurm.warning_s}" if slurm.warning_s and slurm.requeue else "",
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items() if value != ""]
    lines += ["#SBATCH --exclusive"] if slurm.exclusive else []
    lines += ["#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue"]
    if len(jobs) > 1:
        at_once = f"%{slurm.array_limit}" if slurm.array_limit else ""
        lines.append(f"#SBATCH --array=0-{len(jobs) - 1}{at_once}")
    lines += [f"#SBATCH {option}" for option in slurm.options]
    body = [
        "",
        "# Submit it: sbatch FILE. It resumes by itself, also when it is submitted again.",
    ]
    if slurm.setup:
        body += ["", "# The site's own lines (slurm.setup).", *slurm.setup]
    # `launch` runs on the first node of the job and starts the ranks of all nodes, with one srun each.
    settings = to_words(_inside(config))
    program = [sys.executable, "-I", str(Path(__file__).with_name("__main__.py"))]
    if len(jobs) == 1:
        body += ["", "# On the first node: starts, watches and restarts the ranks of all nodes, through srun."]
        body += _array("launch", [*program, str(jobs[0].run_dir.absolute()), *settings, "--", *jobs[0].command])
    else:
        body += ["", "# One task of the array is one trial.", "case $SLURM_ARRAY_TASK_ID in"]
        for number, job in enumerate(jobs):
            body += [f"{number})  # {_comment(job.name)}"]
            body += [
                "  " + line for line in _array("trial", [str(job.run_dir.absolute()), *settings, "--", *job.command])
            ]
            body += ["  ;;"]
        body += ["*)", '  echo "there is no trial $SLURM_ARRAY_TASK_ID" >&2', "  exit 2", "  ;;", "esac"]
        body += ["", "# On the first node: starts, watches and restarts the ranks of all nodes, through srun."]
        body += [f'launch=({" ".join(map(_word, program))} "${{trial[@]}}")']
    body += [
        "",
        '"${launch[@]}" &',
        "launch_pid=$!",
        "# Signals reach a script only while it waits. USR1: the time limit is near.",
        "trap 'kill -USR1 \"$launch_pid\"' USR1",
        "trap 'kill -TERM \"$launch_pid\"' TERM",
        'while kill -0 "$launch_pid" 2>/dev/null; do wait "$launch_pid"; done',
        'wait "$launch_pid"',
        "code=$?",
    ]
    if slurm.requeue:
        body += [
            "",
            f"# {REQUEUE_EXIT_CODE}: the ranks were told to stop, and have saved. Back into the queue, unless the job",
            "# was canceled or Slurm requeues it already: then it is no longer running.",
            f'if [ "$code" = {REQUEUE_EXIT_CODE} ]; then',
            f"  job={ARRAY_TASK if len(jobs) > 1 else '$SLURM_JOB_ID'}",
            '  state=$(squeue --noheader --jobs="$job" --format=%T)',
            '  echo "launch: saved and stopped; the job is ${state:-gone}" >&2',
            '  [ "$state" = RUNNING ] && scontrol requeue "$job"',
            "fi",
        ]
    body += ['exit "$code"']
    return "\n".join(["#!/bin/bash", *lines, *body, ""])


def _inside(config: LaunchConfig) -> LaunchConfig:
    """The settings of the launch within the job."""
    hosts = dataclasses.replace(config.hosts, over=Over.srun, file="", names=[], ssh=[], address="")
    return dataclasses.replace(
        config,
        launcher=Launcher.hosts,
        processes=max(1, config.processes),
        hosts=hosts,
        slurm=SlurmConfig(),
        dry_run=False,
    )


def _array(name: str, words: Sequence[str]) -> list[str]:
    """A bash array, one word a line."""
    return [f"{name}=(", *(f"  {_word(word)}" for word in words), ")"]


def _word(text: str) -> str:
    """A word of a bash script; in double quotes where single ones would look as if an expansion was meant."""
    if not re.search(r"['$`]", text):
        # A comma between words of an array looks as if it was to separate them.
        return f"'{text}'" if "," in text else shlex.quote(text)
    escaped = re.sub(r'[\\"$`]', r"\\\g<0>", text)
    return f'"{escaped}"'


def _comment(text: str) -> str:
    return " ".join(text.split())


def _quoted_path(path: Path, what: str) -> str:
    """A path in a line of #SBATCH: in quotes, which Slurm takes off."""
    text = str(path)
    bad = sorted({c for c in text if c in '\\"\n'})
    if bad:
        raise ConfigError([f"{what} {text!r}: Slurm takes no {' '.join(map(repr, bad))} in a path; give another"])
    return f'"{text}"' if re.search(r"[^\w./%-]", text) else text


def submit(config: LaunchConfig, jobs: Sequence[Job], *, name: str, folder: Path, afterward: Sequence[str] = ()) -> int:
    """Write the script of `jobs` into `folder` and hand it to sbatch; with dry_run, print it. Returns an exit code.

    afterward: a command that a job of its own runs on one core when all jobs have ended, well or not. Prints the jobs'
    number on standard output. Raises ConfigError when sbatch is not here or does not take the job.
    """
    pattern = "slurm-%A_%a.out" if len(jobs) > 1 else "slurm-%j.out"
    output = Path(_literal(folder.absolute())) / pattern
    script = render(config, jobs, name=name, output=output, directory=Path.cwd())
    last = _render_afterward(config, afterward, name=name, folder=folder) if afterward else ""
    if config.dry_run:
        print(script, end="")
        if last:
            print(f"# ------ and a second script, {AFTERWARD}, which waits for that job:\n{last}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            ["launcher=slurm: sbatch is not here; submit where it is, or give dry_run=true for the script"]
        )
    logs.make(folder)
    path = folder / SCRIPT
    path.write_text(script, encoding="utf-8")
    number = _sbatch(path)
    logs.say(f"job {number} is in the queue: {path}")
    logs.say(
        f"squeue --job={number}; scancel {number}; what it says: {folder}/slurm-{number}{'_*' * (len(jobs) > 1)}.out"
    )
    if last:
        path = folder / AFTERWARD
        path.write_text(last, encoding="utf-8")
        logs.say(f"job {_sbatch(path, f'--dependency=afterany:{number}')} waits for it: {path}")
    print(number)
    return 0


def _render_afterward(config: LaunchConfig, command: Sequence[str], *, name: str, folder: Path) -> str:
    slurm = config.slurm
    options = {
        "job-name": re.sub(r"[^\w.-]", "_", f"{name}-summary"),
        "chdir": _quoted_path(Path.cwd(), "the working folder"),
        "output": _quoted_path(Path(_literal(folder.absolute())) / "slurm-summary-%j.out", "the run folder"),
        "nodes": 1,
        "ntasks": 1,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items() if value != ""]
    body = ["", *slurm.setup, *_array("command", command), '"${command[@]}"', ""]
    return "\n".join(["#!/bin/bash", *lines, *body])


def _literal(path: Path) -> str:
    """A path in a file name pattern of Slurm's."""
    return str(path).replace("%", "%%")


def _sbatch(path: Path, *options: str) -> str:
    """Hand a script over; the job's number."""
    # Variables of a job that this shell may itself be in would be taken for options of the new one.
    environment = {k: v for k, v in os.environ.items() if not re.match(r"SLURM_(?!CONF$)|SBATCH_", k)}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)],
            capture_output=True,
            text=True,
            timeout=SUBMIT_TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch did not answer within {SUBMIT_TIMEOUT_S:g} s; see squeue before trying again"
        ) from None
    if done.returncode:
        raise ConfigError([f"sbatch {path}: {line}" for line in done.stderr.strip().splitlines() or ["failed"]])
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow
