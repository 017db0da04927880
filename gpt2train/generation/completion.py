"""A request for completions in OpenAI's form → what to sample; and the answers.

The form is that of POST /v1/completions in OpenAI's API reference ("Completions", its legacy text endpoint), with
`top_k` and `repetition_penalty` beside it. What is asked for and not offered is refused by name, never passed over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer
from gpt2train.generation.config import ServeConfig
from gpt2train.generation.sampling import Sampling
from gpt2train.generation.watermark import Watermark

MAX_STOPS = 4
"""As OpenAI's."""
DEFAULT_MAX_TOKENS = 16
"""As OpenAI's."""
PASSED_OVER = ("user", "model", "stream_options")
"""Fields that change nothing here; `stream_options` counts where it asks for the usage."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "suffix": (None, ""),
}
"""Fields that are not offered, with the values that ask for nothing."""


class RequestError(Exception):
    """A request that cannot be taken; `parameter` is the field."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter, self.status = parameter, status

    def body(self) -> dict[str, Any]:
        """In the form of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": None}}


@dataclass
class Completion:
    """What to sample, and who asked."""

    prompts: list[str]
    ids: list[list[int]]
    """A row for each sample: `samples` after one another for each prompt."""
    samples: int
    sampling: Sampling
    max_new_tokens: int
    stop: list[str]
    seed: int
    stream: bool
    echo: bool
    include_usage: bool
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_of(self, row: int) -> str:
        return self.prompts[row // self.samples]

    def piece(self, row: int, text: str, reason: str | None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"text": text, "index": row, "logprobs": None, "finish_reason": reason}
        return {**self._head(), "choices": [choice]}

    def whole(self, texts: Sequence[str], reasons: Sequence[str], new_tokens: int) -> dict[str, Any]:
        """The answer where nothing was streamed."""
        choices = [
            {"text": text, "index": row, "logprobs": None, "finish_reason": reason}
            for row, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head(), "choices": choices, "usage": self.usage(new_tokens)}

    def usage_event(self, new_tokens: int) -> dict[str, Any]:
        """The last event of a stream that asked for it."""
        return {**self._head(), "choices": [], "usage": self.usage(new_tokens)}

    def usage(self, new_tokens: int) -> dict[str, int]:
        prompts = sum(len(self.ids[row]) for row in range(0, len(self.ids), self.samples))
        return {"prompt_tokens": prompts, "completion_tokens": new_tokens, "total_tokens": prompts + new_tokens}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


def read_request(
    body: Any, config: ServeConfig, *, model: str, context: int, tokenizer: Tokenizer, watermark: Watermark | None
) -> Completion:
    """Raises RequestError naming the field, its bound and what to give instead."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    known = {"prompt", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "n", "stream", "stop",
             "seed", "echo", *PASSED_OVER, *NEUTRAL}  # fmt: skip
    for name in body:
        if name not in known:
            raise RequestError(f"{name}: there is no such field; known are {', '.join(sorted(known))}", name)
    for name, neutral in NEUTRAL.items():
        if name in body and body[name] not in neutral:
            raise RequestError(f"{name}={body[name]!r}: is not offered here; leave it out", name)
    prompts, prompt_ids = _prompts(body.get("prompt", ""), context, tokenizer)
    samples = _whole(body, "n", 1, 1, config.max_samples)
    if samples * len(prompts) > config.max_samples:
        raise RequestError(
            f"n={samples} for {len(prompts)} prompts: at most {config.max_samples} samples a request (max_samples)", "n"
        )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise RequestError(f"stop: must be a text, or up to {MAX_STOPS} of them, none empty", "stop")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError("stream_options: must be an object", "stream_options")
    return Completion(
        prompts=prompts,
        ids=[ids for ids in prompt_ids for _ in range(samples)],
        samples=samples,
        sampling=Sampling(
            temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
            top_k=_whole(body, "top_k", 0, 0, VOCABULARY),
            top_p=_number(body, "top_p", 1.0, 1e-9, 1.0),
            repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.01, 100.0),
            watermark=watermark,
        ),
        max_new_tokens=_whole(body, "max_tokens", DEFAULT_MAX_TOKENS, 1, config.max_new_tokens),
        stop=stop,
        seed=_whole(body, "seed", uuid.uuid4().int % 2**31, 0, 2**62),
        stream=_flag(body, "stream"),
        echo=_flag(body, "echo"),
        include_usage=bool(options.get("include_usage")),
        model=model,
    )


def _prompts(prompt: Any, context: int, tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    """A text, several, a list of ids, or several of those."""
    is_ids = isinstance(prompt, list) and prompt and all(isinstance(p, int) for p in prompt)
    given = [prompt] if isinstance(prompt, str) or is_ids else prompt
    if not isinstance(given, list) or not given:
        raise RequestError("prompt: must be a text, a list of texts, or token ids", "prompt")
    texts, rows = [], []
    for one in given:
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise RequestError("prompt: holds half a surrogate pair, which is no text", "prompt") from None
            text, ids = one, tokenizer.encode(one).tolist()
        elif isinstance(one, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in one):
            if not all(0 <= i < VOCABULARY for i in one):
                raise RequestError(f"prompt: token ids must lie in 0 … {VOCABULARY - 1}", "prompt")
            text, ids = tokenizer.decode(one), one
        else:
            raise RequestError("prompt: must be a text, a list of texts, or token ids", "prompt")
        if len(ids) > context:
            raise RequestError(
                f"prompt: has {len(ids)} tokens, and the model's context is {context}; give a shorter one", "prompt"
            )
        texts.append(text)
        rows.append(ids or [END_OF_TEXT])
    return texts, rows


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name}={value!r}: must be a number in [{least:g}, {most:g}]", name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name}={value!r}: must be a whole number in [{least}, {most}]", name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise RequestError(f"{name}={value!r}: must be true or false", name)
    return value
