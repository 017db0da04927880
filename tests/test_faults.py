"""The rule for spikes against the definition, computed anew; its memory goes through JSON unchanged."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from gpt2train.bounds import check
from gpt2train.config import FaultAction, FaultsConfig, TrainConfig
from gpt2train.faults import FaultRule


def test_a_spike_is_what_the_definition_says() -> None:
    config = FaultsConfig(spike_sigma=3.0, spike_window=20)
    rule, rng = FaultRule(config), random.Random(5)
    losses: list[float] = []
    spikes = 0
    for step in range(1, 400):
        loss = rng.gauss(4.0, 0.1) + (rng.random() < 0.05) * rng.random()
        window = np.array(losses[-20:])
        expected = len(window) == 20 and loss > window.mean() + 3.0 * window.std()
        assert (rule.judge_loss(loss) is not None) == expected, step
        if expected:
            spikes += 1
            rule.skip(step)
        else:
            rule.accept(loss, 1.0)
            losses.append(loss)
        if step % 50 == 0:  # as a resume does
            again = FaultRule(config)
            again.restore({"faults": json.loads(json.dumps(rule.to_state()))})
            rule = again
    assert spikes == len(rule.skipped) > 5
    assert rule.updates(399) == 399 - spikes


def test_norms_have_a_bound_and_losses_without_a_rule_have_none() -> None:
    rule = FaultRule(FaultsConfig(spike_sigma=2.0, spike_window=4))
    for norm in (1.0, 2.0, 1.0, 2.0):
        assert rule.highest_norm == math.inf
        rule.accept(3.0, norm)
    assert rule.highest_norm == pytest.approx(1.5 + 2 * 0.5)
    assert "a spike: 3.0σ above 1.5" in str(rule.judge_norm(3.0))
    assert rule.judge_norm(2.4) is None
    free = FaultRule(FaultsConfig())
    for _ in range(300):
        free.accept(1.0, 1.0)
    assert free.judge_loss(1e30) is None
    assert free.judge_loss(math.nan) == "loss nan"
    assert free.judge_norm(math.inf) == "gradient norm inf"


def test_actions_and_their_limit() -> None:
    rule = FaultRule(FaultsConfig(FaultAction.skip, spike_action=FaultAction.rewind, limit=2))
    assert rule.action(math.nan, 1.0) is rule.action(1.0, math.inf) is FaultAction.skip
    assert rule.action(9.0, 1.0) is FaultAction.rewind
    rule.skip(3)
    rule.rewind(10, to=8, state={"faults": rule.to_state()})
    assert rule.action(9.0, 1.0) is rule.action(math.nan, 1.0) is FaultAction.stop


def test_rewinds_add_up_over_checkpoints_before_and_between_them() -> None:
    rule = FaultRule(FaultsConfig())
    at_20 = {"faults": rule.to_state()}
    rule.skip(25)
    rule.rewind(26, to=20, state=at_20)
    assert (rule.offset, rule.skipped) == (6, [])  # step 21 gets the batch after 26's
    rule.rewind(23, to=20, state=at_20)
    assert rule.offset == 9  # and now the one after 29's, which step 23 had
    at_40 = {"faults": json.loads(json.dumps(rule.to_state()))}
    rule.rewind(41, to=40, state=at_40)
    assert rule.offset == 10
    assert rule.rewinds == [{"from": 26, "to": 20}, {"from": 23, "to": 20}, {"from": 41, "to": 40}]


def test_states_written_without_faults_are_read() -> None:
    rule = FaultRule(FaultsConfig())
    rule.skip(1)
    rule.restore({"step": 40})
    assert (rule.skipped, rule.rewinds, rule.offset, rule.updates(40)) == ([], [], 0, 40)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"faults.spike_window": 1}, "faults.spike_window=1: must be at least 2"),
        ({"faults.spike_sigma": -1.0}, "faults.spike_sigma=-1.0: must be 0 or more"),
        ({"faults.nonfinite": FaultAction.rewind, "checkpoint.every_steps": 0}, "rewinding needs a checkpoint"),
        ({"checkpoint.keep_best": True, "checkpoint.every_steps": 20, "evaluate.every_steps": 8}, "multiple of eval"),
        ({"checkpoint.keep_best": True, "evaluate.every_steps": 0}, "checkpoint.keep_best=true: each saved step"),
        ({"data.reset_positions": True}, "needs data.document_mask=true"),
        ({"data.document_mask": True, "model.vocabulary": 300}, "has no <|endoftext|>"),
        ({"evaluate.sample_prompt": "A", "evaluate.every_steps": 0}, "samples come after evaluations"),
        ({"evaluate.sample_tokens": 0}, "evaluate.sample_tokens=0: must be at least 1"),
        ({"deepspeed.extra": {"zero_optimization": {"compute_grad_norm": False}}}, "known to be finite"),
        ({"profile.steps": [3]}, r"profile.steps=[3]: must be [first, last]"),
        ({"profile.steps": [3, 2]}, "counted from 1"),
    ],
)
def test_settings_that_cannot_work_are_named(change: dict[str, object], fault: str) -> None:
    config = TrainConfig(run_dir="run", steps=10)
    config.data.path = "tokens"
    assert check(config) == []
    for name, value in change.items():
        room, setting = name.split(".")
        setattr(getattr(config, room), setting, value)
    (line,) = check(config)
    assert fault in line
    assert line.startswith(next(iter(change))) or "checkpoint.every_steps" in line
