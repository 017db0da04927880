"""A staged release: one size after another, cards that say what is withheld and why, no way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from gpt2train.config import ModelConfig
from gpt2train.errors import ConfigError
from gpt2train.model import GPT
from gpt2train.release import staged
from gpt2train.release.config import ImportConfig, ReleaseConfig
from gpt2train.release.export import _write_json, import_model
from gpt2train.release.hf import hf_config, to_hf_state
from gpt2train.release.staged import release

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # transformers announces its own changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Runs of three sizes, the largest first."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for name, channels in (("big", 32), ("mid", 16), ("tiny", 8)):
        config = ModelConfig(name, layers=1, channels=channels, heads=2, context=16)
        source = folder / f"hf_{name}"
        source.mkdir()
        _write_json(source / "config.json", hf_config(config))
        save_file(to_hf_state(GPT(config, seed=channels).state_dict(), config), source / "model.safetensors")
        import_model(ImportConfig(path=str(source), to=str(folder / name)))
        made.append(str(folder / name))
    return made


def test_sizes_come_out_one_after_another(runs: list[str], tmp_path: Path) -> None:
    to = tmp_path / "out"
    why = "Text of the larger ones\npasses for a person's."
    assert release(ReleaseConfig(runs=runs, to=str(to), stage=1, reason=why, review="Reports of misuse.")) == 0
    assert sorted(p.name for p in to.iterdir()) == ["release.json", "tiny"]
    card = (to / "tiny" / "README.md").read_text()
    assert "- mid: 805,552 parameters, withheld" in card or "withheld" in card
    assert "Why the larger sizes are withheld: Text of the larger ones passes for a person's." in card
    assert "What is looked at before the next stage: Reports of misuse." in card
    assert card.index("## Staged release") < card.index("## Limitations")
    first = json.loads((to / "release.json").read_text())
    assert [e["name"] for e in first["released"]] == ["tiny"]
    assert [e["name"] for e in first["withheld"]] == ["mid", "big"]
    weights = (to / "tiny" / "model.safetensors").read_bytes()

    assert release(ReleaseConfig(runs=runs, to=str(to), stage=3)) == 0
    assert sorted(p.name for p in to.iterdir()) == ["big", "mid", "release.json", "tiny"]
    assert (to / "tiny" / "model.safetensors").read_bytes() == weights
    record = json.loads((to / "release.json").read_text())
    assert record["released"][0] == first["released"][0]  # with its own date
    for name in ("tiny", "mid", "big"):
        card = (to / name / "README.md").read_text()
        assert card.count("## Staged release") == 1
        assert "All sizes are out." in card
        assert "withheld" not in card
        model = transformers.AutoModelForCausalLM.from_pretrained(to / name)
        assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 50_257)
    counted = {e["name"]: e["parameters"] for e in record["released"]}
    assert counted["big"] == sum(p.numel() for p in model.parameters())


def test_a_release_that_was_broken_off_goes_on(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "out"
    real, calls = staged._write, []

    def stop(path: Path, record: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, record)

    monkeypatch.setattr(staged, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        release(ReleaseConfig(runs=runs, to=str(to), stage=2, reason="x"))
    monkeypatch.setattr(staged, "_write", real)
    assert release(ReleaseConfig(runs=runs, to=str(to), stage=2, reason="x")) == 0
    record = json.loads((to / "release.json").read_text())
    assert [e["name"] for e in record["released"]] == ["tiny", "mid"]
    assert "withheld" in (to / "mid" / "README.md").read_text()


def test_what_was_published_stays(runs: list[str], tmp_path: Path) -> None:
    to = str(tmp_path / "out")
    release(ReleaseConfig(runs=runs, to=to, stage=2, reason="x"))
    with pytest.raises(ConfigError, match="stage=1: 2 sizes are out already; a stage cannot be taken back"):
        release(ReleaseConfig(runs=runs, to=to, stage=1, reason="x"))
    with pytest.raises(ConfigError, match="holds tiny, mid, not the smallest of mid, big"):
        release(ReleaseConfig(runs=runs[:2], to=to, stage=2))
    (tmp_path / "out" / "release.json").write_text('{"released": [{}]')
    with pytest.raises(ConfigError, match=r"release.json: is no record of a release"):
        release(ReleaseConfig(runs=runs, to=to, stage=3))


def test_wrong_settings_are_named_together(runs: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        release(ReleaseConfig(runs=[*runs, runs[0]], stage=0))
    assert [fault.split("=")[0] for fault in caught.value.faults] == ["runs", "to", "stage", "reason"]
