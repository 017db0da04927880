"""Every layout goes on from every other one: ZeRO 0 to 3 on one and two ranks, fp32 and bf16, by `make soak`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training import cut, largest_difference, losses_of, play, settings, write_tokens

HALF, WHOLE = 10, 16
FP32 = [(ranks, stage, "fp32") for ranks in (1, 2) for stage in (0, 1, 2, 3)]
BF16 = [(ranks, stage, "bf16") for ranks in (1, 2) for stage in (1, 2, 3)]
NOISE = {"fp32": 1e-5, "bf16": 5e-3}
"""Largest difference of losses: the promise for fp32; for bf16 what its stages differ by without any restart."""


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_layout_goes_on_from_every_other_one(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")

    def job(name: str, layout: tuple[int, int, str]) -> dict[str, Any]:
        often = {"checkpoint__every_steps": HALF, "evaluate__every_steps": 0, "steps": WHOLE}
        changes = {"zero__stage": layout[1], "precision": layout[2]}
        return {"name": name, "train": settings(tokens, tmp_path / name, **often, **changes)}

    whole = {ranks: [job(_name(one), one) for one in FP32 + BF16 if one[0] == ranks] for ranks in (1, 2)}
    pairs = [(one, other) for layouts in (FP32, BF16) for one in layouts for other in layouts]
    again: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for one, other in pairs:
        name = f"{_name(one)} to {_name(other)}"
        again[other[0]] += [cut(tmp_path, _name(one), name, HALF), job(name, other)]
    answers = play(tmp_path, [(1, whole[1]), (2, whole[2])], timeout_s=3000)
    answers |= play(tmp_path / "again", [(1, again[1]), (2, again[2])], timeout_s=3000)
    assert all(set(answer["codes"]) == {0} for answer in answers.values())
    largest, bitwise = {"fp32": 0.0, "bf16": 0.0}, 0
    for one, other in pairs:
        got, undisturbed = losses_of(tmp_path / f"{_name(one)} to {_name(other)}"), losses_of(tmp_path / _name(one))
        if one == other:
            assert got == undisturbed, one
            bitwise += 1
        difference = largest_difference(got, undisturbed)
        assert difference < NOISE[one[2]], (one, other, difference)
        largest[one[2]] = max(largest[one[2]], difference)
        states = [
            json.loads((tmp_path / name / "checkpoints" / f"step_{WHOLE:08d}" / "state.json").read_text())["data"]
            for name in (f"{_name(one)} to {_name(other)}", _name(one))
        ]
        assert states[0] == states[1], "the same samples"
    print(json.dumps({"pairs": len(pairs), "bitwise": bitwise, "largest_difference": largest}))


def _name(layout: tuple[int, int, str]) -> str:
    return f"{layout[2]} zero{layout[1]} on {layout[0]}"
