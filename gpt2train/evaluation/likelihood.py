"""Token sequences → how likely a model finds their ends: the one forward pass behind all scores.

In: requests, each some tokens of which the last few are predicted from all before them; a completion, a window of a
long text and a word are all such requests. Out: for each a few sums over its predicted tokens.

Little is computed twice or for nothing. A request whose input begins another one's shares that row, as the four
one-token answers to one question do; rows go longest first, those of like length together, padded on the right, where a
causal model does not look; and logits are made of the predicted positions alone. What is in a batch depends on the
requests, the context and the budget, never on ranks or on what was done before, so every number repeats exactly.

Shapes: B rows of a batch, T tokens of its longest row, M predicted positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from gpt2train.network.loss import CHUNK_POSITIONS

COLUMNS = ("log_likelihood", "greedy", "greedy_filtered", "last_log_likelihood", "last_greedy")
"""Of each request: the sum of ln p over its predicted tokens (nats); 1 where each is the model's first choice; 1 where
each is so and the first of them among the tokens that are not filtered; and the first two of the last token alone."""
LOG_LIKELIHOOD, GREEDY, GREEDY_FILTERED, LAST_LOG_LIKELIHOOD, LAST_GREEDY = range(len(COLUMNS))

Forward = Callable[[Tensor, Tensor], Tensor]
"""tokens_BT (int64), at_M (int64, flat positions) → logits_MV."""


@dataclass(frozen=True)
class Request:
    """`tokens[:-1]` is read; the last `predicted` tokens are what is asked for."""

    tokens: np.ndarray
    """uint16[at most context + 1]"""
    predicted: int
    truncated: bool = False
    """Did the context not hold all of it?"""


@dataclass
class Row:
    """One row of a batch: the input that some requests share."""

    tokens: np.ndarray
    requests: list[int] = field(default_factory=list)
    positions: int = 0
    """Distinct positions whose logits are needed."""


def request(tokenizer: Tokenizer, context: str, continuation: str, *, limit: int) -> Request:
    """The continuation's tokens, given the context; both are encoded together, as the text that they make.

    A token over the border belongs to the continuation, and the spaces that end the context do too, as in
    lm-evaluation-harness. An empty context is `<|endoftext|>`. Of more than `limit` + 1 tokens the last ones stay.
    """
    stripped = context.rstrip()
    if stripped:
        continuation, context = context[len(stripped) :] + continuation, stripped
    tokens = tokenizer.encode(context + continuation)
    bare = len(tokenizer.encode(context))
    if not np.array_equal(tokenizer.encode(context), tokens[:bare]):
        border = len(context.encode("utf-8", "replace"))
        ends = np.cumsum([len(tokenizer.decode_bytes([token])) for token in tokens.tolist()])
        bare = int(np.searchsorted(ends, border, side="right"))
    predicted = len(tokens) - bare
    if bare == 0:
        tokens = np.concatenate([np.array([END_OF_TEXT], tokens.dtype), tokens])
    assert predicted > 0, f"an empty continuation after {context[-40:]!r}"
    kept = tokens[-(limit + 1) :]
    return Request(kept, min(predicted, limit), truncated=len(kept) < len(tokens))


def windows(tokens: np.ndarray, *, context: int, stride: int) -> list[Request]:
    """A long text (its first token read only, all others predicted once) as a sliding window over it.

    A window is as long as the context, or as the text where that is shorter. The first predicts all its tokens; each
    further one ends `stride` tokens later and predicts only those that no window before it did, so each token but the
    first window's sees at least context - stride tokens.
    """
    targets = len(tokens) - 1
    length = min(context, targets)
    stride = min(stride, length)
    ends = [*range(length, targets, stride), targets]
    fresh = [length, *(b - a for a, b in itertools.pairwise(ends))]
    return [Request(tokens[end - length : end + 1], count) for end, count in zip(ends, fresh, strict=True)]


def batches(requests: Sequence[Request], *, budget: int) -> list[list[Row]]:
    """Rows in batches of at most `budget` tokens with their padding and CHUNK_POSITIONS logits, or of one row."""
    ordered = sorted(_rows(requests), key=lambda row: len(row.tokens), reverse=True)  # stable
    made: list[list[Row]] = []
    positions = 0
    for row in ordered:
        full = made and (
            len(made[-1][0].tokens) * (len(made[-1]) + 1) > budget or positions + row.positions > CHUNK_POSITIONS
        )
        if not made or full:
            made.append([])
            positions = 0
        made[-1].append(row)
        positions += row.positions
    return made


def _rows(requests: Sequence[Request]) -> list[Row]:
    """Requests by their inputs; one that begins another's shares its row. In the order of the requests."""
    # As big-endian bytes, sorting puts every input right before those that it begins.
    inputs = [request.tokens[:-1].astype(">u2").tobytes() for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (inputs[i], i))
    rows: list[Row] = []
    host = b""
    for i in reversed(order):
        if not (rows and host.startswith(inputs[i])):
            rows.append(Row(requests[i].tokens[:-1]))
            host = inputs[i]
        rows[-1].requests.append(i)
    for row in rows:
        row.requests.sort()
        row.positions = len({p for i in row.requests for p in _positions(requests[i])})
    return sorted(rows, key=lambda row: row.requests[0])


