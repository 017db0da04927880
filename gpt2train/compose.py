"""Hydra groups and `key=value` overrides → a dataclass; every fault found, not just the first.

A command has a schema (a dataclass) and, where it offers choices, a folder of Hydra groups (`configs/train/model/…`).
The order is Hydra's: dataclass defaults, then `config.yaml` with its defaults list, then the groups chosen, then the
values given. Hydra itself composes the groups; the values are set one by one, so that one run reports all that is
wrong with them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2train.errors import ConfigError

CONFIG_FOLDER = next(
    (p for p in (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs") if p.is_dir()),
    Path(__file__).parent / "configs",
)
"""`configs/` beside this package in a wheel, above it in a checkout."""


BESIDE = ("cluster",)
"""Groups that lie beside a command's folder, not in it: what they describe is no command's own."""


def choices(groups: Path, group: str) -> list[str]:
    """Names that `group=` takes."""
    return sorted(p.stem for p in _folder_of(groups, group).glob("*.yaml"))


def _folder_of(groups: Path, group: str) -> Path:
    return (groups.parent if group in BESIDE else groups) / group


def group_names(groups: Path | None) -> list[str]:
    """Hydra groups of a command, such as `model` and `recipe`."""
    if groups is None or not groups.is_dir():
        return []
    own = [p.name for p in groups.iterdir() if p.is_dir()]
    return sorted([*own, *(name for name in BESIDE if "model" in own and (groups.parent / name).is_dir())])


def compose(
    schema: type,
    overrides: Sequence[str],
    *,
    groups: Path | None = None,
    aliases: Mapping[str, str] | None = None,
    check: Callable[[Any], list[str]] | None = None,
) -> Any:
    """An instance of `schema`. Raises ConfigError with one line for every override that cannot be taken.

    `aliases` maps a short key to a full one (`data` → `data.path`); `check` finds the faults of a whole config, which
    are reported together with those of the overrides.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    faults: list[str] = []
    refused: set[str] = set()
    known = leaves(schema)
    parser = OverridesParser.create()
    group_list = group_names(groups)
    chosen: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    for text in overrides:
        given, _, rest = text.partition("=")
        key = (aliases or {}).get(given, given)
        if takes_text(text, known, aliases) and key not in group_list:
            values.append((key, rest))
            continue
        refused |= {given, key}  # until it is taken
        try:
            override = parser.parse_override(text)
        except HydraException:
            faults.append(f"{text}: not of the form key=value that Hydra reads; quote special characters: 'key=\"…\"'")
            continue
        key = (aliases or {}).get(override.key_or_group, override.key_or_group)
        if override.is_delete():
            faults.append(f"{text}: settings cannot be deleted; give {key}=VALUE")
        elif override.is_sweep_override():
            faults.append(f"{text}: several values are for `gpt2train sweep`; give one")
        elif key in group_list:
            name = str(override.value())
            if groups is not None and name in choices(groups, key):
                chosen[key] = name
                refused -= {key}
            elif groups is not None:
                near = _nearest(name, choices(groups, key))
                faults.append(f"{key}={name}: must be among {', '.join(choices(groups, key))}{near}")
        else:
            values.append((key, override.value()))
            refused -= {given, key}

    config: Any = OmegaConf.structured(schema)
    if groups is not None and (groups / "config.yaml").is_file():
        ConfigStore.instance().store(name="schema", node=schema)
        with initialize_config_dir(str(groups.resolve()), version_base="1.3"):
            own = [f"{k}={v}" for k, v in chosen.items() if k not in BESIDE]
            chosen_config = hydra_compose("config", overrides=own)
        config = OmegaConf.merge(config, chosen_config)
        for name in BESIDE:
            if name in chosen:
                config = OmegaConf.merge(config, OmegaConf.load(_folder_of(groups, name) / f"{chosen[name]}.yaml"))

    for key, value in values:
        branch = next((k for k in known if key == k or key.startswith(f"{k}.")), None)
        if branch is None:
            folder = sorted(k for k in known if k.startswith(f"{key}."))
            if folder:
                faults.append(f"{key}={value}: holds further settings; give one of {', '.join(folder[:6])}")
            else:
                faults.append(f"{key}={value}: there is no such setting{_nearest(key, [*group_list, *known])}")
            continue
        try:
            # Below a free-form dictionary (deepspeed.extra) any key may be set.
            OmegaConf.update(config, key, literal(value), force_add=key != branch)
            _ = OmegaConf.select(config, key)
        except OmegaConfBaseException as e:
            faults.append(f"{key}={value}: {_reason(e)}; it is {_current(schema, known[branch])}")
            refused.add(key)
    composed = OmegaConf.to_object(config)
    if check is not None:  # a refused value left its default: what `check` says of that is no fault of the user's
        faults += [f for f in check(composed) if not {(name := f.split("=", 1)[0]), name.split(".")[0]} & refused]
    if faults:
        raise ConfigError(faults)
    return composed


def takes_text(text: str, known: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> bool:
    """Is `text` an override of a setting that holds text, and not in quotes? Then it is taken letter by letter."""
    given, equals, rest = text.partition("=")
    is_text = isinstance(known.get((aliases or {}).get(given, given)), str)
    in_quotes = len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\""
    return bool(equals) and is_text and not in_quotes


def literal(value: Any) -> Any:
    """`${…}` in a setting is text, not OmegaConf's interpolation: nothing of the environment slips into a config."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: str(m[1]) * 2 + "\\${", value)
    if isinstance(value, list):
        return [literal(v) for v in value]
    return {k: literal(v) for k, v in value.items()} if isinstance(value, dict) else value


def leaves(schema: type, prefix: str = "") -> dict[str, Any]:
    """All settings of a dataclass by dotted key, with their defaults."""
    import dataclasses

    found: dict[str, Any] = {}
    instance = schema()
    for f in dataclasses.fields(schema):
        value = getattr(instance, f.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(type(value), f"{prefix}{f.name}.")
        else:
            found[f"{prefix}{f.name}"] = value
    return found


def quoted(text: str) -> str:
    """A string as Hydra's grammar wants it, whatever is in it; a plain path stays as it is.

    In Hydra's quotes a backslash means something only before a quote, where it is doubled.
    """
    if re.fullmatch(r"[\w.-]*/[\w./-]*", text, re.ASCII):
        return text
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: str(m[1]) * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not near:  # `lr` for `optimizer.lr`
        near = [k for k in known if k.rsplit(".", 1)[-1] == name][:1]
    return f"; did you mean {near[0]}?" if near else "; see --help"


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _current(schema: type, default: object) -> str:
    from enum import Enum

    if isinstance(default, Enum):
        return "one of " + ", ".join(member.name for member in type(default))
    return f"{type(default).__name__}, by default {default!r}"
