"""EleutherAI's lm-evaluation-harness on this project's models, through its own interface.

In: names of the harness's tasks, and a model. Out: the harness's own results. Its requests go through the same scoring
as the tasks of this wing, batched, shared over ranks and resumable, so where both have a task their numbers agree.

The harness is an extra, `pip install gpt2train[harness]`; its tasks fetch their data from the Hugging Face Hub, or,
with `harness_path`, are defined by YAML files at hand that may name local files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from gpt2train.distributed import World
from gpt2train.errors import ConfigError, GPT2TrainError
from gpt2train.evaluation import likelihood, writing
from gpt2train.evaluation.likelihood import COLUMNS, GREEDY, LOG_LIKELIHOOD, Request
from gpt2train.evaluation.measure import ALONE, Subject
from gpt2train.evaluation.work import shared_out
from gpt2train.evaluation.writing import Writing

DEFAULT_NEW_TOKENS = 256
"""What the harness's own models write where a task does not say (lm_eval/models/huggingface.py, `max_gen_toks`)."""


class Scoring:
    """The three questions that the harness asks, without its classes: texts in, numbers and texts out."""

    def __init__(
        self, subject: Subject, tokenizer: Tokenizer, *, budget: int, world: World = ALONE, folder: Path | None = None
    ) -> None:
        self._subject, self._tokenizer, self._budget = subject, tokenizer, budget
        self._world, self._folder = world, folder

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): ln p of the continuation, and whether it is the greedy one."""
        context = self._subject.config.context
        requests = [likelihood.request(self._tokenizer, a, b, limit=context) for a, b in pairs]
        table = self._table(requests)
        return [(float(row[LOG_LIKELIHOOD]), bool(row[GREEDY])) for row in table]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p of each text, in windows that follow each other, as the harness's own models cut them."""
        context = self._subject.config.context
        requests: list[Request] = []
        owner: list[int] = []
        for i, text in enumerate(texts):
            tokens = np.concatenate([[END_OF_TEXT], self._tokenizer.encode(text)]).astype(np.uint16)
            made = likelihood.windows(tokens, context=context, stride=context) if len(tokens) > 1 else []
            requests += made
            owner += [i] * len(made)
        sums = np.zeros(len(texts))
        if requests:
            np.add.at(sums, owner, self._table(requests)[:, LOG_LIKELIHOOD])
        return [float(x) for x in sums]

    def write(self, prompts: Sequence[str], sampling: Writing) -> list[str]:
        """What the model writes after each prompt."""
        model, tokenizer = self._subject.model, self._tokenizer
        assert model is not None
        room = writing.room_for_prompt(model.config, sampling)
        ids = [writing.prompt_ids(tokenizer, prompt, "", limit=room, cut_end=False)[0] for prompt in prompts]
        batches = writing.batches(ids, sampling, model.config, budget=self._budget)
        key = hashlib.sha256(repr((sampling, [i.tobytes() for i in ids], self._subject.weights_sha256)).encode())
        found = shared_out(
            lambda i: writing.write(model, [ids[k] for k in batches[i]], sampling, tokenizer),
            [len(batch) for batch in batches],
            sampling.max_new_tokens,
            world=self._world,
            **self._kept(key.hexdigest()),
        )
        written = [""] * len(prompts)
        for batch, rows in zip(batches, found, strict=True):
            for k, row in zip(batch, rows, strict=True):
                written[k] = writing.until_stop(writing.text_of(row, tokenizer), sampling)
        return written

    def _table(self, requests: Sequence[Request]) -> np.ndarray:
        rows = likelihood.batches(requests, budget=self._budget)
        digest = hashlib.sha256(f"{self._subject.weights_sha256} {self._subject.precision} {self._budget}".encode())
        for request in requests:
            digest.update(b"%d:%d:" % (len(request.tokens), request.predicted) + request.tokens.tobytes())
        found = shared_out(
            lambda i: likelihood.score(self._subject.forward, rows[i], requests, device=self._subject.device),
            [sum(len(row.requests) for row in batch) for batch in rows],
            len(COLUMNS),
            world=self._world,
            **self._kept(digest.hexdigest()),
        )
        return likelihood.scattered(rows, found, len(requests))

    def _kept(self, key: str) -> dict[str, Any]:
        return {"folder": self._folder / key[:16] if self._folder else None, "key": key}


def evaluate(
    names: Sequence[str], scoring: Scoring, *, include_path: str = "", limit: int = 0, bootstrap: int = 1000
) -> dict[str, dict[str, Any]]:
    """The harness's results by task, with its version and its numbers of items.

    Raises ConfigError for a task that the harness does not know, GPT2TrainError when it fails, as where its data cannot
    be fetched.
    """
    lm_eval = _lm_eval()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(names) <= set(manager.all_tasks):  # its own tasks are thousands of files to read
        manager = TaskManager(include_path=include_path or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            [f"harness={name}: lm-evaluation-harness {lm_eval.__version__} has no such task" for name in unknown]
        )
    try:
        found = lm_eval.simple_evaluate(
            model=_model(scoring),
            tasks=list(names),
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=bootstrap,
            log_samples=False,
        )
    except Exception as error:  # its tasks, its data and the datasets library raise kinds of their own
        if getattr(error, "exit_code", None) is not None:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise GPT2TrainError(
            f"lm-evaluation-harness failed on {', '.join(names)}: {first}; where the Hub is out of reach give "
            f"harness_path=FOLDER with task files that name local data"
        ) from error
    version = getattr(lm_eval, "__version__", "unknown")
    return {
        name: {
            "lm_eval": version,
            "version": found["versions"].get(name),
            "items": found["n-samples"].get(name, {}).get("effective"),
            "scores": {k: v for k, v in scores.items() if isinstance(v, int | float)},
        }
        for name, scores in found["results"].items()
    }


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise ConfigError(
            ["harness: lm-evaluation-harness is not installed; `pip install gpt2train[harness]`"]
        ) from None
    return lm_eval


def _model(scoring: Scoring) -> Any:
    """An `lm_eval.api.model.LM` that asks `scoring`; the class is made here because its base is an extra."""
    from lm_eval.api.model import LM

    class GPT2Train(LM):
        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return scoring.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            return scoring.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return _generate(scoring, [request.args for request in requests])

    return GPT2Train()


def _generate(scoring: Scoring, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Prompts grouped by how they are to be written; sampling at a temperature is refused, as it has no one result."""
    groups: dict[Writing, list[int]] = {}
    for i, (_, wanted) in enumerate(asked):
        if wanted.get("do_sample") and float(wanted.get("temperature", 1.0)) > 0:
            raise ConfigError(["harness: a task that samples at a temperature is not supported; choose a greedy one"])
        until = wanted.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        longest = int(wanted.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        groups.setdefault(Writing(longest, tuple(s for s in stops if s), 1, stops_behind_text=False), []).append(i)
    written = [""] * len(asked)
    write: Callable[[Sequence[str], Writing], list[str]] = scoring.write
    for sampling, places in groups.items():
        for i, text in zip(places, write([asked[i][0] for i in places], sampling), strict=True):
            written[i] = text
    return written
