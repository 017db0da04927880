"""Kernels that may be chosen: each gives the same losses and gradients, or is refused with a remedy."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from gpt2train.bounds import check
from gpt2train.config import (
    ActivationCheckpointing,
    AttentionKernel,
    Compile,
    CompileMode,
    KernelsConfig,
    LossKernel,
    ModelConfig,
    Positions,
    Precision,
    TrainConfig,
    ZeroConfig,
)
from gpt2train.errors import ConfigError
from gpt2train.model import GPT
from gpt2train.network import documents
from gpt2train.network.attention import one_kernel
from gpt2train.network.flexible import require_gpu
from gpt2train.network.float8 import to_float8

TINY = ModelConfig(layers=2, channels=32, heads=2, context=24, vocabulary=301)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def gradients(model: GPT) -> list[torch.Tensor]:
    x = torch.randint(0, 301, (3, 25), generator=torch.Generator().manual_seed(1))
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kernel", [AttentionKernel.flash, AttentionKernel.math])
def test_attention_kernels_of_a_cpu_agree(kernel: AttentionKernel) -> None:
    for one, other in zip(gradients(GPT(TINY)), gradients(GPT(TINY, attention_kernel=kernel)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch tells why each kernel cannot serve
def test_the_chosen_kernel_alone_is_taken() -> None:
    model = GPT(TINY, attention_kernel=AttentionKernel.cudnn)
    assert {block.attn.kernel for block in model.h} == {AttentionKernel.cudnn}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"[Nn]o available kernel|No viable backend"):
            gradients(model)
    with one_kernel(AttentionKernel.math):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as it is on a CPU
@pytest.mark.parametrize("modern", [False, True])
def test_flex_attention_is_the_same_attention(modern: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward alone: torch has no backward pass of it for a CPU."""
    monkeypatch.setattr(documents, "END_OF_TEXT", 7)
    config = dataclasses.replace(TINY, context=300)
    if modern:
        config = dataclasses.replace(config, positions=Positions.rotary, qk_norm=True, mup_base=16)
    x = torch.randint(0, 301, (3, 301), generator=torch.Generator().manual_seed(1))
    x[:, ::29] = 7
    found = []
    for within, reset in ((False, False), (True, False), (True, True)):
        losses = []
        for kernel in (AttentionKernel.auto, AttentionKernel.flex):
            model = GPT(config, document_mask=within, reset_positions=reset, attention_kernel=kernel)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(4)  # so that attention is far from even
                losses.append(torch.stack([model(x[:, :T], x[:, 1 : T + 1]) for T in (300, 129, 5)]))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
        found.append(losses[1])
    for masked in found[1:]:
        assert (masked - found[0]).abs()[:2].min() > 1e-3, "the mask counts"


def test_flex_attention_gives_way_where_nothing_is_compiled() -> None:
    plain, flexible = (
        GPT(TINY, document_mask=True),
        GPT(TINY, document_mask=True, attention_kernel=AttentionKernel.flex),
    )
    with flexible.attention_of_any_device():
        assert torch.equal(gradients(flexible)[0], gradients(plain)[0])
    assert flexible.attention_kernel is AttentionKernel.flex


def test_flex_attention_does_not_train_on_a_cpu_and_takes_no_dropout() -> None:
    with pytest.raises(ConfigError, match=r"kernels.attention=flex: trains on a CUDA GPU alone, not on cpu; give"):
        require_gpu(torch.device("cpu"))
    config = TrainConfig(kernels=KernelsConfig(AttentionKernel.flex), model=ModelConfig(dropout=0.1))
    config.data.path, config.run_dir, config.data.document_mask = "tokens", "run", True
    config.activation_checkpointing = ActivationCheckpointing.selective
    faults = "\n".join(check(config))
    assert "kernels.attention=flex: has no dropout, and model.dropout=0.1; give model.dropout=0" in faults
    assert "kernels.attention=flex: activation_checkpointing=selective cannot keep" in faults
    config.model.dropout, config.activation_checkpointing = 0.0, ActivationCheckpointing.full
    assert "kernels.attention" not in "\n".join(check(config))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("within", [False, True])
