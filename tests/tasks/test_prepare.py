"""A model's name stands for what is behind it, and a name that leads nowhere is refused before anything is computed."""

import shutil
from pathlib import Path

import pytest

from tasks.models.local import LocalModel
from tasks.prepare import ModelNotFound, source_digest


def digest(name: Path | str) -> str:
    return source_digest(LocalModel(model_name_or_path=str(name)))


def test_a_folder_stands_for_its_content_wherever_it_lies_and_another_name_for_itself(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert digest(copy) == digest(tiny_model)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    assert digest(copy) != digest(tiny_model)
    assert digest("org/name") == "org/name"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["model.safetensors"], r"no config\.json in this folder"),
        (["config.json", "pytorch_model.bin"], r"no \*\.safetensors in this folder"),
        (None, "no such folder"),
    ],
)
def test_a_folder_without_a_model_is_refused_by_what_it_lacks(
    files: list[str] | None, why: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
    for name in files or []:
        (folder / name).write_text("{}")
    with pytest.raises(ModelNotFound, match=f"{folder}: {why}"):
        digest(folder)
