"""`python launch/__main__.py RUN_DIR [key=value …] -- COMMAND …`: a launch without anything around it.

What a job script runs on its first node: the settings were checked when the script was written, so nothing but the
standard library is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # by its path, isolated: the folder of the package is not on Python's path
    sys.path.append(str(Path(__file__).parents[1]))

from launch.config import LaunchError
from launch.run import launch
from launch.words import from_words


def main(arguments: Sequence[str]) -> int:
    if "--" not in arguments[1:-1]:
        print("usage: python -m launch RUN_DIR [key=value …] -- COMMAND [ARGUMENT …]", file=sys.stderr)
        return 2
    end = arguments.index("--", 1)
    try:
        return launch(from_words(arguments[1:end]), arguments[end + 1 :], Path(arguments[0]))
    except LaunchError as error:
        for line in str(error).split("\n"):
            print(f"launch: {line}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
