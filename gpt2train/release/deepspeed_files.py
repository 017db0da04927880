"""A checkpoint that DeepSpeed wrote → whole fp32 weights and Adam moments by parameter name; nothing in it is executed.

Flows in: the folder that a training loop gave `engine.save_checkpoint`, of ZeRO 1, 2 or 3, in fp32 or bf16, of any
number of ranks: `latest`, `TAG/*model_states.pt`, `TAG/*optim_states.pt`. Flows out: what the ranks held together. The
files are pickles; torch reads them with `weights_only=True`, which makes tensors and plain containers alone. Types of
DeepSpeed's own that it stores beside them are replaced by an empty stand-in, by name, so that DeepSpeed is neither
needed nor called. Anything else in a file is refused with its name.

Measured on DeepSpeed 0.19.8: each rank holds a flat piece of every group of parameters. ZeRO 1 and 2 cut the row of a
group's parameters into as many pieces as there are ranks and say which span of a piece is whose
(`param_slice_mappings`); ZeRO 3 cuts every parameter, and a piece is the row of these parts.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2train.config import VOCABULARY, ModelConfig
from gpt2train.errors import CheckpointError, ConfigError
from gpt2train.release.hf import TRANSPOSED, from_hf_state

LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_REPLACED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
HEAD_CHANNELS = 64
"""Channels of a head in each of the paper's models (Radford et al. 2019, table 2, with the released hparams)."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class _StandIn:
    """Keeps the fields of an object that DeepSpeed pickled, and does nothing with them."""

    def __new__(cls, *_: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class DeepspeedCheckpoint:
    """Whole tensors by the name that the training loop's model gave them, fp32, on the CPU."""

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int
    """Steps of the engine."""
    updates: int
    """Updates that Adam counted."""
    sequences_per_step: int
    files: tuple[Path, ...]


def is_deepspeed_folder(path: str | Path) -> bool:
    folder = Path(path)
    return (folder / LATEST).is_file() or any(_MODEL.fullmatch(file.name) for file in _files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def read_deepspeed_folder(path: str | Path) -> DeepspeedCheckpoint:
    """Raises ConfigError for a folder that is none of ours to read and CheckpointError for one that is not whole."""
    folder = _tag_folder(Path(path))
    models, optimizers = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIMIZER)
    if not models:
        raise ConfigError([f"path={folder}: holds no *_model_states.pt; give the folder that save_checkpoint got"])
    if not optimizers:
        raise ConfigError(
            [
                f"path={folder}: holds no *_optim_states.pt, as ZeRO 0 writes it, whose moments have no names; save "
                f"with ZeRO 1, 2 or 3, or export the weights to Hugging Face format and import that"
            ]
        )
    model = _read(models[0])
    ranks = [_read(optimizers[rank]) for rank in sorted(optimizers)]
    wanted = int(model.get("dp_world_size") or len(ranks))
    if sorted(optimizers) != list(range(wanted)):
        raise CheckpointError(
            f"{folder}: {wanted} ranks wrote it, and the optimizer files are of ranks {sorted(optimizers)}; copy all "
            f"files"
        )
    try:
        shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
        states = [rank["optimizer_state_dict"] for rank in ranks]
        join = _joined_by_parameter if "fp32_flat_groups" in states[0] else _joined_by_span
        whole = {kind: dict(join(states, kind, shapes)) for kind in KINDS}
        updates = _updates(states[0])
        step = int(model["global_steps"])
        batch = int((model.get("ds_config") or {}).get("train_batch_size") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error})"
        ) from None
    files = (*models.values(), *optimizers.values())
    return DeepspeedCheckpoint(
        whole["weight"], whole["exp_avg"], whole["exp_avg_sq"], step, updates, batch, tuple(files)
    )


def _tag_folder(path: Path) -> Path:
    if not (path / LATEST).is_file():
        return path
    tag = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if Path(tag).name != tag or not (path / tag).is_dir():
        raise CheckpointError(
            f"{path / LATEST}: names {tag!r}, which is no folder beside it; give a tag's folder as path"
        )
    return path / tag


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in _files(folder):
        match = pattern.fullmatch(file.name)
        if match and int(match[2]):
            raise ConfigError([f"{file}: is of a model split over several GPUs by tensor; only whole models are read"])
        if match:
            found[int(match[1] or 0)] = file
    return found


