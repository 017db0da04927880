"""The network of recipe=modern and each of its switches: against transformers' NanoChat, against itself, by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)
from torch.nn import functional as F

from data_pipeline.tokenizer import END_OF_TEXT
from gpt2train.config import (
    Activation,
    ActivationCheckpointing,
    ModelConfig,
    Norm,
    Positions,
    flops_per_token,
    parameter_count,
)
from gpt2train.generation.decoding import sample
from gpt2train.model import GPT, KeyValueCache
from gpt2train.network.attention import rotate, rotation
from gpt2train.network.loss import softcapped

GPT2 = ModelConfig(layers=3, channels=48, heads=4, context=24, vocabulary=301)
SWITCHES: dict[str, object] = {
    "positions": Positions.rotary,
    "activation": Activation.relu2,
    "norm": Norm.rms,
    "biases": False,
    "qk_norm": True,
    "embedding_norm": True,
    "tied_head": False,
    "zero_projections": True,
    "logit_softcap": 15.0,
}
MODERN = dataclasses.replace(GPT2, **SWITCHES)  # type: ignore[arg-type]
ONE_BY_ONE = [dataclasses.replace(GPT2, **{name: value}) for name, value in SWITCHES.items()]  # type: ignore[arg-type]
ALL = pytest.mark.parametrize("config", [*ONE_BY_ONE, MODERN], ids=[*SWITCHES, "modern"])


def randomized(config: ModelConfig, **options: object) -> GPT:
    """Random weights everywhere, so that nothing is zero and nothing can be forgotten."""
    model = GPT(config, seed=3, **options).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


@ALL
def test_each_switch_changes_the_function_or_the_start(config: ModelConfig) -> None:
    x = tokens(config, 2, 24)
    model = GPT(config, seed=1)
    if not config.biases:  # they start at zero
        assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    if config == dataclasses.replace(GPT2, biases=False):
        return
    with torch.no_grad():
        before, after = GPT(GPT2, seed=1)(x), model(x)
    assert after.shape == before.shape
    assert not torch.allclose(before, after, atol=1e-6)


@ALL
def test_cache_and_one_by_one_give_the_logits_of_the_whole(config: ModelConfig) -> None:
    model = randomized(config)
    x = tokens(config, 2, config.context)
    with torch.no_grad():
        whole = model(x)
        for pieces in ([1] * 24, [10, 14], [7, 5, 1, 1, 10]):
            cache = KeyValueCache(config, batch=2)
            parts = [model(piece, cache=cache) for piece in x.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


@ALL
def test_loss_and_gradients_are_those_of_whole_logits(config: ModelConfig) -> None:
    model = randomized(config)
    x = tokens(config, 3, 25)
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    chunked = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=2e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@ALL
def test_no_output_sees_a_later_token(config: ModelConfig) -> None:
    model = randomized(config)
    x = tokens(config, 1, 24)
    with torch.no_grad():
        before = model(x)
        for position in (1, 11, 23):
            changed = x.clone()
            changed[0, position] = (changed[0, position] + 1) % config.vocabulary
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


@ALL
def test_the_count_is_that_of_the_model(config: ModelConfig) -> None:
    names = dict(GPT(config).named_parameters())
    assert sum(p.numel() for p in names.values()) == parameter_count(config, padded=True)
    padding = (config.padded_vocabulary - config.vocabulary) * config.channels * (1 if config.tied_head else 2)
    assert parameter_count(config) == parameter_count(config, padded=True) - padding
    multiplied = parameter_count(config) - (0 if config.tied_head else config.vocabulary * config.channels)
    assert flops_per_token(config) == 6 * multiplied + 12 * 3 * 48 * 24


def test_flops_are_those_that_torch_counts() -> None:
    """Forward and backward of a modern model, matrix products alone: 6 for each weight that multiplies."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(MODERN, vocabulary=384)  # no padding
    model = GPT(config, seed=1)
    x = tokens(config, 2, 25)
    with FlopCounterMode(display=False) as counter:
        model(x[:, :-1], x[:, 1:]).backward()
    operations = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in operations.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    attention = 12 * 3 * 48 * 24
    # The input gradient of the first block's product exists only because its embedding is trained: all six are there.
    assert products == 2 * 24 * (flops_per_token(config) - attention)


