"""A hundred mistakes of users, over all commands: each ends with its exit code and lines that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpt2train.cli import main

TRAIN = ("model=nano", "device=cpu", "steps=3", "run_dir=run")
URLS = ("corpus", "urls=list.txt", "out=corpus", "fetch.contact=crawler@example.org")

MISTAKES: list[tuple[tuple[str, ...], str]] = [
    # ── the command line itself
    (("trian",), "there is no such command; choose among corpus, train"),
    (("Train", "model=nano"), "there is no such command"),
    (("--halp",), "there is no such command"),
    (("train", "--steps", "3"), "settings are key=value"),
    (("why", "http://a.test/", "http://b.test/"), "http://b.test/: one url at a time, and http://a.test/ was given"),
    (("train", "-h3"), "settings are key=value"),
    (("train", "steps"), "not of the form key=value"),
    (("train", "=3"), "=3: there is no such setting"),
    (("train", "steps=3", "steps="), "steps="),
    (("train", "lr=3"), "did you mean optimizer.lr?"),
    (("train", "~steps"), "settings cannot be deleted"),
    (("train", "steps=1,2"), "several values are for `gpt2train sweep`"),
    (("train", "optimizer=adam"), "optimizer=adam: holds further settings"),
    (("train", "model=[nano"), "model="),
    (("train", "model={nano"), "model="),
    (("train", "@nowhere.yaml"), "nowhere.yaml"),
    (("train", "@torn.yaml"), "torn.yaml"),
    (("train", "@list.parquet"), "list.parquet"),
    # ── train: settings
    (("train", *TRAIN, "data="), "data='': must name a folder of token shards"),
    (("train", *TRAIN, "data=nowhere"), "nowhere"),
    (("train", *TRAIN, "data=empty"), "empty"),
    (("train", *TRAIN, "data=list.txt"), "list.txt"),
    (("train", *TRAIN, "data=torn_tokens"), "torn_tokens"),
    (("train", "model=nano", "data=empty", "steps=3"), "run_dir"),
    (("train", *TRAIN, "data=empty", "steps=-1"), "steps=-1"),
    (("train", *TRAIN, "data=empty", "steps=many"), "steps=many"),
    (("train", *TRAIN, "data=empty", "steps=1e3.5"), "steps=1e3.5"),
    (("train", *TRAIN, "data=empty", "seed=99999999999999999999"), "seed=99999999999999999999: must lie in"),
    (("train", *TRAIN, "data=empty", "model=gigantic"), "model=gigantic: must be among"),
    (("train", *TRAIN, "data=empty", "model.heads=5"), "model.heads=5"),
    (("train", *TRAIN, "data=empty", "model.layers=0"), "model.layers=0"),
    (("train", *TRAIN, "data=empty", "model.dropout=1.5"), "model.dropout=1.5"),
    (("train", *TRAIN, "data=empty", "model.vocabulary=0"), "model.vocabulary=0"),
    (("train", *TRAIN, "data=empty", "model.context=0"), "model.context=0"),
    (("train", *TRAIN, "data=empty", "model.positions=alibi"), "model.positions=alibi"),
    (("train", *TRAIN, "data=empty", "optimizer.lr=-1"), "optimizer.lr=-1"),
    (("train", *TRAIN, "data=empty", "optimizer.lr=nan"), "optimizer.lr=nan"),
    (("train", *TRAIN, "data=empty", "optimizer.lr=fast"), "optimizer.lr=fast"),
    (("train", *TRAIN, "data=empty", "optimizer.beta2=1"), "optimizer.beta2=1"),
    (("train", *TRAIN, "data=empty", "optimizer.warmup_steps=-5"), "optimizer.warmup_steps=-5"),
    (("train", *TRAIN, "data=empty", "zero.stage=4"), "zero.stage=4"),
    (("train", *TRAIN, "data=empty", "zero.offload=disk"), "zero.offload=disk"),
    (("train", *TRAIN, "data=empty", "precision=fp8"), "precision=fp8"),
    (("train", *TRAIN, "data=empty", "precision=fp16"), "precision=fp16"),
    (("train", *TRAIN, "data=empty", "device=gpu"), "device=gpu"),
    (("train", *TRAIN, "data=empty", "device=cuda"), "device=cuda"),
    (("train", *TRAIN, "data=empty", "compile=yes please"), "compile=yes please"),
    (("train", *TRAIN, "data=empty", "batch.sequences=7", "batch.micro=2"), "batch.sequences=7 must be a multiple"),
    (("train", *TRAIN, "data=empty", "batch.micro=-1"), "batch.micro=-1"),
    (("train", *TRAIN, "data=empty", "checkpoint.keep_last=-1"), "checkpoint.keep_last=-1"),
    (("train", *TRAIN, "data=empty", "faults.nonfinite=ignore"), "faults.nonfinite=ignore"),
    (("train", *TRAIN, "data=empty", "overwrite=perhaps"), "overwrite=perhaps"),
    # ── corpus: settings and lists
    (("corpus",), "urls='': must name a URL list; give urls=list.txt"),
    (("corpus", "urls=nowhere.txt"), "there is no such file"),
    ((*URLS, "urls=nothing.txt"), "nothing.txt"),
    ((*URLS, "urls=empty"), "empty"),
    ((*URLS, "urls=list.docx"), "list.docx"),
    ((*URLS, "urls=torn.parquet"), "torn.parquet"),
    ((*URLS, "urls=torn.jsonl.gz"), "torn.jsonl.gz"),
    ((*URLS, "urls=columns.csv", "url_list.column=link"), "link"),
    ((*URLS, "stages=[fetsh]"), "must be among urls, fetch, extract"),
    ((*URLS, "workers=-1"), "workers=-1"),
    ((*URLS, "out="), "out="),
    ((*URLS, "out=list.txt"), "list.txt"),
    ((*URLS, "recipe=webtexd"), "recipe=webtexd"),
    ((*URLS, "fetch.contact=me"), "fetch.contact"),
    ((*URLS, "fetch.delay_s=-1"), "fetch.delay_s=-1"),
    ((*URLS, "fetch.allow_addresses=[localhost]"), "must be an exact ip:port"),
    ((*URLS, "fetch.allow_addresses=[127.0.0.1]"), "must be an exact ip:port"),
    ((*URLS, "fetch.allow_addresses=['10.0.0.0/8:80']"), "must be an exact ip:port"),
    ((*URLS, "fetch.hosts_file=nowhere"), "nowhere"),
    ((*URLS, "url_list.blocked_patterns=['(']"), "must be a regular expression"),
    ((*URLS, "dedup.bands=0"), "dedup.bands=0"),
    ((*URLS, "tokenize.seed=99999999999999999999"), "tokenize.seed=99999999999999999999: must lie in"),
    ((*URLS, "executor=spark"), "executor=spark"),
    ((*URLS, "retry=[sometimes]"), "sometimes"),
    (("corpus", "source=dataset", "path=nowhere.jsonl", "out=corpus"), "there is no such file or folder"),
    (("corpus", "source=dataset", "path=empty", "out=corpus"), "empty"),
    (("corpus", "source=warc", "path=nowhere", "out=corpus"), "there is no such WARC file"),
    (("corpus", "source=web", "out=corpus"), "source=web"),
    (("corpus", "what_if=quality.min_words=40", "out=empty"), "empty"),
    # ── plan, launch, sweep
    (("plan", "model=full", "cluster=9xh100"), "cluster=9xh100"),
    (("plan", "model=full", "cluster=8xh100", "plan.mfu=2"), "plan.mfu=2"),
    (("plan", "model=full", "cluster=8xh100", "cluster.gpus=0"), "cluster.gpus=0"),
    (("launch", "processes=-1", "steps=0"), "processes=-1: must be 0 (one per GPU) or more"),
    (("launch", "processes=2", "batch.sequences=7", *TRAIN, "data=empty"), "must be a multiple of the 2 processes"),
    (("launch", *TRAIN, "data=empty", "launcher=kubernetes"), "launcher=kubernetes"),
    (("launch", *TRAIN, "data=empty", "launcher=hosts"), "hosts."),
    (("launch", *TRAIN, "data=empty", "launcher=hosts", "hosts.file=nowhere"), "nowhere"),
    (("launch", *TRAIN, "data=empty", "launcher=slurm", "slurm.time=soon"), "slurm.time=soon"),
    (("launch", *TRAIN, "data=empty", "port=99999"), "port=99999"),
    (("launch", *TRAIN, "data=empty", "restarts=-1"), "restarts=-1"),
    (("sweep", "model=nano,micro", "data=empty", "steps=3"), "out='': must name the sweep's folder"),
    (("sweep", "sizes=[3x]", "data=empty", "steps=3", "out=ladder"), "3x"),
    (("sweep", "model=nano,nano", "data=empty", "steps=3", "out=ladder"), "nano"),
    # ── what is done with a model
    (("generate",), "run='': must name"),
    (("generate", "run=nowhere"), "nowhere"),
    (("generate", "run=empty"), "empty"),
    (("generate", "run=list.txt"), "list.txt"),
    (("generate", "run=torn_model"), "torn_model"),
    (("generate", "run=pickled_model"), "pickled_model"),
    (("generate", "run=empty", "temperature=-1"), "temperature=-1"),
    (("generate", "run=empty", "top_p=0"), "top_p=0"),
    (("generate", "run=empty", "top_k=-1"), "top_k=-1"),
    (("generate", "run=empty", "samples=0"), "samples=0"),
    (("generate", "run=empty", "prompts=nowhere.txt"), "nowhere.txt"),
    (("generate", "run=empty", "prompt=a", "prompts=list.txt"), "prompt"),
    (("generate", "run=empty", "embed=[a]"), "embed_to"),
    (("serve",), "run='': must name"),
    (("serve", "run=empty", "port=70000"), "port=70000"),
    (("serve", "run=empty", "max_new_tokens=0"), "max_new_tokens=0"),
    (("evaluate", "run=nowhere"), "nowhere"),
    (("evaluate", "run=empty", "tasks=[table4]"), "table4"),
    (("evaluate", "run=empty", "texts=[nowhere.txt]"), "nowhere.txt"),
    (("evaluate", "run=empty", "stride=0"), "stride=0"),
    (("export", "run=nowhere", "to=out"), "nowhere"),
    (("export", "run=empty"), "to='': must"),
    (("import", "path=nowhere", "to=run"), "nowhere"),
    (("import", "path=torn_model", "to=run"), "torn_model"),
    (("import", "path=pickled_model", "to=run"), "pickled_model"),
    (("release", "runs=[]", "to=release"), "runs"),
    (("release", "runs=[nowhere]", "to=release", "reason=care"), "nowhere"),
    (("audit", "run=nowhere"), "nowhere"),
    (("audit", "run=empty", "windows=0"), "windows=0"),
    (("detect", "run=empty"), "text"),
    (("detect", "run=empty", "texts=nowhere.txt"), "nowhere.txt"),
    (("detect", "run=empty", "text=a", "seed=-1"), "seed=-1: must be at least 0"),
    (("generate", "run=empty", "seed=99999999999999999999"), "seed=99999999999999999999: must lie in"),
    (("why",), "must name a URL"),
    (("why", "https://example.org/", "corpus=nowhere"), "nowhere"),
    (("why", "https://example.org/\udcff", "corpus=empty"), "is not UTF-8"),
    (("why", "https://example.org/", "corpus=empty"), "empty"),
    (("trace", "run=nowhere", "step=1"), "nowhere"),
    (("trace", "run=empty", "step=0"), "step=0"),
    (("report",), "path"),
    (("report", "nowhere"), "must be the folder of a corpus or a run"),
    (("report", "empty"), "empty"),
]


TORN = {"data=torn_tokens", "run=torn_model", "path=torn_model"}
"""What once was whole and is damaged has exit code 5; all else here has 2."""


def _files(folder: Path) -> None:
    (folder / "list.txt").write_text("https://example.org/\n")
    (folder / "nothing.txt").write_text("\n\n")
    (folder / "empty").mkdir()
    (folder / "torn.yaml").write_text("steps: [3\n")
    (folder / "list.docx").write_bytes(b"PK\x03\x04 something else")
    for name in ("torn.parquet", "list.parquet"):
        (folder / name).write_bytes(b"PAR1 and no more")
    (folder / "torn.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00torn")
    (folder / "columns.csv").write_text("id,address\n1,https://example.org/\n")
    (folder / "torn_tokens").mkdir()
    (folder / "torn_tokens" / "manifest.json").write_text('{"splits": ')
    for name in ("torn_model", "pickled_model"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(
            json.dumps(
                {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 9}
            )
        )
    (folder / "torn_model" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{torn")
    (folder / "pickled_model" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def test_a_hundred_mistakes_get_a_line_each_and_their_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for arguments, part in MISTAKES:
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _files(tmp_path)
        before = _tree(tmp_path)
        try:
            code: object = main(list(arguments))
        except BaseException as error:  # what a user would see as a traceback
            code = f"{type(error).__name__}: {error}"
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.strip()]
        line = f"gpt2train {arguments[0]}: "
        expected = 5 if TORN & set(arguments) else 2
        if code != expected or part not in said.err or "Traceback" in said.err or said.out or not 0 < len(lines) <= 6:
            wrong.append((arguments, code, said.err[-600:]))
        elif not any(text.startswith((line, "gpt2train: ")) for text in lines):
            wrong.append((arguments, "no line of ours", said.err[-600:]))
        elif (now := _tree(tmp_path)) != before:
            wrong.append((arguments, "left something", str(sorted(set(now) ^ set(before)))))
    assert len(MISTAKES) >= 100
    assert not wrong, "\n".join(map(str, wrong))


def _tree(folder: Path) -> dict[str, bytes]:
    """All but the folder of a corpus whose list was refused, which holds its settings and nothing else yet."""
    begun = {"corpus", "corpus/.lock", "corpus/config.yaml"}
    files = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
    return {name: content for name, content in files.items() if name not in begun}