def test_flex_attention_trains_on_a_gpu(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "END_OF_TEXT", 7)
    config = dataclasses.replace(TINY, context=256)
    x = torch.randint(0, 301, (3, 257), generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for kernel in (AttentionKernel.auto, AttentionKernel.flex):
        model = GPT(config, document_mask=within, attention_kernel=kernel).cuda()
        model(x[:, :-1], x[:, 1:]).backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


INTERPRETED = """
import torch
from torch.nn import functional as F
from gpt2train.network import loss_kernel
from gpt2train.network.loss import cross_entropy

loss_kernel.BLOCK = 128  # several blocks a row, the last one ragged
generator = torch.Generator().manual_seed(0)
for softcap in (0.0, 15.0):
    for dtype, exact in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        x = torch.randn(7, 16, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(384, 16, generator=generator).to(dtype).requires_grad_()
        targets = torch.randint(0, 301, (7,), generator=generator)
        found = []
        for triton in (False, True):
            x.grad = weight.grad = None
            loss = cross_entropy(x, weight, targets, 301, softcap, triton=triton)
            (loss * 3).backward()
            found.append((loss.detach(), x.grad.float(), weight.grad.float()))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=exact, atol=exact)
        assert not found[1][2][301:].any()
        plain = cross_entropy(x.detach(), weight.detach(), targets, 301, softcap, triton=True)
        torch.testing.assert_close(plain, found[0][0], rtol=exact, atol=exact)
print("equal")
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton comes with torch's CUDA build")
def test_the_triton_kernel_is_torch_s_loss() -> None:
    """In Triton's interpreter, so that no GPU is needed; on one, benchmarks/gpu.py compares them."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_triton_kernel_on_a_gpu() -> None:
    models = [GPT(TINY, loss_kernel=kernel).cuda() for kernel in LossKernel]
    x = torch.randint(0, 301, (3, 25)).cuda()
    for model in models:
        model(x[:, :-1], x[:, 1:]).backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_fp8_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"kernels.fp8=true: torchao cannot be imported .*pip install"):
        to_float8(GPT(TINY), torch.device("cpu"), emulate=True)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs pip install 'gpt2train[fp8]'")
def test_fp8_is_the_same_model_with_fewer_digits() -> None:
    model = GPT(dataclasses.replace(TINY, tied_head=False))
    names = {name: p.shape for name, p in model.named_parameters()}
    exact = gradients(model)
    model.zero_grad()
    to_float8(model, torch.device("cpu"), emulate=True)
    assert {name: p.shape for name, p in model.named_parameters()} == names, "checkpoints stay"
    assert type(model.h[1].mlp.c_fc).__name__ == "Float8Linear"
    assert type(model.lm_head).__name__ == "Linear"
    rounded = gradients(model)
    assert rounded[0].item() == pytest.approx(exact[0].item(), rel=1e-2)
    assert rounded[0].item() != exact[0].item()


def test_fp8_needs_a_device_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"kernels.fp8=true: a CPU has no fp8 products; take an H100"):
        to_float8(GPT(TINY), torch.device("cpu"))


def test_wrong_choices_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = TrainConfig(
        kernels=KernelsConfig(AttentionKernel.flash, LossKernel.triton, fp8=True),
        precision=Precision.fp32,
        zero=ZeroConfig(3),
        model=ModelConfig(channels=24, heads=2),
    )
    config.data.path, config.run_dir, config.data.document_mask = "tokens", "run", True
    faults = "\n".join(check(config))
    for said in (
        "kernels.attention=flash: takes no mask",
        "needs precision=bf16 and compile=model or blocks, not fp32 and none",
        "ZeRO 3 replaces the layers",
        "model.channels=24 must be a multiple of 16; give model.channels=32",
    ):
        assert said in faults
    assert ("kernels.loss=triton: triton is not installed" in faults) != HAS_TRITON
    assert "kernels.fp8=true: torchao is not installed" in faults


def test_a_compile_mode_needs_something_to_compile() -> None:
    config = TrainConfig(compile_mode=CompileMode.reduce_overhead)
    config.data.path, config.run_dir = "tokens", "run"
    said = "compile_mode=reduce_overhead: changes nothing without compile=model or blocks"
    assert said in "\n".join(check(config))
    config.compile, config.precision = Compile.blocks, Precision.fp32
    assert "compile_mode=reduce_overhead: needs precision=bf16" in "\n".join(check(config))
    config.precision = Precision.bf16
    assert "compile_mode" not in "\n".join(check(config))
