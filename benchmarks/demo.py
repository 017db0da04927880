"""The whole way on this machine: a real local site → corpus → training, killed and resumed → text → export → reports.

The site is Python's own `pydoc` server over the documentation of the installed packages: real pages, no download, one
host. The pages with the most prose are chosen; some addresses that cannot work are mixed in, since real lists have
them. Two runs are trained on two processes each: one undisturbed, which is the promise, and one that is killed with
SIGKILL in the middle and started again by the same command. Their loss curves must be equal, bit for bit.

Run it with `make demo`; everything lies in `.demo/` afterwards. It ends with 0 only when every check held.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = tuple(
    "mpmath rich aiohttp fsspec huggingface_hub hypothesis pydantic requests urllib3 setuptools babel omegaconf jinja2 "
    "pygments trafilatura tqdm attr yarl dateutil".split()
)
"""Installed packages, beside the standard library, whose documentation is served: those that pydoc can import anew."""

# Importing these does something that a person would notice.
NOTICEABLE = {"antigravity", "this", "turtle", "turtledemo", "idlelib", "tkinter", "test", "lib2to3", "ensurepip"}

MAX_SOURCE_BYTES = 80_000
VALIDATION_FRACTION = 0.05
console = Console(highlight=False, soft_wrap=True)
started = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description="gpt2train from URL list to exported model, on this machine")
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    parser.add_argument("--pages", type=int, default=320)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    corpus, run, undisturbed, exported = out / "corpus", out / "run", out / "undisturbed", out / "exported"

    with pydoc_server(out / "site.log") as address:
        say(f"A site of Python documentation stands at http://{address}/")
        closed = f"127.0.0.1:{free_port()}"
        page = write_url_list(out / "urls.txt", address, closed, options.pages)
        command(
            "corpus",
            f"urls={out / 'urls.txt'}",
            f"out={corpus}",
            f"fetch.allow_addresses=[{address},{closed}]",
            "fetch.contact=https://example.org/gpt2train-demo",
            "fetch.delay_s=0",
            "extract.favor_recall=true",
            f"tokenize.validation_fraction={VALIDATION_FRACTION}",
        )
    command("why", page, f"corpus={corpus}")

    def training(run_dir: Path) -> list[str]:
        return [
            "launch",
            "processes=2",
            f"model={options.model}",
            f"data={corpus / 'tokens'}",
            f"run_dir={run_dir}",
            f"steps={options.steps}",
            "batch.sequences=16",
            "optimizer.warmup_steps=20",
            "optimizer.lr=2e-3",
            "precision=fp32",
            "device=cpu",
            f"checkpoint.every_steps={options.steps // 5}",
            f"evaluate.every_steps={options.steps // 2}",
            "evaluate.sequences=64",
            "logging.every_steps=20",
        ]

    say("The promise: a run that nothing disturbs")
    command(*training(undisturbed))
    say("The same run in another folder, killed with SIGKILL in the middle")
    killed_at = kill_in_the_middle(training(run), run, options.steps // 2)
    say(f"Killed after step {killed_at}; the same command again")
    command(*training(run))

    prompt = "The graph is"
    command("evaluate", f"run={run}")
    text = command("generate", f"run={run}", f"prompt='{prompt}'", "max_new_tokens=60", "temperature=0.8", "seed=1")
    command("export", f"run={run}", f"to={exported}")
    command("report", str(corpus))
    command("report", str(run))
    difference = logits_difference(run, exported)
    return closing_table(corpus, run, undisturbed, exported, killed_at, text, difference)


def say(line: str) -> None:
    console.print(f"\n[bold]{time.monotonic() - started:5.0f} s  {line}[/bold]")


def command(*arguments: str) -> str:
    """Run one gpt2train command in sight of the reader; return what it wrote to standard output."""
    console.print(f"[dim]$ gpt2train {' '.join(arguments)}[/dim]", markup=True)
    process = subprocess.Popen([sys.executable, "-m", "gpt2train", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait() != 0:
        sys.exit(f"demo: gpt2train {arguments[0]} ended with {process.returncode}")
    return "".join(lines)


@contextmanager
def pydoc_server(log: Path) -> Iterator[str]:
    """Python's own documentation server on a free port of 127.0.0.1; yields ip:port."""
    with open(log, "w", encoding="utf-8") as errors:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pydoc", "-n", "127.0.0.1", "-p", "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            port = re.search(r":(\d+)/", line)
            if port is None:
                sys.exit(f"demo: the pydoc server did not start; see {log}")
            yield f"127.0.0.1:{port[1]}"
        finally:
            server.kill()
            server.wait()


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_url_list(path: Path, address: str, closed: str, pages: int) -> str:
    """Addresses of the pages with most prose, in an order fixed by a seed, and some that end otherwise.

    Returns the first of the good ones.
    """
    good = [f"http://{address}/{name}.html" for name in documented_modules(pages)]
    other = [
        good[0],  # twice in the list
        f"{good[1]}?utm_source=newsletter",  # the same page under another address
        f"http://{address}/no.such.module.html",  # a page that says so, with status 200
        f"http://{address}/manual.pdf",
        "http://169.254.169.254/latest/meta-data/",  # a cloud's secrets
        "http://10.0.0.1/",
        "http://127.0.0.1:9999/",  # a port that nobody allowed
        f"http://{closed}/",  # one that is allowed, where nobody answers
        "http://no-such-host.invalid/",
        "ftp://127.0.0.1/readme.txt",
        "not a URL at all",
    ]
    lines = good + other
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"{len(lines)} addresses in {path}")
    return good[0]


