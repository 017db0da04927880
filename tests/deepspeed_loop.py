"""A plain DeepSpeed training loop, as one would write it without this project, whose checkpoints are imported.

Beside the checkpoint it writes what DeepSpeed itself says the whole weights and moments are.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def run(loop: dict[str, Any]) -> int:
    """`kind`: hf (transformers' GPT2LMHeadModel) or linear (ours, under nanoGPT's names); `stage`, `precision`."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from gpt2train.config import Device
    from gpt2train.distributed import start

    world = start(Device.cpu, 60)
    # Or it would compile for half a minute what training never calls (see gpt2train/engine.py).
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(7)
    model = _model(loop["kind"])
    bf16 = loop["precision"] == "bf16"
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=1e-3),
            config={
                "train_batch_size": 4,
                "train_micro_batch_size_per_gpu": 4 // world.size,
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": loop["stage"]},
            },
            dist_init_required=False,
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(loop["steps"]):
            tokens = torch.randint(0, 300, (4, 17), generator=generator)[world.rank :: world.size]
            engine.backward(_loss(engine, loop["kind"], tokens))
            engine.step()
        engine.save_checkpoint(loop["to"])
    whole = {}
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if isinstance(optimizer, torch.optim.Optimizer):
            state = optimizer.state[parameter]
            triple = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
        else:
            moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            triple = safe_get_full_fp32_param(parameter), *moments
        for key, tensor in zip(("weight", "exp_avg", "exp_avg_sq"), triple, strict=True):
            whole[f"{key}/{name}"] = tensor.detach().float().clone()
    if world.rank == 0:
        save_file(whole, Path(loop["to"]) / "whole.safetensors")
    return 0


def _model(kind: str) -> torch.nn.Module:
    if kind == "hf":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 50_257}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    from gpt2train.config import ModelConfig
    from gpt2train.model import GPT

    model = torch.nn.Module()
    model.transformer = GPT(ModelConfig(layers=2, channels=16, heads=2, context=16), seed=7)
    model.forward = model.transformer.forward  # type: ignore[method-assign]
    return model


def _loss(engine: Any, kind: str, tokens: torch.Tensor) -> torch.Tensor:
    if kind == "hf":
        return engine(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
    return engine(tokens[:, :-1], tokens[:, 1:])
