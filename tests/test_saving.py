"""Saves beside the training: one at a time, nothing waits but the next one, and no error is lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from gpt2train.distributed import World
from gpt2train.errors import CheckpointError, GPT2TrainError
from gpt2train.saving.saver import Saver

ALONE = World(0, 1, 0, torch.device("cpu"))


def refuse(world: World) -> None:
    raise CheckpointError("no room")


def test_the_step_goes_on_and_the_next_save_waits() -> None:
    saver = Saver(ALONE, background=True)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def first(world: World) -> None:
        begun.set()
        assert go_on.wait(10)
        order.append("first")

    saver.start(first)
    assert begun.wait(10)
    assert order == []  # `start` is back, the save is under way
    second = threading.Thread(target=lambda: saver.start(lambda world: order.append("second")))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    second.join(10)
    saver.wait()
    assert order == ["first", "second"]


def test_an_error_is_raised_once_by_whoever_asks_next() -> None:
    saver = Saver(ALONE, background=True)
    saver.start(refuse)
    end = time.monotonic() + 10
    while not saver.failed:
        assert time.monotonic() < end
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="no room"):
        saver.fail()
    assert not saver.failed
    saver.wait()
    with pytest.raises(GPT2TrainError, match="another rank could not save"):
        saver.fail()


def test_in_front_it_happens_at_once() -> None:
    saver = Saver(ALONE, background=False)
    threads: list[threading.Thread] = []
    saver.start(lambda world: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]
    with pytest.raises(CheckpointError, match="no room"):
        saver.start(refuse)
