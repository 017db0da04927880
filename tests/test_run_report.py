"""The report of a run: whole in itself, true to the metrics, and safe whatever the files hold."""

from __future__ import annotations

import json
import logging
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gpt2train.config import DataConfig, ModelConfig, Precision, TrainConfig
from gpt2train.errors import ConfigError
from gpt2train.report import report
from gpt2train.run_folder import (
    checkpoint_folders,
    config_text,
    data_folder,
    last_value,
    read_metrics,
    read_run_config,
    run_dir_of,
    series,
)

EVIL = "</pre><script>alert('x')</script>{{ 7 * 7 }}<img src=http://evil.test/x>"


def make_run(folder: Path, *, done: int = 100) -> Path:
    """A run folder as `train` leaves it."""
    folder.mkdir(parents=True)
    config = TrainConfig(
        model=ModelConfig("tiny", layers=2, channels=64, heads=2),
        data=DataConfig(path=EVIL),
        recipe=EVIL,
        run_dir=str(folder),
        steps=100,
        precision=Precision.fp32,
    )
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(1, done + 1):
            line = {"step": step, "loss": 9 - step / 20, "lr": 1e-3, "grad_norm": 1.0, "tokens": step * 10}
            f.write(json.dumps(line | {"tokens_per_s": 1234.0}) + "\n")
            if step % 25 == 0:
                f.write(json.dumps({"step": step, "validation_loss": 9.125 - step / 20}) + "\n")
    for step in (50, 100):
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "weights.safetensors").write_bytes(bytes(1234 + step))
    versions = {"versions": {"torch": "2.13.0", "odd": EVIL}, "data": {"path": "/data/tokens", "fingerprint": "f" * 64}}
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


class _Page(HTMLParser):
    """Tags with their attributes, the text, and whether all that opens also closes."""

    VOID = ("meta", "img", "br", "link", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = {"name": "book.txt", "tokens": 12345, "loss": 3.25, "perplexity": 25.79}
    result |= {"word_perplexity": None, "bits_per_byte": 1.0625}
    (run / "evaluation.json").write_text(json.dumps({"source": "step_00000100", "stride": 8, "results": [result]}))
    path = report(run)
    assert path == run / "report.html"
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    text = " ".join(page.text.split())
    for said in ("Finished.", "4.1250", "1,234", "step_00000050", "1,334", "f" * 64, "2.13.0", "precision: fp32"):
        assert said in text, said
    for said in ("book.txt", "12,345", "25.7900", "1.0625"):
        assert said in text, said
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    assert "prefers-color-scheme:dark" in path.read_text(encoding="utf-8")


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    page = _Page(report(make_run(tmp_path / "<b>run")).read_text(encoding="utf-8"))
    assert EVIL in page.text, "shown, not obeyed"
    assert "<b>run" in page.text
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "style"):
                assert re.search(r"https?:|//|javascript:", value or "") is None, (tag, name, value)


def test_the_curves_hold_the_metrics(tmp_path: Path) -> None:
    """The drawn validation points lie where the metrics say: equal steps apart, at equal falls of the loss."""
    text = report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    svg = xml.etree.ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    names = {"svg": "http://www.w3.org/2000/svg", "xlink": "http://www.w3.org/1999/xlink"}
    lines = [p.get("d", "") for p in svg.iterfind(".//svg:path", names) if "stroke-width: 1.5" in p.get("style", "")]
    points = [[tuple(map(float, xy)) for xy in re.findall(r"[ML] (\S+) (\S+)", d)] for d in lines]
    train, validation = (next(p for p in points if len(p) == n) for n in (100, 4))
    # Loss falls by 0.05 a step; validation is 0.125 above it: 2.5 steps' fall.
    per_step = (train[-1][0] - train[0][0]) / 99
    fall = (train[-1][1] - train[0][1]) / 99
    for step, (x, y) in zip((25, 50, 75, 100), validation, strict=True):
        assert x == pytest.approx(train[step - 1][0], abs=0.01 * per_step + 1e-3)
        assert y == pytest.approx(train[step - 1][1] - 2.5 * fall, abs=0.02)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first
    assert not list(run.glob(".*")), "nothing is left beside it"


@pytest.mark.parametrize("done", [0, 1, 40])
def test_a_run_that_goes_on(tmp_path: Path, done: int) -> None:
    run = make_run(tmp_path / "run", done=done)
    if not done:
        (run / "metrics.jsonl").unlink()
        (run / "versions.json").unlink()
    text = report(run).read_text(encoding="utf-8")
    assert f"Not finished: step {done} of 100." in text
    assert ("No step has been recorded yet." in text) == (done == 0)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml; give the folder that `train` got"):
        report(tmp_path)


# -- reading a run's folder


def test_settings_come_back_with_their_types(tmp_path: Path) -> None:
    config = read_run_config(make_run(tmp_path / "run"))
    assert isinstance(config, TrainConfig)
    assert config.precision is Precision.fp32
    assert config.model == ModelConfig("tiny", layers=2, channels=64, heads=2)


def test_settings_are_kept_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOBODYS_TOKEN", "hush-hush")
    folder = make_run(tmp_path / "run")
    config = read_run_config(folder)
    config.data.path = "/data/${oc.env:NOBODYS_TOKEN} \\${x} ${"
    config.deepspeed.extra = {"a": ["${b}"]}
    (folder / "config.yaml").write_text(config_text(config))
    assert read_run_config(folder) == config
    assert "hush-hush" not in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("content", ["steps: many\n", "no_such_setting: 1\n", "a: [\n", "- 1\n", "\x00"])
def test_settings_that_are_none_of_ours_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read as settings .*; restore the file"):
        read_run_config(tmp_path)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\x00\x00\x00", b"12", b""])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + torn)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
    assert not caplog.records


def test_a_damaged_line_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{"st\xff\n{"step": 3, "loss": 1.0}\n')
    with caplog.at_level(logging.WARNING):
        assert series(read_metrics(tmp_path), "loss") == [(1, 2.0), (3, 1.0)]
    assert "metrics.jsonl:2 is not a JSON object" in caplog.text


def test_what_was_written_last_counts(tmp_path: Path) -> None:
    metrics = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 6.0}, {"step": 2, "loss": 4.0}, {"step": 3, "loss": None}]
    assert series(metrics, "loss") == [(1, 6.0), (2, 4.0)]
    assert last_value(metrics, "loss") == 4.0
    assert last_value(metrics, "validation_loss") is None
    assert read_metrics(tmp_path) == []


def test_places(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / ".step_00000150.tmp").mkdir()
    (run / "checkpoints" / "step_100000000").mkdir()
    assert [path.name for path in checkpoint_folders(run)] == ["step_00000050", "step_00000100", "step_100000000"]
    assert run_dir_of(checkpoint_folders(run)[0]) == run
    assert run_dir_of(tmp_path / "step_00000050") is None
    assert data_folder(run) == Path("/data/tokens")
    (run / "versions.json").unlink()
    assert data_folder(run) == Path(EVIL)
    assert data_folder(tmp_path) is None
