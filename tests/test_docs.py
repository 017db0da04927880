"""What README and docs name is there: commands, settings, links, files, modules, make's targets."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpt2train.commands.table import COMMANDS, groups_of, load
from gpt2train.compose import choices, group_names, leaves
from gpt2train.planning.config import SweepConfig
from launch.config import LaunchConfig

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
KEY = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)*")
NOT_OURS = ("slots", "lookupcache", "fast")
"""`slots=2` stands in a file of hosts, `lookupcache=…` among the options of a mount, `fast=True` is trafilatura's."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The lines of its code blocks, those that go on behind a backslash joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(found).replace("\\\n", " ").split("\n")


def spans(text: str) -> list[str]:
    """What stands between backticks, code blocks aside."""
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@cache
def settings_of(name: str) -> frozenset[str]:
    """All that stands before a `=` on the command's line: settings, short names, groups."""
    command = COMMANDS[name]
    found = {*leaves(load(command.schema)), *command.aliases, *group_names(groups_of(command))}
    if name in ("launch", "sweep"):
        found |= set(leaves(LaunchConfig))
    if name == "sweep":
        found |= set(leaves(SweepConfig))
    return frozenset(found)


EVERY = frozenset().union(*(settings_of(name) for name in COMMANDS))


def faults_of_key(key: str, known: frozenset[str]) -> list[str]:
    """Of `section.setting`, `section.*` and `setting`."""
    if key in known or any(k.startswith(f"{key.removesuffix('*').removesuffix('.')}.") for k in known):
        return []
    free = ("deepspeed.extra.",)  # handed through: any key may stand below
    return [] if key.startswith(free) else [f"{key}: no such setting"]


def faults_of_line(line: str) -> list[str]:
    """Of each `gpt2train COMMAND key=value …` in a line."""
    faults = []
    for rest in re.findall(r"(?:^|[\s;&|(])gpt2train ([^;&|]*)", f" {line}"):
        try:
            words = shlex.split(rest, comments=True)
        except ValueError:  # an apostrophe in a sentence behind it
            words = rest.split()
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            continue
        name = words[0]
        if name not in COMMANDS:
            faults.append(f"gpt2train {name}: no such command")
            continue
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if not equals or not KEY.fullmatch(key):
                continue
            faults += [f"gpt2train {name} {fault}" for fault in faults_of_key(key, settings_of(name))]
            groups = groups_of(COMMANDS[name])
            if groups is not None and key in group_names(groups) and name != "sweep" and re.fullmatch(r"\w+", value):
                faults += [] if value in choices(groups, key) else [f"gpt2train {name} {word}: no such choice"]
    return faults


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_settings_are_known(page: str) -> None:
    text = text_of(page)
    faults = [fault for line in blocks(text) for fault in faults_of_line(line)]
    sections = {key.split(".")[0] for key in EVERY if "." in key}
    for span in spans(text):
        faults += faults_of_line(span)
        for word in span.split():
            key, equals, _ = word.partition("=")
            section, dot, _ = key.partition(".")
            is_setting = dot and section in sections and re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*(\.\*)?", key)
            is_setting = is_setting and not re.search(r"\.(parquet|html|jsonl?|yaml)$", key)
            if is_setting or (equals and KEY.fullmatch(key) and word == span and key not in NOT_OURS):
                faults += faults_of_key(key, EVERY)
    assert not faults


def test_a_wrong_line_is_found() -> None:
    assert faults_of_line("gpt2train trian model=nano") == ["gpt2train trian: no such command"]
    assert faults_of_line("x && gpt2train train stepz=3  # it's") == ["gpt2train train stepz: no such setting"]
    assert faults_of_line("gpt2train train model=nanoo steps=1") == ["gpt2train train model=nanoo: no such choice"]
    assert faults_of_line("gpt2train sweep sizes=[3x64] restarts=2 optimizer.lr=1,2 deepspeed.extra.x=1") == []


def anchors(page: str) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{page}: {link}"


def test_files_that_modules_name_are_there() -> None:
    for package in ("data_pipeline", "gpt2train", "launch", "benchmarks"):
        for source in (ROOT / package).rglob("*.py"):
            for path in re.findall(
                r"\b(?:tests|benchmarks|docs)/[a-z0-9_-]+\.(?:py|md)", source.read_text(encoding="utf-8")
            ):
                assert (ROOT / path).exists(), f"{source}: {path}"


@pytest.mark.parametrize("page", PAGES)
def test_files_modules_and_targets_are_there(page: str) -> None:
    text = text_of(page)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for code in (*blocks(text), *spans(text)):
        for module in re.findall(r"python -m (\w+(?:\.\w+)*)", code):
            assert find_spec(module) is not None, f"{page}: {code}"
        for target in re.findall(r"^make ([a-z-]+)", code.strip()):
            assert target in targets, f"{page}: {code}"
        for path in re.findall(
            r"(?<![\w/])(?:tests|benchmarks|configs|docs|gpt2train|launch|data_pipeline)/[\w./-]*\w", code
        ):
            assert (ROOT / path).exists() or (ROOT / f"{path}.yaml").exists(), f"{page}: {code}"
