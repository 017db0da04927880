"""Tokens per second of generation at batch 1, or more, beside transformers' `generate`, on the same weights.

Both decode in fp32 with their caches (transformers' default, dynamic), with as many threads, from the same prompt:
greedily, sampled by top-k and sampled by top-p with the same settings. They take turns, and each round gives a ratio,
so that a machine that slows down does so for both; what is told is the ratio of the medians and the least and largest
of the rounds. Ours runs without and with guesses from the text's own past (gpt2train/generation/drafting.py), since how
much those bring depends on how much a text repeats: untrained weights, the default, repeat themselves more than most
when greedy, so give `--run` for a trained model's figures. What is compared are CPU seconds where there is no GPU.
`OMP_NUM_THREADS=1` gives one thread to both, which is also where ours has products of its own
(gpt2train/generation/products.py).

    python -m benchmarks.generation [--model small] [--run RUN] [--prompt TEXT] [--tokens 64] [--batch 1] [--rounds 3]
                                    [--json FILE]

With `--batch` all rows have the same prompt and, sampled, numbers of their own; more than one row has no guesses.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.compose import CONFIG_FOLDER, compose
from gpt2train.config import TrainConfig
from gpt2train.generation.decoding import DRAFT_TOKENS, Decoding
from gpt2train.generation.products import lay_for_decoding
from gpt2train.generation.sampling import GREEDY, Sampling
from gpt2train.model import GPT
from gpt2train.release.hf import hf_config, load_model, to_hf_state

GOAL = 1.2
"""Of transformers' tokens per second, what ours is to reach."""
PROMPT = "In a shocking finding, scientists discovered a herd of unicorns living in a remote valley."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--run", default="", help="a run, or a folder in Hugging Face format, instead of new weights")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a text")
    parser.add_argument("--batch", type=int, default=1, help="rows, all with the same prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="file for the numbers")
    options = parser.parse_args()
    result = compare(
        options.model,
        run=options.run,
        prompt=options.prompt,
        tokens=options.tokens,
        batch=options.batch,
        rounds=options.rounds,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def compare(
    name: str, *, run: str = "", prompt: str = PROMPT, tokens: int = 64, batch: int = 1, rounds: int = 3
) -> dict[str, Any]:
    """Prints the table; tokens per second by job, and the ratio of the medians to transformers'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(run, device) if run else _new(name).to(device).eval()
    theirs = _theirs(model).to(device)
    lay_for_decoding(model)
    ids = load_tokenizer().encode(prompt).tolist()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)

    def ours(sampling: Sampling, draft_tokens: int) -> list[list[int]]:
        rows = Decoding(
            model, [ids] * batch, sampling, seeds=range(batch), max_new_tokens=tokens, draft_tokens=draft_tokens
        )
        texts: list[list[int]] = [[] for _ in range(batch)]
        for row, token in rows:
            texts[row].append(token)
        return texts

    def transformers_generate(**how: Any) -> list[list[int]]:
        given = torch.tensor([ids] * batch, device=device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            texts = theirs.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, pad_token_id=0, **how
            )
        return texts[:, len(ids) :].tolist()

    ways: dict[str, tuple[dict[str, Any], Sampling]] = {
        "greedy": ({"do_sample": False}, GREEDY),
        "top-k": (
            {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 1.0},
            Sampling(temperature=0.8, top_k=40),
        ),
        "top-p": (
            {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.9},
            Sampling(temperature=0.8, top_p=0.9),
        ),
    }
    jobs: dict[str, Callable[[], list[list[int]]]] = {}
    for way, (how, sampling) in ways.items():
        jobs[f"{way}, transformers"] = functools.partial(transformers_generate, **how)
        jobs[f"{way}, one by one"] = functools.partial(ours, sampling, 0)
        if batch == 1:
            jobs[f"{way}, with guesses"] = functools.partial(ours, sampling, DRAFT_TOKENS)
    rates: dict[str, list[float]] = {job: [] for job in jobs}
    per_pass: dict[str, float] = {}
    texts: dict[str, list[list[int]]] = {}
    for round_number in range(rounds + 1):
        for job, act in jobs.items():
            passes, begin = 0, _clock(device)
            texts[job] = act()
            took_s = _clock(device) - begin
            made = sum(map(len, texts[job]))
            if passes:
                per_pass[job] = made / passes
            if round_number:  # the first round warms up
                rates[job].append(made / took_s)
    same = all(found == texts["greedy, transformers"] for job, found in texts.items() if job.startswith("greedy"))
    unit = "tokens/s" if device.type == "cuda" else "tokens per CPU second"
    print(
        f"\n{run or name} at batch {batch}, {len(ids)} + {tokens} tokens, {torch.get_num_threads()} threads, {device}"
    )
    print(f"{'':<24}{unit:>24}{'tokens a pass':>16}{'of transformers':>18}{'by round':>16}")
    result: dict[str, Any] = {"unit": unit, "rates": rates, "ratios": {}, "greedy_texts_equal": same}
    for job, found in rates.items():
        reference = rates[f"{job.split(',')[0]}, transformers"]
        ratio = statistics.median(found) / statistics.median(reference)
        rounds_of = [a / b for a, b in zip(found, reference, strict=True)]
        result["ratios"][job] = ratio
        shown = f"{per_pass[job]:>16.2f}" if job in per_pass else f"{'1':>16}"
        spread = f"{min(rounds_of):.2f} to {max(rounds_of):.2f}"
        print(f"{job:<24}{statistics.median(found):>24.1f}{shown}{ratio:>18.2f}{spread:>16}")
    print(f"greedy texts {'equal token for token' if same else 'DIFFER'}; the goal is {GOAL} of transformers")
    return result


def _new(name: str) -> GPT:
    config = compose(TrainConfig, [f"model={name}"], groups=CONFIG_FOLDER / "train").model
    return GPT(config, seed=0)


def _theirs(model: GPT) -> Any:
    import transformers

    fields = {k: v for k, v in hf_config(model.config).items() if k not in ("architectures", "model_type")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    state = to_hf_state(model.state_dict(), model.config)
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]}, strict=False)
    return theirs


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
