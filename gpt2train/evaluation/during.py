"""The tasks of `evaluate.tasks` while a model trains: prepared once, measured every so many steps.

In: the training's settings and its engine. Out: some scores by name, `task/score`, the same on every rank. The engine's
own forward pass is used, so ZeRO 3 and bf16 are as in training; a compiled model runs eagerly meanwhile, as it would be
compiled anew for each length of batch. Nothing of it is kept for resuming: a measurement is part of its step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.config import Compile, TrainConfig, micro_batch
from gpt2train.distributed import World
from gpt2train.evaluation import measure, sources, tasks
from gpt2train.evaluation.likelihood import plain_forward
from gpt2train.evaluation.measure import Prepared, Subject

STRIDE_SHARE = 2
"""The sliding window over a text moves on by the context over this."""


class TasksDuringTraining:
    """Scores of `config.evaluate.tasks`; a group's tasks whose data are not there are left out.

    Making it reads and encodes the test sets. Raises TaskDataError for a file that its task cannot read.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._config, self._world = config, world
        self._tokenizer = load_tokenizer()
        wanted = [tasks.TASKS[name] for name in tasks.select(config.evaluate.tasks)]
        found = [(task, sources.find(task, config.evaluate.task_data)) for task in wanted if not task.generates]
        self._prepared: list[Prepared] = [
            measure.prepare(
                task,
                sources.read(task, place),
                self._tokenizer,
                config.model,
                stride=max(config.model.context // STRIDE_SHARE, 1),
                budget=micro_batch(config, world.size) * config.model.context,
                limit=config.evaluate.task_limit,
            )
            for task, place in found
            if place is not None
        ]

    def measure(self, engine: Any) -> dict[str, float]:
        """`task/score` → value: of each task the main score and those that were published for GPT-2.

        The engine is put into eval mode and back. All ranks come here together.
        """
        subject = Subject(
            forward=plain_forward(engine),
            config=self._config.model,
            device=self._world.device,
            precision=self._config.precision.value,
        )
        found: dict[str, float] = {}
        was_training = engine.training
        engine.eval()
        compiled = self._config.compile is not Compile.none
        eagerly = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        try:
            with eagerly, engine.module.attention_of_any_device():
                for prepared in self._prepared:
                    scores = measure.measure(prepared, subject, self._tokenizer, world=self._world)
                    task = prepared.task
                    shown = dict.fromkeys([task.metric, *(p.metric for p in task.published)])
                    found |= {f"{task.name}/{name}": scores[name].value for name in shown}
        finally:
            engine.train(was_training)
        return found
