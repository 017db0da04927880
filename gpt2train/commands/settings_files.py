"""`@FILE` on a command line: the settings that stand in a file, one a line.

What a site needs each time (partition, account, modules) is written down once:

    # site.txt
    launcher=slurm
    slurm.partition=gpu
    slurm.setup=['module load cuda/12.6']

A line is taken as it is, without a shell's quoting. What follows on the command line wins over what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2train.errors import ConfigError


def expand(arguments: Sequence[str]) -> list[str]:
    """`arguments` with each `@FILE` replaced by its lines. Raises ConfigError with all that is wrong with the files."""
    faults: list[str] = []
    expanded: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        path = Path(argument[1:]).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            faults.append(f"{argument}: {reason}; give a file with one key=value a line")
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            setting = line.strip()
            if not setting or setting.startswith("#"):
                continue
            if "=" not in setting or setting.startswith(("@", "-")):
                faults.append(f"{argument}, line {number}: {setting}: is not of the form key=value")
            else:
                expanded.append(setting)
    if faults:
        raise ConfigError(faults)
    return expanded
