"""From a WARC file to token shards: the whole `corpus` command beside datatrove with the same steps; both cores.

    python -m benchmarks.pipeline [--pages FOLDER] [--copies 1] [--environments FOLDER] [--rounds 2] [--json out.json]

FOLDER holds html/ID.html (see docs/benchmarks-corpus.md). Both start as a process of their own and read the same
gzipped WARC files; seconds are those of all their processes together. datatrove looks for no title, author or date;
ours runs once like that and once as it is set by default. Then ours with one worker and with two, in turns, on the
clock: that ratio says something only on a machine with two free cores, so each turn begins with what the machine
itself makes of a second core: one process that only counts, and two. `--copies`: each page so often, under other URLs
and with a comment that makes its bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.corpus import PAGES, REQUIREMENTS, NotInstallable
from data_pipeline.crawl.warc import Exchange, WarcWriter
from data_pipeline.tokenizer import load

REQUIRED = (
    *REQUIREMENTS["datatrove"],
    "trafilatura",
    "lxml-html-clean",
    "warcio",
    "py3langid==0.3.0",
    "orjson",
    "faust-cchardet",
    "python-magic",
)
SHARDS = 8


def write_warc(pages: Path, folder: Path, copies: int) -> int:
    """All pages of `pages`/html as responses of SHARDS archives, dealt round; gives how many there are."""
    writers, count = [WarcWriter(folder / f"{k}.warc.gz") for k in range(SHARDS)], 0
    for copy in range(copies):
        for page in sorted((pages / "html").glob("*.html")):
            body = page.read_bytes() + (f"<!-- {copy} -->".encode() if copy else b"")
            exchange = Exchange(
                url=f"https://{page.stem}-{copy}.example.org/",
                request=b"GET / HTTP/1.1\r\n\r\n",
                status=200,
                http_version="1.1",
                reason_phrase="OK",
                headers=[("Content-Type", "text/html"), ("Content-Length", str(len(body)))],
                body=body,
                ip="",
                fetched_at="2026-11-01T00:00:00Z",
            )
            writers[count % SHARDS].write(exchange, hashlib.sha256(body).digest())
            count += 1
    for writer in writers:
        writer.sync()
        writer.close()
    return count


def second_core() -> float:
    """Work done in a second by two processes at once ÷ by one: 2 on a machine that nothing else uses or slows."""
    count = "import time; end, n = time.time() + 3, 0\nwhile time.time() < end: n += sum(range(1000))\nprint(n)"
    done = []
    for processes in (1, 2):
        running = [
            subprocess.Popen([sys.executable, "-c", count], stdout=subprocess.PIPE, start_new_session=True)
            for _ in range(processes)
        ]
        done.append(sum(int(p.communicate()[0]) for p in running))
    return done[1] / done[0]


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """(processor seconds of the process and all below it, seconds on the clock).

    Each process is looked at until it ends; what it used since the last look, a tenth of a second at most, is lost.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    ticks: dict[str, int] = {}
    with open(log, "wb") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        while process.poll() is None:
            for name in filter(str.isdigit, os.listdir("/proc")):
                try:
                    fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[3] == str(process.pid):  # the session
                    ticks[name] = int(fields[11]) + int(fields[12])
            time.sleep(0.1)
        clock = time.monotonic() - began
    if process.returncode:
        said = log.read_text(errors="replace")[-2000:]
        raise NotInstallable(f"{command[0]} ended with {process.returncode}:\n{said}")
    return sum(ticks.values()) / os.sysconf("SC_CLK_TCK"), clock


def ours(warc: Path, out: Path, workers: int, metadata: bool) -> tuple[float, float, dict[str, Any]]:
    """(processor seconds, seconds, summary) of the command in a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    settings = ["source=warc", f"path={warc}", f"out={out}", "recipe=gopher", f"workers={workers}", f"shards={SHARDS}"]
    settings.append(f"extract.metadata={str(metadata).lower()}")
    # Nothing is held against evaluation sets, by either side.
    command = [sys.executable, "-m", "gpt2train", "corpus", *settings, "progress=false"]
    used, clock = timed(command, out.with_suffix(".log"))
    return used, clock, json.loads((out / "summary.json").read_text())


def datatrove(warc: Path, home: Path, out: Path) -> tuple[float, float, int]:
    """(processor seconds, seconds, tokens) of the same with datatrove; raises NotInstallable."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIRED]
        result = subprocess.run(install, capture_output=True, text=True, check=False)
        if result.returncode:
            raise NotInstallable(result.stderr.strip().splitlines()[-1])
    from tokenizers.implementations import ByteLevelBPETokenizer

    files = load().files()
    tokenizer = ByteLevelBPETokenizer(str(files["encoder.json"]), str(files["vocab.bpe"]))
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    script = Path(__file__).with_name("peer_datatrove_pipeline.py")
    command = [str(python), str(script), str(warc), str(out / "tokenizer.json"), str(out)]
    used, clock = timed(command, out / "log")
    return used, clock, sum(p.stat().st_size for p in (out / "tokens").glob("*.ds")) // 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--copies", type=int, default=1, help="each page so often, for the two cores' sake")
    parser.add_argument("--rounds", type=int, default=2, help="turns of one worker and two; 0: none")
    parser.add_argument("--environments", type=Path, help="folder for the peer's environment, to be used again")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if not arguments.pages.is_dir():
        sys.exit(f"--pages {arguments.pages}: there is no such folder; give one with html/")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        warc = folder / "crawl"
        figures["pages"] = write_warc(arguments.pages, warc, arguments.copies)
        for name, metadata in (("ours", False), ("ours, with metadata", True)):
            used, clock, summary = ours(warc, folder / "ours", 1, metadata)
            figures[name] = {"cpu_s": used, "clock_s": clock, "kept": summary["urls"]["kept"]}
        for stage in summary["stages"]:
            print(f"  {stage['stage']:<14}{stage['in']:>8} in {stage['kept']:>8} kept")
        try:
            home = (arguments.environments or folder) / "datatrove_pipeline"
            used, clock, tokens = datatrove(warc, home, folder / "theirs")
            figures["datatrove"] = {"cpu_s": used, "clock_s": clock, "tokens": tokens}
            for name in ("ours", "ours, with metadata"):
                figures[f"datatrove ÷ {name}, CPU"] = used / figures[name]["cpu_s"]
        except NotInstallable as e:
            print(f"datatrove: not compared ({e})", file=sys.stderr)
        turns: dict[int, list[float]] = {1: [], 2: []}
        cores: list[float] = []
        for _ in range(arguments.rounds):
            cores.append(second_core())
            for workers, seconds in turns.items():
                seconds.append(ours(warc, folder / "turn", workers, True)[1])
        if arguments.rounds:
            figures["clock_s by workers"] = turns
            figures["one worker ÷ two, clock"] = statistics.median(turns[1]) / statistics.median(turns[2])
            figures["two counting processes ÷ one"] = cores
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