def documented_modules(most: int) -> list[str]:
    """Importable names of the modules with the longest docstrings."""
    site = Path(sysconfig.get_path("purelib"))
    roots = [(site, site / name) for name in PACKAGES]
    library = Path(sysconfig.get_path("stdlib"))
    roots.append((library, library))
    found = []
    for base, root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            unwanted = {"site-packages", "tests", *NOTICEABLE}
            if not parts or set(parts) & unwanted or not all(p.isidentifier() and p[0] != "_" for p in parts):
                continue
            if path.stat().st_size <= MAX_SOURCE_BYTES:
                found.append((-docstring_characters(path), ".".join(parts)))
    return [name for _, name in sorted(found)[:most]]


def docstring_characters(path: Path) -> int:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return 0
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return sum(len(ast.get_docstring(node) or "") for node in ast.walk(tree) if isinstance(node, documented))


def kill_in_the_middle(arguments: list[str], run: Path, step: int) -> int:
    """Start training, SIGKILL the launcher and its ranks once `step` is reached; return the last step written."""
    console.print(f"[dim]$ gpt2train {' '.join(arguments)}[/dim]")
    process = subprocess.Popen([sys.executable, "-m", "gpt2train", *arguments], start_new_session=True)
    deadline = time.monotonic() + 300
    while (reached := last_step(run)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"demo: training ended with {process.returncode} before step {step}")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return max(reached, last_step(run))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; a kill may have torn the last."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run) if "loss" in line), default=0)


def logits_difference(run: Path, exported: Path) -> float:
    """Largest difference between our logits and those of transformers, which loads the export by its own code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt2train.release.hf import load_model

    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    ids = tokenizer("In the beginning there was a list of addresses.", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True).eval()
    ours = load_model(run).eval()
    with torch.no_grad():
        return float((ours(ids) - theirs(ids).logits).abs().max())


def closing_table(
    corpus: Path, run: Path, undisturbed: Path, exported: Path, killed_at: int, text: str, difference: float
) -> int:
    summary = json.loads((corpus / "summary.json").read_text(encoding="utf-8"))
    urls = summary["urls"]
    ours = [line for line in metrics(run) if "loss" in line]
    promised = [line for line in metrics(undisturbed) if "loss" in line]
    validation = [line["validation_loss"] for line in metrics(run) if "validation_loss" in line]
    speed = sorted(line["tokens_per_s"] for line in ours)[len(ours) // 2]
    same = [(a["step"], a["loss"]) for a in ours] == [(b["step"], b["loss"]) for b in promised]
    listed = sum(1 for line in (corpus.parent / "urls.txt").read_text(encoding="utf-8").split("\n") if line)
    checks = {
        "URLs in = kept + dropped + failed": urls["in"] == listed == urls["kept"] + urls["dropped"] + urls["failed"],
        f"loss curve after the kill at step {killed_at} = the promised one, bit for bit": same and bool(ours),
        "loss fell": ours[-1]["loss"] < ours[0]["loss"],
        f"logits = transformers' (largest difference {difference:.1e})": difference < 1e-4,
        "the model wrote text": len(text.strip()) > 0,
    }
    table = Table(title="From a list of URLs to a model", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("URLs in", f"{urls['in']:,}")
    table.add_row("kept", f"{urls['kept']:,}")
    for state in ("dropped", "failed"):
        table.add_row(state, f"{urls[state]:,}")
        for row in summary["stages"]:
            for reason, n in row["reasons"].items():
                if reason.startswith(state):
                    table.add_row(f"    {row['stage']}: {reason.split(':', 1)[1]}", f"{n:,}")
    for name, split in summary["tokens"]["splits"].items():
        table.add_row(f"{name} documents", f"{split['documents']:,}")
        table.add_row(f"{name} tokens", f"{split['tokens']:,}")
    table.add_row("steps", f"{ours[-1]['step']:,}, killed after {killed_at:,}")
    table.add_row("loss from → to", f"{ours[0]['loss']:.3f} → {ours[-1]['loss']:.3f}")
    table.add_row("validation loss", " → ".join(f"{loss:.3f}" for loss in validation))
    table.add_row("tokens/s (median)", f"{speed:,.0f}")
    table.add_row("time", f"{time.monotonic() - started:.0f} s")
    console.print()
    console.print(table)
    for name, held in checks.items():
        console.print(f"{'[green]holds[/green]' if held else '[red]FAILS[/red]'}  {name}")
    console.print(f"\ncorpus {corpus}   its report {corpus / 'report.html'}")
    console.print(f"run {run}   its report {run / 'report.html'}   Hugging Face format {exported}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