def _read(file: Path) -> dict[str, Any]:
    """What a file holds: tensors, mapped from the disk, and plain containers. Raises CheckpointError for all else."""
    replaced: list[Any] = [(_StandIn, name) for name in _REPLACED]
    try:
        with torch.serialization.safe_globals(replaced):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {refused[1]}, which is not read" if refused else "cannot be read as tensors alone"
        raise CheckpointError(f"{file}: {what}; nothing of it was executed") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged ({str(error).splitlines()[0][:200]}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__} where DeepSpeed writes a table")
    return content


def _pieces(state: Mapping[str, Any], kind: str) -> list[Tensor]:
    """A rank's flat pieces of one kind, a group each."""
    if kind == "weight":
        return list(
            state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"]
        )
    entries = _optimizer_entries(state)
    return [entries[group][kind] for group in sorted(entries)]


def _optimizer_entries(state: Mapping[str, Any]) -> dict[int, Any]:
    inner = state["optimizer_state_dict"] if "fp32_flat_groups" in state else state["base_optimizer_state"]
    entries = inner["state"]
    assert isinstance(entries, dict)
    return entries


def _updates(state: Mapping[str, Any]) -> int:
    return int(_optimizer_entries(state)[0]["step"])


def _joined_by_span(
    states: list[Mapping[str, Any]], kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 1 and 2: the spans of a parameter in the ranks' pieces, one behind the other."""
    spans: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for state in states:
        for piece, mapping in zip(_pieces(state, kind), state["param_slice_mappings"], strict=True):
            for name, span in mapping.items():
                spans[name].append(piece.flatten().narrow(0, span.start, span.numel))
    for name, shape in shapes.items():
        yield name, torch.cat(spans[name]).float().view(shape)


def _joined_by_parameter(
    states: list[Mapping[str, Any]], kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 3: a part of every parameter on each rank, equally long, the last ones padded."""
    rows = [torch.cat([piece.flatten() for piece in _pieces(state, kind)]) for state in states]
    at = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        part = -(-size // len(rows))
        yield name, torch.cat([row.narrow(0, at, part) for row in rows])[:size].float().view(shape)
        at += part
    if at > rows[0].numel():
        raise ValueError(f"{at:,} numbers of {rows[0].numel():,}")


def as_gpt2(
    found: DeepspeedCheckpoint, *, heads: int = 0
) -> tuple[ModelConfig, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """(ModelConfig, name → weight, exp_avg, exp_avg_sq) in our layout, of a model under GPT-2's names.

    The names may stand below `transformer.`, `module.` or torch.compile's `_orig_mod.`, the matrices as transformers'
    Conv1D or as torch's Linear has them; both are told apart by their shapes. Rows of the embedding beyond GPT-2's
    50,257 tokens are padding and are left out. No checkpoint says how many heads it has: 0 stands for channels / 64, as
    in all of the paper's models. Raises ConfigError naming what does not fit.
    """
    shapes = {_plain(name): tuple(tensor.shape) for name, tensor in found.weights.items()}
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ConfigError([f"{name}: missing from the weights; give a checkpoint of a model with GPT-2's names"])
    (rows, channels), (context, _) = shapes["wte.weight"], shapes["wpe.weight"]
    heads = heads or channels // HEAD_CHANNELS
    if heads < 1 or channels % heads:
        raise ConfigError([f"heads={heads}: must divide the model's {channels} channels; give heads=N"])
    model = ModelConfig(
        name="imported",
        layers=1 + max(int(match[1]) for name in shapes if (match := re.match(r"h\.(\d+)\.", name))),
        channels=channels,
        heads=heads,
        context=context,
        vocabulary=min(rows, VOCABULARY),
    )
    linear = shapes["h.0.mlp.c_fc.weight"] == (4 * channels, channels)
    kinds = [
        from_hf_state(
            {
                _plain(name): _as_hf(_plain(name), tensor, linear=linear, vocabulary=model.vocabulary)
                for name, tensor in tensors.items()
            },
            model,
        )
        for tensors in (found.weights, found.exp_avg, found.exp_avg_sq)
    ]
    return model, {name: (kinds[0][name], kinds[1][name], kinds[2][name]) for name in kinds[0]}


def _plain(name: str) -> str:
    return re.sub(r"^(?:module\.|_orig_mod\.|transformer\.)+", "", name)


def _as_hf(name: str, tensor: Tensor, *, linear: bool, vocabulary: int) -> Tensor:
    """As transformers has it, which is what `from_hf_state` takes."""
    if name == "wte.weight":
        return tensor[:vocabulary]
    return tensor.T if linear and TRANSPOSED.fullmatch(name) else tensor
