"""A LaunchConfig as `key=value` words of a command line, there and back: what a job script hands to `launch` itself.

Text stands as it is, lists as JSON, all else as Python prints it, in lower case. Only what differs from the defaults is
written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

from launch.config import ConfigError, LaunchConfig


def to_words(config: LaunchConfig) -> list[str]:
    """The words that make `config`."""
    return _differing(config, LaunchConfig(), "")


def _differing(value: Any, default: Any, prefix: str) -> list[str]:
    words = []
    for field in dataclasses.fields(value):
        mine, its = getattr(value, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(mine):
            words += _differing(mine, its, f"{prefix}{field.name}.")
        elif mine != its:
            words.append(f"{prefix}{field.name}={_text(mine)}")
    return words


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def from_words(words: Sequence[str]) -> LaunchConfig:
    """The config that `words` make. Raises ConfigError with all that cannot be taken."""
    config = LaunchConfig()
    faults = []
    for word in words:
        key, equals, text = word.partition("=")
        *folders, name = key.split(".")
        place: Any = config
        for folder in folders:
            place = getattr(place, folder, None)
        if not equals or not dataclasses.is_dataclass(place) or not hasattr(place, name):
            faults.append(f"{word}: there is no such setting of a launch")
            continue
        before = getattr(place, name)
        try:
            if dataclasses.is_dataclass(before):
                raise ValueError(word)
            setattr(place, name, _value(text, before))
        except (ValueError, KeyError):
            faults.append(f"{word}: not of the kind of {before!r}")
    if faults:
        raise ConfigError(faults)
    return config


def _value(text: str, before: Any) -> Any:
    if isinstance(before, Enum):
        return type(before)[text]
    if isinstance(before, bool):
        return {"true": True, "false": False}[text]
    if isinstance(before, list):
        value = json.loads(text)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(text)
        return value
    return type(before)(text)
