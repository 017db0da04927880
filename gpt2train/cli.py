"""`gpt2train COMMAND [key=value …]`: overrides → a checked dataclass → one function.

Nothing heavy is imported before the settings are known to be right: `--help`, completion and the report of faults
answer without torch. An exception that has an `exit_code` is a user's to read: one line a fault, no traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpt2train.bounds import check
from gpt2train.commands.help import COMPLETION, command_help, complete, overview
from gpt2train.commands.settings_files import expand
from gpt2train.commands.table import COMMANDS, Command, groups_of, load
from gpt2train.compose import compose, leaves, quoted
from gpt2train.errors import STORAGE_ERRNOS, ConfigError, write_error
from gpt2train.planning.choose import with_kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher puts --local_rank=N first unless told not to; the environment says the same.
    arguments = [a for a in given if not a.startswith(("--local_rank=", "--local-rank="))]
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gpt2train {_version()}")
        return 0
    if arguments[0] == "--completion":
        print(COMPLETION)
        return 0
    if arguments[0] == "--complete":
        print("\n".join(complete(arguments[1:])))
        return 0
    name, *overrides = arguments
    try:
        if name not in COMMANDS:
            raise ConfigError([f"{name}: there is no such command; choose among {', '.join(COMMANDS)}"])
        if {"-h", "--help"} & set(overrides):
            print(command_help(name))
            return 0
        return _run(name, expand(overrides))
    except KeyboardInterrupt:
        print(f"gpt2train {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `gpt2train generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:  # of a file that has no words of its own
            error = write_error(error.filename or "a file", error)
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        for line in str(error).split("\n"):
            print(f"gpt2train {name}: {line}", file=sys.stderr)
        return int(code)


def _run(name: str, overrides: list[str]) -> int:
    command = COMMANDS[name]
    unknown = [o for o in overrides if o.startswith("-")]
    if unknown:
        raise ConfigError([f"{o}: there is no such option; settings are key=value, see --help" for o in unknown])
    schema = load(command.schema)
    overrides = _name_positional(command, schema, overrides)
    if command.run.startswith("gpt2train.commands."):
        return int(load(command.run)(overrides))
    if name == "train" and "plan.apply=true" in overrides:
        overrides = with_kept(overrides)
    config = compose(
        schema, overrides, groups=groups_of(command), aliases=command.aliases, check=_bounds_of(command.schema)
    )
    return int(load(command.run)(config))


def _bounds_of(schema: str) -> Callable[[Any], list[str]] | None:
    """What the settings' own module knows of their bounds, before the module that works is imported."""
    if schema == "gpt2train.config:TrainConfig":
        return lambda config: check(config, world_size=_world_size())
    if schema == "data_pipeline.config:CorpusConfig":
        return load("data_pipeline.bounds:check")
    module, name = schema.split(":")
    if re.fullmatch(r"gpt2train\.\w+\.config", module):  # of a wing: ReleaseConfig and, beside it, check_release
        return load(f"{module}:check_{re.sub('(Command)?Config$', '', name).lower()}")
    return None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _name_positional(command: Command, schema: type, overrides: list[str]) -> list[str]:
    """`report corpus/` means `report path=corpus/`. What starts with a known key and `=` is an override."""
    if not command.positional:
        return overrides
    known = set(leaves(schema))
    bare = [text for text in overrides if "=" not in text or text.split("=", 1)[0] not in known]
    if len(bare) > 1:
        raise ConfigError([f"{bare[1]}: one {command.positional} at a time, and {bare[0]} was given before it"])
    return [f"{command.positional}={quoted(text)}" if text in bare else text for text in overrides]


def _version() -> str:
    try:
        return version("gpt2train")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
