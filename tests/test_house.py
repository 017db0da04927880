"""The laws of the house: which package may import which, and no circle between rooms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "gpt2train", "launch")
STAGES = (
    *(f"crawl.{name}" for name in ("urls", "robots", "fetch", "warc")),
    *(f"clean.{name}" for name in ("extract", "language", "quality", "dedup", "contamination")),
    "pack",
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Dotted names that a file imports; with `top_only`, not those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("name", [m for m in modules() if m.startswith("data_pipeline")])
def test_the_pipeline_knows_nothing_of_training(name: str) -> None:
    assert not roots(modules()[name]) & {"torch", "deepspeed", "gpt2train", "launch", "transformers"}


@pytest.mark.parametrize("name", [m for m in modules() if m.startswith("launch")])
def test_launch_knows_neither(name: str) -> None:
    assert not roots(modules()[name]) & {"torch", "deepspeed", "gpt2train", "data_pipeline"}


@pytest.mark.parametrize("name", [m for m in modules() if m.startswith("gpt2train")])
def test_training_takes_tokens_alone_from_the_pipeline(name: str) -> None:
    taken = {i for i in imports(modules()[name]) if i.startswith("data_pipeline")}
    if name == "gpt2train.commands.joined":
        return
    allowed = ("data_pipeline.token_shards", "data_pipeline.tokenizer")
    if name == "gpt2train.release.audit":  # it looks for the very things that the corpus masks
        allowed = (*allowed, "data_pipeline.clean.personal")
    if name == "gpt2train.evaluation.contamination":
        # What a model was trained on of its test sets must be counted as the corpus counts it: one n-gram, one hash.
        allowed = (*allowed, "data_pipeline.clean.contamination")
    if name.startswith("gpt2train.saving."):
        # One client of object stores: how long a request is tried again, when it is whole, and that no secret of the
        # environment is told must not be decided twice.
        allowed = (*allowed, "data_pipeline.storage.bucket", "data_pipeline.records")
    assert all(
        i in ("data_pipeline", "data_pipeline.clean", "data_pipeline.storage") or i.startswith(allowed) for i in taken
    ), taken
    if name not in ("gpt2train.engine", "gpt2train.checkpoint"):
        assert "deepspeed" not in roots(modules()[name])
    if name != "gpt2train.commands.joined":
        assert "launch" not in roots(modules()[name])


@pytest.mark.parametrize("name", STAGES)
def test_stages_do_not_import_each_other(name: str) -> None:
    others = {f"data_pipeline.{s}" for s in STAGES} - {f"data_pipeline.{name}"}
    crossing = {i for i in imports(modules()[f"data_pipeline.{name}"]) if i in others}
    # The fetch writes WARC records and obeys robots.txt: those two are its tools, not stages beside it.
    if name == "crawl.fetch":
        crossing -= {"data_pipeline.crawl.warc", "data_pipeline.crawl.robots"}
    assert not crossing


def test_no_import_circle() -> None:
    names = modules()
    graph = {name: {i for i in imports(path) if i in names and i != name} for name, path in names.items()}
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == "done":
            return
        assert name not in trail, f"circle: {' → '.join((*trail, name))}"
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        state[name] = "done"

    for name in sorted(graph):
        visit(name, ())


def test_settings_import_nothing_heavy() -> None:
    for name in (
        "data_pipeline.bounds",
        "data_pipeline.config",
        "gpt2train.config",
        "gpt2train.bounds",
        "gpt2train.cli",
        "gpt2train.commands.table",
        "gpt2train.errors",
        "gpt2train.evaluation.config",
        "gpt2train.evaluation.tasks",
        "gpt2train.evaluation.sources",
        "gpt2train.generation.config",
        "gpt2train.planning.config",
        "gpt2train.release.config",
        "launch.config",
    ):
        heavy = imports(modules()[name], top_only=True)
        assert not {i.split(".")[0] for i in heavy} & {"torch", "deepspeed", "hydra", "pyarrow", "omegaconf"}, name


def test_every_room_is_on_the_map() -> None:
    for folder in {path.parent for path in modules().values()}:
        module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        documentation = ast.get_docstring(module, clean=False) or ""
        rooms = {p.stem for p in folder.glob("*.py")} - {"__init__", "__main__"}
        rooms |= {f"{p.parent.name}/" for p in folder.glob("*/__init__.py")}
        named = {line.split()[0] for line in documentation.split("\n") if line.strip()}
        assert rooms <= named, f"{folder.name}/__init__.py does not name {sorted(rooms - named)}"


def test_a_folder_holds_about_twenty_rooms() -> None:
    for folder in {path.parent for path in modules().values()}:
        assert len(list(folder.glob("*.py"))) <= 24, folder


def test_every_module_says_what_it_is_for() -> None:
    for name, path in modules().items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_every_test_that_the_docs_name_exists() -> None:
    named = {
        (file, test)
        for page in (ROOT / "docs").glob("*.md")
        for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text(encoding="utf-8"))
    }
    there = {
        (path.name, node.name)
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(named) > 50
    assert named <= there, sorted(named - there)
