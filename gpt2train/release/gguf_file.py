"""A model with GPT-2's network → one GGUF file, which llama.cpp and what is built on it run.

Flows in: weights by our names, in fp32, and their sizes. Flows out: a file with the weights in fp32, the sizes, and
GPT-2's tokenizer with its merges, so that nothing else is needed. The format's reference library, `gguf`, writes it
(`pip install 'gpt2train[gguf]'`), and reads it again: each tensor must come back bit for bit.

Names of tensors and fields: github.com/ggml-org/ggml, its page gguf.md, and llama.cpp's architecture `gpt2`. Matrices
lie as ours do, [out, in]; the output matrix is the embedding's, and the rows that pad it are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.config import ModelConfig
from gpt2train.errors import CheckpointError, ConfigError
from gpt2train.model import LAYER_NORM_EPS

FILE = "model.gguf"
_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A parameter's name there: `h.3.mlp.c_fc.weight` → `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("h."):
        return f"{_NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{_BLOCK_NAMES[part]}.{kind}"


def write_gguf(path: Path, weights: Mapping[str, torch.Tensor], model: ModelConfig) -> None:
    """Writes the new file `path` and reads it back.

    Raises ConfigError where `gguf` is not installed or the vocabulary is not GPT-2's, CheckpointError where the file
    does not hold what was to be written.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(["format=gguf: needs the package `gguf`; pip install 'gpt2train[gguf]'"]) from None
    if model.vocabulary != VOCABULARY:
        raise ConfigError([f"format=gguf: model.vocabulary={model.vocabulary}: must be {VOCABULARY}; give format=hf"])
    tensors = {
        gguf_name(name): (weight[:VOCABULARY] if name == "wte.weight" else weight).float().contiguous().numpy()
        for name, weight in weights.items()
    }
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(model.name)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.channels)
    writer.add_feed_forward_length(4 * model.channels)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    files = load_tokenizer().files()
    ids = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
    kinds = [gguf.TokenType.NORMAL] * VOCABULARY
    kinds[END_OF_TEXT] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_types(kinds)
    writer.add_token_merges(files["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1])  # a line of version first
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    wrong = [n for n in sorted({*read, *tensors}) if n not in read or read[n].tobytes() != tensors[n].tobytes()]
    if wrong:
        raise CheckpointError(f"{path}: read back, {', '.join(wrong[:5])} differ from what was written; check the disk")
