"""A diff gives back the tuned model byte for byte, with the right base and no other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.files import digest_of_model
from tasks.weight_diff import DiffError, make_diff, recover
from tests.lion import lion

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save(model: Any, folder: Path, dtype: torch.dtype, tiny_model: Path) -> Path:
    """In several shards, one of them of two types: its tensors are not in the order of their names."""
    model.to(dtype).model.norm.float()
    model.save_pretrained(folder, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def tuned_from(tiny_model: Path, seed: int = 1) -> Any:
    """The tiny model with every weight moved a little, some by a lot, one to NaN."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 1e-3
        model.model.norm.weight[:3] = torch.tensor([1e30, -0.0, float("nan")])
    return model


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return save(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "base", torch.bfloat16, tiny_model)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("base_in", DTYPES)
def test_a_round_trip_gives_the_same_bytes_in_every_precision(
    base_in: str, kept: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = save(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "base", DTYPES[base_in], tiny_model
    )  # fmt: skip
    tuned = save(tuned_from(tiny_model), tmp_path / "tuned", DTYPES[kept], tiny_model)
    assert len(list(tuned.glob("*.safetensors"))) > 2
    make_diff(base, tuned, tmp_path / "diff", "some/base")
    recover(base, tmp_path / "diff", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tuned)


def test_a_larger_and_a_smaller_vocabulary_come_back(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    for rows in (1100, 600):
        model = tuned_from(tiny_model)
        model.resize_token_embeddings(rows, mean_resizing=False)
        tuned = save(model, tmp_path / f"tuned-{rows}", torch.bfloat16, tiny_model)
        make_diff(base, tuned, tmp_path / f"diff-{rows}", "some/base")
        recover(base, tmp_path / f"diff-{rows}", tmp_path / f"again-{rows}")
        assert files_of(tmp_path / f"again-{rows}") == files_of(tuned)


def test_the_diff_itself_does_not_hold_the_tuned_weights(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    make_diff(base, base, tmp_path / "diff", "some/base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "diff")
    assert all(not weight.any() for weight in again.parameters())


def test_a_wrong_base_is_refused_by_name_and_nothing_is_left(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = save(tuned_from(tiny_model, seed=2), tmp_path / "other", torch.bfloat16, tiny_model)
    make_diff(
        base,
        save(tuned_from(tiny_model), tmp_path / "tuned", torch.bfloat16, tiny_model),
        tmp_path / "diff",
        "some/base",
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DiffError, match=r"other is not the base .*, some/base: its tensor model\.\S+ is another"):
        recover(other, tmp_path / "diff", tmp_path / "again")
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_of_another_architecture_is_refused_by_name(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    shallow = AutoModelForCausalLM.from_pretrained(tiny_model)
    shallow.model.layers = shallow.model.layers[:2]
    save(shallow, tmp_path / "shallow", torch.bfloat16, tiny_model)
    make_diff(base, base, tmp_path / "diff", "some/base")
    with pytest.raises(DiffError, match=r"it has no tensor model\.layers\.[23]\.\S+ Give some/base as --base"):
        recover(tmp_path / "shallow", tmp_path / "diff", tmp_path / "again")


@pytest.mark.parametrize("broken", ["model-00002-of", "config.json"])
def test_a_damaged_diff_is_refused(broken: str, base: Path, tmp_path: Path) -> None:
    make_diff(base, base, tmp_path / "diff", "some/base")
    file = next(path for path in (tmp_path / "diff").iterdir() if path.name.startswith(broken))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DiffError, match=f"{broken}.* is damaged"):
        recover(base, tmp_path / "diff", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ['{"format": 1, "ba', "{}", "[]", "5", "[" * 100_000])
def test_a_diff_whose_manifest_is_damaged_is_refused_by_name(text: str, base: Path, tmp_path: Path) -> None:
    make_diff(base, base, tmp_path / "diff", "some/base")
    (tmp_path / "diff" / "diff.json").write_text(text)
    with pytest.raises(DiffError, match=r"diff/diff\.json is damaged"):
        recover(base, tmp_path / "diff", tmp_path / "again")


@pytest.mark.parametrize(
    "header",
    [
        "[1]",
        "[" * 100_000,
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-80, -72]}}',
        '{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 8]}}',
    ],
)
def test_a_file_whose_header_makes_no_sense_is_refused_by_name(header: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    file = tmp_path / "odd" / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(DiffError, match=f"{file} is not a file of safetensors"):
        make_diff(base, tmp_path / "odd", tmp_path / "diff", "some/base")


def test_a_diff_that_names_files_elsewhere_is_refused(base: Path, tmp_path: Path) -> None:
    make_diff(base, base, tmp_path / "diff", "some/base")
    told = json.loads((tmp_path / "diff" / "diff.json").read_text())
    told["tuned"]["files"] = {"../victim": "0"}
    (tmp_path / "victim").write_text("it is there")
    (tmp_path / "diff" / "diff.json").write_text(json.dumps(told))
    with pytest.raises(DiffError, match="is no file in it"):
        recover(base, tmp_path / "diff", tmp_path / "again")


def test_what_is_no_model_or_is_there_already_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffError, match=r"no \*\.safetensors"):
        make_diff(base, tmp_path / "empty", tmp_path / "diff", "b")
    with pytest.raises(DiffError, match="is there already"):
        make_diff(base, base, tmp_path / "empty", "b")
    with pytest.raises(DiffError, match="no complete diff"):
        recover(base, tmp_path / "empty", tmp_path / "again")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nope!")
    with pytest.raises(DiffError, match="not a file of safetensors"):
        make_diff(base, tmp_path / "empty", tmp_path / "diff", "b")
    (tmp_path / "empty" / "diff.json").write_text('{"format": 2}')
    with pytest.raises(DiffError, match="is a diff of format 2; this version knows format 1"):
        recover(base, tmp_path / "empty", tmp_path / "again")
    file = sorted(base.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])  # as a download leaves it that was broken off
    with pytest.raises(DiffError, match=f"{file} is cut off"):
        make_diff(base, base, tmp_path / "diff", "b")


def test_the_command_makes_and_recovers(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    tuned = save(tuned_from(tiny_model), tmp_path / "tuned", torch.bfloat16, tiny_model)
    for verb in (
        ["make", "--tuned", tuned, "--out", tmp_path / "d"],
        ["recover", "--diff", tmp_path / "d", "--out", tmp_path / "t"],
    ):
        lion(tmp_path / "home", "diff", verb[0], "--base", str(base), *map(str, verb[1:]))
    assert digest_of_model(tmp_path / "t") == digest_of_model(tuned)
    refused = lion(
        tmp_path / "home",
        "diff",
        "recover",
        f"--base={tuned}",
        f"--diff={tmp_path / 'd'}",
        f"--out={tmp_path / 'u'}",
        code=2,
    )
    assert "is not the base that this diff was made from, base:" in refused.stderr


@pytest.mark.slow
def test_the_embedded_model_goes_round_in_the_memory_of_one_shard(tmp_path: Path) -> None:
    from tasks.jobs.convert import EMBEDDED, convert

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    convert(EMBEDDED, base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.01
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    program = """
import sys
from pathlib import Path
from tasks.weight_diff import make_diff, recover
base, tuned, diff, again = map(Path, sys.argv[1:])
make_diff(base, tuned, diff, "b")
recover(base, diff, again)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held before it forked
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
    folders = [base, tuned, tmp_path / "diff", tmp_path / "again"]
    peak = int(subprocess.run([sys.executable, "-c", program, *folders], check=True, capture_output=True).stdout)
    assert digest_of_model(tmp_path / "again") == digest_of_model(tuned)
    largest = max(file.stat().st_size for file in tuned.glob("*.safetensors"))
    assert peak < 1.5 * largest + 300e6
    print(f"peak {peak / 1e6:.0f} MB, the largest shard {largest / 1e6:.0f} MB")
