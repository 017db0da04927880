"""Matrix products in fp8: the linear layers of the blocks as torchao's Float8Linear.

Flows in: a model. Flows out: the same model, whose blocks' products are made in 8-bit floats, scaled anew for each
tensor, with bf16 in and out; parameters, their names and the checkpoint stay. Embedding, head and norms stay as they
are. A product of fp8 is up to twice as fast as one of bf16 on an H100 and loses digits: compare losses before a long
run. Worth it only under torch.compile, which fuses the scaling.

torchao (an extra, `gpt2train[fp8]`) is imported here alone, when it is asked for.
"""

from __future__ import annotations

import torch
from torch import nn

from gpt2train.errors import ConfigError

LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability with fp8 products (NVIDIA, "CUDA C++ Programming Guide", arithmetic instructions)."""


def to_float8(model: nn.Module, device: torch.device, *, emulate: bool = False) -> None:
    """Changes `model` in place, before an optimizer or DeepSpeed sees it.

    `emulate` makes the same roundings with ordinary products, on any device. Raises ConfigError where torchao is not
    installed or the device has no fp8.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError([f"kernels.fp8=true: {name} has no fp8 products; take an H100 or newer, or leave it out"])
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            [f"kernels.fp8=true: torchao cannot be imported ({error}); pip install 'gpt2train[fp8]', or leave it out"]
        ) from None

    def in_a_block(module: nn.Module, name: str) -> bool:
        return name.startswith("h.")

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=in_a_block)
