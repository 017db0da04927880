"""`gpt2train release`: several sizes, exported one stage after another, as GPT-2's were.

Flows in: the runs of all sizes, and how many of them are to be out. Flows out: a folder for each released size, whose
card says what is withheld and why, and release.json: what came out when. The next stage is the same command with one
more; it adds a size and brings the cards of those before up to date. A stage is never taken back: what was published
cannot be.

    Solaiman et al. 2019, "Release Strategies and the Social Impacts of Language Models" (arXiv:1908.09203): GPT-2's
    four sizes came out over nine months, with time between them to look at how they were used.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from gpt2train import checkpoint
from gpt2train.config import ModelConfig, parameter_count
from gpt2train.errors import ConfigError, write_error
from gpt2train.release.config import ExportConfig, ReleaseConfig, check_release
from gpt2train.release.export import export_run
from gpt2train.run_folder import replace_file, run_dir_of

RELEASE = "release.json"
BEGIN, END = "<!-- staged release -->", "<!-- end of staged release -->"
"""What lies between is written anew at each stage."""


def release(config: ReleaseConfig) -> int:
    """Exports what this stage adds, and writes the cards of all released sizes."""
    faults = check_release(config)
    if faults:
        raise ConfigError(faults)
    sizes = sorted((_size(run) for run in config.runs), key=lambda size: size["parameters"])
    names = [size["name"] for size in sizes]
    if len(set(names)) < len(names):
        raise ConfigError([f"runs={names}: two runs have the same name, which is their folder's; rename one"])
    folder = Path(config.to)
    record = _read_record(folder / RELEASE)
    out = [entry["name"] for entry in record["released"]]
    if out != names[: len(out)]:
        raise ConfigError(
            [f"to={folder}: holds {', '.join(out)}, not the smallest of {', '.join(names)}; give the same"]
        )
    if len(out) > config.stage:
        raise ConfigError([f"stage={config.stage}: {len(out)} sizes are out already; a stage cannot be taken back"])
    for size in sizes[: config.stage]:
        place = folder / size["name"]
        if size["name"] in out:
            continue
        if not (place / "README.md").is_file():  # else it was exported, and the record was not written any more
            export_run(ExportConfig(run=size["run"], to=str(place)))
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        record["released"].append({"name": size["name"], "parameters": size["parameters"], "date": today})
        _write(folder / RELEASE, record)
    record["withheld"] = [{"name": s["name"], "parameters": s["parameters"]} for s in sizes[config.stage :]]
    record["reason"], record["review"] = config.reason, config.review
    _write(folder / RELEASE, record)
    for size in sizes[: config.stage]:
        _tell(folder / size["name"] / "README.md", record)
    print(
        f"{folder}: stage {config.stage} of {len(sizes)}; out: {', '.join(names[: config.stage])}; "
        f"withheld: {', '.join(names[config.stage :]) or 'nothing'}",
        file=sys.stderr,
    )
    return 0


def section(record: dict[str, Any]) -> str:
    """What the cards say of the release, Markdown."""
    lines = [BEGIN, "## Staged release", ""]
    lines += [f"- {e['name']}: {e['parameters']:,} parameters, released {e['date']}" for e in record["released"]]
    lines += [f"- {e['name']}: {e['parameters']:,} parameters, withheld" for e in record["withheld"]]
    if record["withheld"]:
        lines += ["", f"Why the larger sizes are withheld: {_line(record['reason'])}"]
        if record["review"]:
            lines += ["", f"What is looked at before the next stage: {_line(record['review'])}"]
    else:
        lines += ["", "All sizes are out."]
    return "\n".join([*lines, END])


def _tell(card: Path, record: dict[str, Any]) -> None:
    """Puts the section into a card, in the place of an earlier one or before its limitations."""
    text = card.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section(record) + text[text.index(END) + len(END) :]
    else:
        before, heading, after = text.partition("## Limitations")
        text = (
            f"{before}{section(record)}\n\n{heading}{after}" if heading else f"{text.rstrip()}\n\n{section(record)}\n"
        )
    replace_file(card, text.encode())


def _size(run: str) -> dict[str, Any]:
    source = checkpoint.resolve(run)
    model = ModelConfig.from_json(checkpoint.read_state(source)["model"])
    name = (run_dir_of(source) or Path(run)).resolve().name
    return {"run": run, "name": name, "parameters": parameter_count(model)}


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"released": [], "withheld": [], "reason": "", "review": ""}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        good = all({"name", "parameters", "date"} <= set(entry) for entry in record["released"])
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ConfigError([f"{path}: is no record of a release; restore it, or give a new folder"])
    assert isinstance(record, dict)
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise write_error(f"to={path.parent}", error) from error


def _line(text: str) -> str:
    return " ".join(text.split())
