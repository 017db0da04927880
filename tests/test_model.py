"""The network against transformers' GPT2LMHeadModel and torch's own cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.tokenizer import END_OF_TEXT
from gpt2train.config import ActivationCheckpointing, ModelConfig, flops_per_token, parameter_count
from gpt2train.model import GPT, KeyValueCache
from gpt2train.network import loss as loss_module

SMALL = ModelConfig()
TINY = ModelConfig(layers=3, channels=48, heads=4, context=24, vocabulary=301)
PAPER = {  # layers, channels, heads → parameters as counted in OpenAI's released checkpoints
    "small": (12, 768, 12, 124_439_808),
    "medium": (24, 1024, 16, 354_823_168),
    "large": (36, 1280, 20, 774_030_080),
    "full": (48, 1600, 25, 1_557_611_200),
}


def reference(config: ModelConfig, model: GPT) -> torch.nn.Module:
    """transformers' model with the same weights (its Conv1D matrices lie transposed)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.context,
            n_embd=config.channels,
            n_layer=config.layers,
            n_head=config.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            ours = model.get_parameter(name).detach()
            if name == "wte.weight":
                ours = ours[: config.vocabulary]
            elif name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                ours = ours.T
            parameter.copy_(ours)
    return theirs


def randomized(config: ModelConfig) -> GPT:
    """A model whose biases, gains and padding rows are random too, so that none of them can be forgotten."""
    model = GPT(config, seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


def test_logits_equal_transformers_at_the_size_of_gpt2_small() -> None:
    model = GPT(SMALL, seed=1).eval()
    x = tokens(SMALL, 1, 64)
    with torch.no_grad():
        ours, theirs = model(x), reference(SMALL, model)(x).logits
    assert ours.shape == theirs.shape == (1, 64, 50_257)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_logits_loss_and_gradients_equal_transformers() -> None:
    model = randomized(TINY)
    theirs = reference(TINY, model)
    x = tokens(TINY, 3, TINY.context + 1)
    torch.testing.assert_close(model(x[:, :-1]), theirs(x[:, :-1]).logits, rtol=0, atol=2e-5)

    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    # Their `labels` shift by themselves, which would need a window of context + 1: so the loss is torch's.
    their_loss = F.cross_entropy(theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    for name, parameter in theirs.transformer.named_parameters():
        ours = model.get_parameter(name).grad
        assert ours is not None
        if name == "wte.weight":
            assert not ours[TINY.vocabulary :].any(), "padding rows got a gradient"
            ours = ours[: TINY.vocabulary]
        elif name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            ours = ours.T
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 50, 72, 1000])
def test_chunks_of_the_loss_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", chunk)
    model = randomized(TINY)
    x = tokens(TINY, 3, TINY.context + 1)
    loss = model(x[:, :-1], x[:, 1:])
    (loss * 3).backward()
    chunked = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = F.cross_entropy(model(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())
    (plain * 3).backward()
    assert loss.item() == pytest.approx(plain.item(), abs=2e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_loss_in_bf16_is_near_fp32() -> None:
    model = randomized(TINY)
    x = tokens(TINY, 3, TINY.context + 1)
    with torch.no_grad():
        exact = model(x[:, :-1], x[:, 1:]).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x[:, :-1], x[:, 1:])
        low = model.bfloat16()(x[:, :-1], x[:, 1:])
    assert cast.dtype == low.dtype == torch.float32
    assert cast.item() == pytest.approx(exact, rel=5e-3)
    assert low.item() == pytest.approx(exact, rel=5e-3)
    assert low.item() != exact


def test_padding_changes_neither_logits_nor_loss() -> None:
    wide = ModelConfig(**{**vars(TINY), "pad_vocabulary_to": 512})
    none = ModelConfig(**{**vars(TINY), "pad_vocabulary_to": 1})
    x = tokens(TINY, 2, 9)
    models = [randomized(none), GPT(wide).eval()]
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            other = models[0].get_parameter(name)
            if name == "wte.weight":
                parameter[: TINY.vocabulary], parameter[TINY.vocabulary :] = other, 9.0
            else:
                parameter.copy_(other)
        logits = [m(x) for m in models]
        losses = [m(x[:, :-1], x[:, 1:]) for m in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)


def test_no_output_sees_a_later_token() -> None:
    model = randomized(TINY)
    x = tokens(TINY, 1, TINY.context)
    with torch.no_grad():
        before = model(x)
        for position in range(1, TINY.context):
            changed = x.clone()
            changed[0, position] = (changed[0, position] + 1) % TINY.vocabulary
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [10, 14], [7, 5, 1, 1, 10]])
def test_cache_gives_the_logits_of_the_whole(pieces: list[int]) -> None:
    model = randomized(TINY)
    x = tokens(TINY, 3, TINY.context)
    cache = KeyValueCache(TINY, batch=3)
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=0, atol=1e-5)
        assert cache.length == TINY.context
        with pytest.raises(ValueError, match="24 cached \\+ 1 new tokens: the model's context is 24"):
            model(x[:, :1], cache=cache)
        cache.clear()
        torch.testing.assert_close(model(x[:, :3], cache=cache), model(x[:, :3]), rtol=0, atol=1e-5)


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="the model's context is 24"):
        GPT(TINY)(tokens(TINY, 1, 25))


