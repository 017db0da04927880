"""Settings of `generate` and `serve`, and their bounds. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gpt2train.bounds import run_faults
from gpt2train.config import Device


@dataclass
class WatermarkConfig:
    """A keyed preference while sampling, that `gpt2train detect` finds again (Kirchenbauer et al. 2023)."""

    key_file: str = ""
    """File with the secret, 16 to 64 bytes; empty: no watermark."""
    green_fraction: float = 0.25
    """Share of the vocabulary that is preferred after each token (the paper's γ)."""
    bias: float = 2.0
    """What is added to the logits of the preferred tokens, in nats (the paper's δ)."""


@dataclass
class SamplingConfig:
    """How tokens are chosen; `generate` and `serve` share it."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 40
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there before get less likely (Keskar et al. 2019, section 4.1); 1: off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a sample; they are not printed. `\\n` stands for a line end."""
    seed: int = 0
    """Seed of the first sample; each further one adds 1."""


@dataclass
class GenerateConfig(SamplingConfig):
    """`gpt2train generate`: a run → text on standard output, all else on standard error."""

    run: str = ""
    """Run folder, checkpoint folder, or a folder in Hugging Face format."""
    prompt: str = ""
    """Text to go on from; empty: from `<|endoftext|>`, as an unconditional sample. `-` reads standard input."""
    prompts: str = ""
    """File of prompts: .jsonl with `prompt` in each line, else one prompt a line."""
    samples: int = 1
    """Samples of each prompt."""
    batch: int = 8
    """Samples made at once; they are printed one after another all the same."""
    echo: bool = True
    """Print the prompt before what follows it."""
    out: str = ""
    """Write JSON lines to this file instead: prompt, text, seed, tokens and why the sample ended."""
    embed: list[str] = field(default_factory=list)
    """Texts to embed instead of going on from them; `-`: one text a line of standard input."""
    embed_to: str = ""
    """New folder for the hidden states: text_00000.npy, fp32 [layers + 1, tokens, channels], and texts.jsonl."""
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)
    device: Device = Device.auto


@dataclass
class ServeConfig:
    """`gpt2train serve`: a page with live text, and POST /v1/completions in OpenAI's form."""

    run: str = ""
    """Run folder, checkpoint folder, or a folder in Hugging Face format."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches another one than 127.0.0.1 may use the model: there is no password."""
    port: int = 8000
    """0: a free one, which is printed."""
    allow_hosts: list[str] = field(default_factory=list)
    """Names under which the page may be asked for, beside localhost and addresses; against DNS rebinding."""
    max_new_tokens: int = 1024
    """Most tokens that one sample may ask for."""
    max_samples: int = 16
    """Most samples of one request: `n` times its prompts."""
    max_waiting: int = 16
    """Requests that may wait for the model; further ones get status 429."""
    max_request_bytes: int = 1 << 20
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)
    device: Device = Device.auto


def sampling_faults(config: SamplingConfig) -> list[str]:
    """Faults of how tokens are chosen."""
    faults = []
    if config.max_new_tokens < 1:
        faults.append(f"max_new_tokens={config.max_new_tokens}: must be above 0; give max_new_tokens=128")
    if not 0 <= config.temperature < float("inf"):
        faults.append(f"temperature={config.temperature}: must be 0 (greedy) or more; give temperature=0.8")
    if config.top_k < 0:
        faults.append(f"top_k={config.top_k}: must be 0 (all) or more; give top_k=40")
    if not 0 < config.top_p <= 1:
        faults.append(f"top_p={config.top_p}: must lie in (0, 1]; give top_p=1.0")
    if not 0 < config.repetition_penalty < float("inf"):
        faults.append(f"repetition_penalty={config.repetition_penalty}: must be above 0; give repetition_penalty=1.2")
    if not all(config.stop):
        faults.append("stop=['']: an empty text would end every sample at once; leave it out")
    if not 0 <= config.seed < 2**63:
        faults.append(f"seed={config.seed}: must lie in [0, 2⁶³); give seed=0")
    return faults


def watermark_faults(config: WatermarkConfig) -> list[str]:
    """Faults of a watermark's settings; the key's file is looked at when it is read."""
    faults = []
    if not 0 < config.green_fraction < 1:
        faults.append(f"watermark.green_fraction={config.green_fraction}: must lie in (0, 1); give 0.25")
    if not 0 < config.bias < float("inf"):
        faults.append(f"watermark.bias={config.bias}: must be above 0; give 2.0")
    return faults


def check_generate(config: GenerateConfig) -> list[str]:
    """All faults of `config`, one line each; empty when it can run."""
    faults = run_faults(config.run) + sampling_faults(config) + watermark_faults(config.watermark)
    for name in ("samples", "batch"):
        if getattr(config, name) < 1:
            faults.append(f"{name}={getattr(config, name)}: must be above 0; give {name}=1")
    if config.prompts and config.prompt:
        faults.append(f"prompts={config.prompts}: beside prompt=…, which of the two? give one")
    if config.prompts and not Path(config.prompts).is_file():
        faults.append(f"prompts={config.prompts}: there is no such file; give one with a prompt in each line")
    if config.embed and (config.prompt or config.prompts):
        faults.append("embed=…: embeds texts and samples nothing; leave prompt and prompts out")
    if bool(config.embed) != bool(config.embed_to):
        faults.append(f"embed_to={config.embed_to}: goes with embed=[…]; give both: embed=[text] embed_to=folder")
    return faults


def check_serve(config: ServeConfig) -> list[str]:
    """All faults of `config`, one line each; empty when it can run."""
    faults = run_faults(config.run) + watermark_faults(config.watermark)
    if not config.host:
        faults.append("host='': must name an address of this machine; give host=127.0.0.1")
    if not 0 <= config.port < 65536:
        faults.append(f"port={config.port}: must lie in 0 … 65535; give port=8000")
    for name in ("max_new_tokens", "max_samples", "max_waiting", "max_request_bytes"):
        if getattr(config, name) < 1:
            faults.append(f"{name}={getattr(config, name)}: must be above 0")
    return faults