def _positions(request: Request) -> range:
    """Positions of the row whose logits predict the request's last tokens."""
    end = len(request.tokens) - 1
    return range(end - request.predicted, end)


def plain_forward(
    model: Callable[..., Tensor], *, autocast: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Forward:
    """The model's own forward pass, under autocast where a dtype is given."""

    def forward(tokens_BT: Tensor, at_M: Tensor) -> Tensor:
        if autocast is None:
            return model(tokens_BT, at_M=at_M)
        with torch.autocast(torch.device(device).type, autocast):
            return model(tokens_BT, at_M=at_M)

    return forward


@torch.no_grad()
def score(
    forward: Forward,
    batch: Sequence[Row],
    requests: Sequence[Request],
    *,
    device: torch.device | str,
    filtered: Tensor | None = None,
) -> np.ndarray:
    """float64 [requests of the batch, len(COLUMNS)], row by row and in each row by request.

    `filtered`: int64 ids that `greedy_filtered` does not take for a first choice.
    """
    longest = max(len(row.tokens) for row in batch)
    tokens_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
    at: dict[int, int] = {}  # flat position → its place among the logits
    asked: list[tuple[Request, list[int]]] = []
    for b, row in enumerate(batch):
        tokens_BT[b, : len(row.tokens)] = torch.from_numpy(row.tokens.astype(np.int64))
        for i in row.requests:
            flat = [b * longest + p for p in _positions(requests[i])]
            asked.append((requests[i], [at.setdefault(p, len(at)) for p in flat]))
    logits_MV = forward(tokens_BT.to(device), torch.tensor(list(at), device=device))
    places = torch.tensor([place for _, of_request in asked for place in of_request], device=device)
    targets = torch.from_numpy(
        np.concatenate([request.tokens[-request.predicted :] for request, _ in asked]).astype(np.int64)
    ).to(device)
    log_sums_M = torch.logsumexp(logits_MV.float(), dim=-1)
    log_p = logits_MV[places, targets].float().double() - log_sums_M[places].double()
    hit = logits_MV.argmax(dim=-1)[places] == targets
    starts = torch.tensor([0, *itertools.accumulate(len(of_request) for _, of_request in asked)][:-1], device=device)
    first_hit = hit[starts]
    if filtered is not None:
        first_hit = (
            logits_MV[places[starts]].index_fill_(1, filtered.to(device), -torch.inf).argmax(-1) == targets[starts]
        )
    numbers = torch.stack([log_p, hit.double()]).cpu().numpy()  # host-device sync, once a batch
    first = first_hit.cpu().numpy()
    found = np.empty((len(asked), len(COLUMNS)))
    begin = 0
    for k, (request, _) in enumerate(asked):
        log_p_of, hits = numbers[:, begin : begin + request.predicted]
        begin += request.predicted
        found[k] = (
            log_p_of.sum(),
            hits.min(),
            min(float(first[k]), hits[1:].min(initial=1.0)),
            log_p_of[-1],
            hits[-1],
        )
    return found


def scattered(batches_of_rows: Iterable[Sequence[Row]], found: Iterable[np.ndarray], count: int) -> np.ndarray:
    """float64 [requests, columns] in the order of the requests, from the batches' results."""
    table = np.full((count, len(COLUMNS)), np.nan)
    for batch, rows in zip(batches_of_rows, found, strict=True):
        table[[i for row in batch for i in row.requests]] = rows
    assert not np.isnan(table[:, LAST_GREEDY]).any(), "every request is in one row"
    return table


def first_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> Tensor:
    """int64: the single tokens that are a space and one of `words`, in small letters or with a capital."""
    found = {
        int(ids[0])
        for word in words
        for form in (f" {word}", f" {word.capitalize()}")
        if len(ids := tokenizer.encode(form)) == 1
    }
    return torch.tensor(sorted(found))
