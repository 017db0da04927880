"""`--help` and tab completion, read from the table of commands and the dataclasses' own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from gpt2train.commands.table import COMMANDS, LADDER, groups_of, load
from gpt2train.compose import choices, compose, group_names, leaves


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "gpt2train: from a list of URLs to a trained, evaluated, releasable GPT-2.",
        "",
        "usage: gpt2train COMMAND [key=value …] [@FILE]      gpt2train COMMAND --help",
        "",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        'tab completion:  eval "$(gpt2train --completion)"',
    ]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """Every setting with its default and its sentence, read from the dataclasses' own source."""
    command = COMMANDS[name]
    lines = [f"gpt2train {name}: {command.summary}", ""]
    lines += [f"  {example}" for example in command.examples]
    groups = groups_of(command)
    for group in group_names(groups):
        assert groups is not None
        lines += ["", f"{group}=  one of {', '.join(choices(groups, group))}"]
    launch, sweep = load("launch.config:LaunchConfig"), load("gpt2train.planning.config:SweepConfig")
    if name in ("launch", "sweep"):
        lines += ["", "Settings of the launch:", *_settings_help(launch, launch())]
    if name == "sweep":
        lines += ["", "Settings of the sweep:", *_settings_help(sweep, sweep())]
        lines += ["", f"model=ladder stands for {','.join(LADDER)}; any setting may have several values: key=a,b"]
    schema = load(command.schema)
    in_force = compose(schema, [], groups=groups) if groups else schema()  # what the default groups change shows, too
    lines += ["", "Settings:", *_settings_help(schema, in_force)]
    return "\n".join(lines)


def _settings_help(schema: type, instance: Any, prefix: str = "") -> list[str]:
    documentation = _field_documentation(schema)
    lines: list[str] = []
    nested: list[tuple[str, Any]] = []
    for f in fields(schema):
        value = getattr(instance, f.name)
        if is_dataclass(value):
            nested.append((f.name, value))
            continue
        shown = _shown(value)
        text = documentation.get(f.name, "")
        if isinstance(value, Enum):
            text = f"{' | '.join(m.name for m in type(value))}. {text}".strip()
        lines += textwrap.wrap(
            f"{prefix}{f.name}={shown}  {text}",
            110,
            initial_indent="  ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
    for name, value in nested:
        lines += _settings_help(type(value), value, f"{prefix}{name}.")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, list) and len(value) > 6:
        return f"[{','.join(map(str, value[:5]))},… {len(value)} in all]"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_documentation(schema: type) -> dict[str, str]:
    """The string below each field, those of the classes it comes from included."""
    found = {}
    for owner in reversed([c for c in schema.__mro__ if is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def complete(words: Sequence[str]) -> list[str]:
    """Candidates for the last of `words`, which follow `gpt2train` on the command line."""
    *before, last = list(words) or [""]
    if not before:
        return [name for name in COMMANDS if name.startswith(last)]
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    groups = groups_of(command)
    known = leaves(load(command.schema))
    if before[0] in ("launch", "sweep"):
        known |= leaves(load("launch.config:LaunchConfig"))
    if before[0] == "sweep":
        known |= leaves(load("gpt2train.planning.config:SweepConfig"))
    if "=" in last:
        key, start = last.split("=", 1)
        if groups is not None and key in group_names(groups):
            names = choices(groups, key) + (["ladder"] if before[0] == "sweep" and key == "model" else [])
            return [c for c in names if c.startswith(start)]
        value = known.get(key)
        members = [m.name for m in type(value)] if isinstance(value, Enum) else []
        members += ["true", "false"] if isinstance(value, bool) else []
        return [m for m in members if m.startswith(start)]
    keys = [*group_names(groups), *command.aliases, *known]
    return sorted({f"{key}=" for key in keys if key.startswith(last)})


COMPLETION = """_gpt2train() {
  local line=${COMP_LINE:0:COMP_POINT} words
  read -ra words <<< "$line"
  [[ $line == *' ' ]] && words+=("")
  mapfile -t COMPREPLY < <(gpt2train --complete "${words[@]:1}" 2>/dev/null)
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _gpt2train gpt2train"""
