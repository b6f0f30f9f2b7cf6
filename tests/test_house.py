"""The house keeps its rules: who may import whom, torch only in jobs, the README's tree is the tree."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "peft"}
FORBIDDEN = {  # place -> top-level packages it may not import
    "flows": HEAVY | {"openai", "pyarrow", "duckdb"},
    "tasks": HEAVY | {"openai", "flows", "pyarrow", "duckdb"},
    "tasks/models": HEAVY | {"flows", "prefect"},
    "tasks/jobs": {"flows", "prefect", "openai", "duckdb"},
    "storage": HEAVY | {"flows", "tasks", "prefect", "openai"},
}
# Not stages: what stages share, and what commands do to what stages made.
SHARED = {
    "policies",
    "novelty",
    "models",
    "jobs",
    "progress",
    "shards",
    "scores",
    "relative",
    "selection",
    "contamination",
    "export",
    "weight_diff",
}
# The student's config holds how a student starts; questions are read from files as seeds are.
SHARED_CONFIG = {("student", "prepare"), ("questions", "seed")}


def modules() -> list[Path]:
    return [path for place in ("flows", "tasks", "storage") for path in (ROOT / place).rglob("*.py")]


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place_of(path: Path) -> str:
    folder = path.parent.relative_to(ROOT).as_posix()
    return next(place for place in sorted(FORBIDDEN, key=len, reverse=True) if folder.startswith(place))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_only_downward(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports_of(path)}
    assert not packages & FORBIDDEN[place_of(path)]


def test_no_stage_imports_another() -> None:
    stages = {path.stem for path in (ROOT / "tasks").glob("*.py")} - SHARED - {"__init__", "report"}
    for stage in stages:
        imported = {
            name.split(".")[1] for name in imports_of(ROOT / "tasks" / f"{stage}.py") if name.startswith("tasks.")
        }
        others = {other for other in imported & stages if other != stage and (stage, other) not in SHARED_CONFIG}
        assert not others, f"tasks/{stage}.py imports the stages {others}"


def test_the_orchestrating_process_never_imports_torch() -> None:
    code = (
        "import sys, flows.cli, flows.distill, storage.gc; print(sorted(set(sys.modules) & {'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_shows_every_file_of_the_house() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    named = Counter(re.findall(r"[\w.-]+\.(?:py|yaml|md|txt|jinja|jsonl)", tree))
    files = Counter(path.name for path in modules() if path.name != "__init__.py")  # two may have one name
    assert not files - named, "missing from the README's tree"
    there = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts and ".lion" not in path.parts}
    assert not named.keys() - there, "in the README's tree, and not there"


def test_texts_are_read_and_written_in_no_encoding_that_the_machine_happens_to_have() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"read_text", "write_text"}:
                named = {keyword.arg for keyword in node.keywords}
                assert "encoding" in named, f"{path}, line {node.lineno}: name the encoding"


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
