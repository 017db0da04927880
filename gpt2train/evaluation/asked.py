"""Tasks that are asked for → what keeps them from being measured, told before a model is loaded.

In: names and folders from the settings. Out: one line a fault. Cost: a look at each usual file name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2train.evaluation import sources, tasks


def task_faults(
    names: Sequence[str], places: Sequence[str], field_name: str, places_name: str, *, writing: bool
) -> list[str]:
    """Unknown tasks, folders that are not there, and tasks named one by one whose file no folder holds."""
    if not names and not places:
        return []
    faults = tasks.faults(names, field_name)
    faults += [
        f"{places_name}={place}: there is no such folder; give one with the tasks' files, or `{sources.HUB}`"
        for place in places
        if place != sources.HUB and not Path(place).exists()
    ]
    if faults:
        return faults
    for name in tasks.select(names):
        task = tasks.TASKS[name]
        if task.generates and not writing:
            faults.append(f"{field_name}={name}: writes text; measure it with `gpt2train evaluate` after training")
        elif name in names and sources.find(task, places) is None:
            wanted = " or ".join(task.files)
            hub = f", or `{sources.HUB}`" if task.hub else ""
            faults.append(f"{field_name}={name}: no folder of {places_name} holds {wanted}; give its folder{hub}")
    for group in (name for name in names if name in tasks.GROUPS):
        if not any(sources.find(tasks.TASKS[name], places) for name in tasks.GROUPS[group]):
            faults.append(
                f"{field_name}={group}: no folder of {places_name} holds a file of its tasks; docs/evaluation.md "
                f"lists them"
            )
    return faults