def test_modern_logits_equal_transformers_nanochat() -> None:
    transformers = pytest.importorskip("transformers")
    model = randomized(MODERN)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=301,
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=24,
            final_logit_softcapping=15.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.wte.weight[:301])
        theirs.lm_head.weight.copy_(model.lm_head.weight[:301])
        for ours, layer in zip(model.h, theirs.model.layers, strict=True):
            q, k, v = ours.attn.c_attn.weight.chunk(3)
            for linear, weight in zip((layer.self_attn.q_proj, layer.self_attn.k_proj), (q, k), strict=True):
                linear.weight.copy_(weight)
            layer.self_attn.v_proj.weight.copy_(v)
            layer.self_attn.o_proj.weight.copy_(ours.attn.c_proj.weight)
            layer.mlp.fc1.weight.copy_(ours.mlp.c_fc.weight)
            layer.mlp.fc2.weight.copy_(ours.mlp.c_proj.weight)
        x = tokens(MODERN, 2, 24)
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=2e-5)


def test_a_rotation_turns_pairs_by_their_place() -> None:
    """Scores depend on the distance alone, lengths stay, and pair i turns by place · base^(-2i/D)."""
    D = 8
    cosines, sines = rotation(torch.arange(50), D, torch.float64)
    x = torch.randn(2, 1, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotate(x.expand(2, 1, 50, D), cosines, sines)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1).expand(2, 1, 50), rtol=1e-6, atol=1e-6)
    scores = turned[0, 0] @ turned[1, 0].T
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    pair = torch.complex(x[0, 0, 0, 1], x[0, 0, 0, 1 + D // 2])
    angle = 7 * 10_000 ** (-2 / D)
    expected = pair * complex(math.cos(angle), -math.sin(angle))
    assert turned[0, 0, 7, 1].item() == pytest.approx(expected.real.item(), abs=1e-6)
    assert turned[0, 0, 7, 1 + D // 2].item() == pytest.approx(expected.imag.item(), abs=1e-6)


def test_softcap() -> None:
    z = torch.tensor([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    assert softcapped(z, 15.0).tolist() == pytest.approx([-15, -0.99852, 0, 0.99852, 15], abs=1e-4)
    assert softcapped(z, 0.0) is z


def test_zero_projections_start_as_nothing() -> None:
    model = GPT(MODERN, seed=1)
    x = tokens(MODERN, 1, 24)
    assert not model(x).any(), "a head of zeros"
    assert model(x, x).item() == pytest.approx(math.log(301), abs=1e-6)
    tied = GPT(dataclasses.replace(MODERN, tied_head=True), seed=1)
    h = tied.ln_f(tied.ln_e(tied.wte(x)))
    torch.testing.assert_close(tied(x), softcapped(F.linear(h, tied.wte.weight)[..., :301], 15.0))


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_documents_are_apart_in_a_modern_model(checkpointing: ActivationCheckpointing) -> None:
    """Rotary positions are relative: within the mask a document's logits are those of the document alone."""
    config = dataclasses.replace(MODERN, layers=2, channels=24, heads=2, context=40, vocabulary=50_257)
    for reset in (False, True):
        packed = randomized(config, activation_checkpointing=checkpointing, document_mask=True, reset_positions=reset)
        alone = randomized(config)
        x = tokens(ModelConfig(vocabulary=300), 1, 40)
        x[0, [7, 8, 30]] = END_OF_TEXT
        pieces = [alone(x[:, start:stop]) for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40))]
        torch.testing.assert_close(packed(x), torch.cat(pieces, dim=1), rtol=1e-4, atol=2e-5)
        assert (alone(x) - packed(x)).abs().max() > 1e-3


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    config = dataclasses.replace(MODERN, dropout=0.2, zero_projections=False)
    x = tokens(config, 3, 25)
    gradients = []
    for checkpointing in ActivationCheckpointing:
        model = GPT(config, seed=2, activation_checkpointing=checkpointing)
        torch.manual_seed(9)
        model(x[:, :-1], x[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for recomputed in gradients[1:]:
        for one, other in zip(gradients[0], recomputed, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_greedy_sampling_with_the_cache_is_that_without() -> None:
    config = dataclasses.replace(MODERN, vocabulary=50_257, context=16)
    model = randomized(config)
    prompt = [5, 6, 7]
    got = list(sample(model, prompt, max_new_tokens=10, temperature=0, top_k=0, top_p=1.0, seed=0))
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(10):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert got == expected[3:]


def test_a_model_goes_through_json_and_back() -> None:
    for config in (GPT2, MODERN):
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    old = {"name": "small", "layers": 12, "channels": 768, "heads": 12, "context": 1024, "vocabulary": 50257}
    assert ModelConfig.from_json(old) == ModelConfig()