def test_initial_weights_follow_the_released_code() -> None:
    config = ModelConfig(layers=8, channels=256, heads=4, context=512, vocabulary=5000)
    model = GPT(config, seed=11)
    expected = {
        "wte.weight": 0.02,
        "wpe.weight": 0.01,
        "h.3.attn.c_attn.weight": 0.02,
        "h.3.mlp.c_fc.weight": 0.02,
        "h.3.attn.c_proj.weight": 0.02 / math.sqrt(16),
        "h.3.mlp.c_proj.weight": 0.02 / math.sqrt(16),
    }
    for name, std in expected.items():
        weight = model.get_parameter(name)[: config.vocabulary]
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(weight.mean().item()) < std * 0.02, name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name or name.startswith("ln_f"):
            assert (parameter == 1).all(), name
    assert not model.wte.weight[config.vocabulary :].any()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = GPT(TINY, seed=4)
    torch.manual_seed(2)
    torch.rand(3)
    same, other = GPT(TINY, seed=4), GPT(TINY, seed=5)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
    assert not torch.equal(first.wte.weight, other.wte.weight)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    config = ModelConfig(**{**vars(TINY), "dropout": 0.2})
    x = tokens(config, 3, config.context + 1)
    gradients = []
    for checkpointing in ActivationCheckpointing:
        model = GPT(config, seed=2, activation_checkpointing=checkpointing)
        torch.manual_seed(9)
        model(x[:, :-1], x[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for recomputed in gradients[1:]:
        for one, other in zip(gradients[0], recomputed, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_masked_attention_is_a_loop_over_the_documents(reset: bool, checkpointing: ActivationCheckpointing) -> None:
    """Logits and gradients of packed sequences are those of each document by itself, at its own positions."""
    config = ModelConfig(layers=2, channels=24, heads=2, context=40)
    packed, alone = (
        GPT(config, seed=2, activation_checkpointing=checkpointing, document_mask=True, reset_positions=reset),
        GPT(config, seed=2),
    )
    x = tokens(ModelConfig(vocabulary=300), 3, 40)
    for row, ends in enumerate(([7, 8, 30], [0, 39], [])):
        x[row, ends] = END_OF_TEXT
    got = packed(x)
    rows = []
    for row in range(3):
        starts = sorted({0, *(x[row] == END_OF_TEXT).nonzero().flatten().tolist()})
        pieces = []
        for start, stop in zip(starts, [*starts[1:], 40], strict=True):
            # Alone, at the positions that it has in the sequence or, reset, from 0 on.
            positions = torch.arange(stop - start) + (0 if reset else start)
            h = alone.wte(x[row : row + 1, start:stop]) + alone.wpe(positions)
            for block in alone.h:
                h = block(h)
            pieces.append(F.linear(alone.ln_f(h), alone.wte.weight)[..., : config.vocabulary])
        rows.append(torch.cat(pieces, dim=1))
    expected = torch.cat(rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (alone(x) - expected).abs().max() > 1e-3, "without the mask it must differ, or this test says nothing"
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    alone.zero_grad()
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in packed.named_parameters():
        reference = alone.get_parameter(name).grad
        assert (parameter.grad - reference).norm() < 1e-5 * reference.norm() + 1e-6, name


def test_dropout_is_off_in_eval_and_on_in_train() -> None:
    config = ModelConfig(**{**vars(TINY), "dropout": 0.2})
    model = GPT(config, seed=2)
    x = tokens(config, 1, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_counted_exactly(name: str) -> None:
    layers, channels, heads, parameters = PAPER[name]
    config = ModelConfig(layers=layers, channels=channels, heads=heads)
    assert parameter_count(config) == parameters
    assert parameter_count(config, padded=True) == parameters + (50_304 - 50_257) * channels
    assert flops_per_token(config) == 6 * parameters + 12 * layers * channels * 1024


def test_the_count_is_that_of_the_model() -> None:
    names = dict(GPT(TINY).named_parameters())
    assert sum(p.numel() for p in names.values()) == parameter_count(TINY, padded=True)
    blocks = {f"h.{i}" for i in range(TINY.layers)}
    assert {n.rsplit(".", 1)[0] for n in names} == {"wte", "wpe", "ln_f"} | {
        f"{b}.{part}"
        for b in blocks
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    }
