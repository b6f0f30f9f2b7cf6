"""Weight diffs: a tuned model told as its difference to a base model, for weights that may not be passed on themselves.

    lion diff make --base B --tuned T --out D
    lion diff recover --base B --diff D --out T

A diff is a folder like the tuned model's: the same shards under the same names, in each the tuned bits minus the
base's, modulo 2^bits, so that recovering is exact in every precision. A tensor that the base lacks, or the rows of a
larger vocabulary, are told whole. `diff.json`, written last, holds the checksums of the base's tensors and of the
tuned files; a recovered model is that file for file, byte for byte, or it is not made.

One tensor is in memory at a time. Safetensors are read and written here, since the library writes whole shards and
its numpy has no bf16. Needs no torch.
"""

import hashlib
import json
import math
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.files import model_files, whole_folder, write_atomic

FORMAT = 1
MANIFEST = "diff.json"
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the format


class DiffError(ValueError):
    """A diff cannot be made or recovered. The message names the folder, the tensor and the way out."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in a file of safetensors."""

    file: Path
    dtype: str  # as the format writes it: BF16, F32, ...
    shape: tuple[int, ...]
    begin: int  # bytes, from the file's beginning
    end: int

    def is_sound(self, first: int) -> bool:
        """Whether its shape fits its place, which is not before the first tensor's."""
        size = math.prod(self.shape)
        return self.begin >= first and size >= 0 and self.end - self.begin in {size * width for width in BITS}

    def bits(self) -> np.ndarray:
        """Its numbers as unsigned integers of their width."""
        size = np.prod(self.shape, dtype=np.int64)
        width = (self.end - self.begin) // size if size else 1
        return np.fromfile(self.file, BITS[int(width)], int(size), offset=self.begin)


class Shard:
    """A file of safetensors: its header, as it stands there, and its tensors in the order of their bytes."""

    def __init__(self, file: Path):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > LARGEST_HEADER:
                raise DiffError(f"{file} is not a file of safetensors.")
            self.head = length.to_bytes(8, "little") + opened.read(length)
        try:
            named = {name: entry for name, entry in json.loads(self.head[8:]).items() if name != "__metadata__"}
            self.tensors = {
                name: Tensor(file, entry["dtype"], tuple(entry["shape"]), *(len(self.head) + at for at in entry["data_offsets"]))
                for name, entry in sorted(named.items(), key=lambda pair: pair[1]["data_offsets"])
            }  # fmt: skip
            sound = all(tensor.is_sound(len(self.head)) for tensor in self.tensors.values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise DiffError(f"{file} is not a file of safetensors.")
        if file.stat().st_size < max((tensor.end for tensor in self.tensors.values()), default=0):
            raise DiffError(f"{file} is cut off: it is shorter than its header says.")


def make_diff(base: Path, tuned: Path, out: Path, base_name: str) -> dict[str, Any]:
    """Write the folder `out`, from which and from the base the tuned model can be recovered; what `diff.json` says.

    Args:
        base_name: what a person who recovers is told to get, for example a Hub id.

    Raises:
        DiffError: a folder holds no safetensors, or `out` is there already.
    """
    theirs = _tensors(base)
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    with _made(out) as folder:
        for file in _shards(tuned):
            shard = Shard(file)
            with (folder / file.name).open("wb") as written:
                written.write(shard.head)
                for name, tensor in shard.tensors.items():
                    bits = tensor.bits()
                    if name in theirs:
                        against = theirs[name].bits()
                        tensors[name] = _checksum(against, theirs[name])
                        bits -= _aligned(against, theirs[name], tensor)
                    bits.tofile(written)
            files[file.name] = _checksum_of_file(file)
        for file in _small_files(tuned):
            shutil.copyfile(file, folder / file.name)
            files[file.name] = _checksum_of_file(file)
        told = {
            "format": FORMAT,
            "base": {"name": base_name, "tensors": tensors},
            "tuned": {"files": files},
        }
        write_atomic(folder / MANIFEST, json.dumps(told, indent=1))
    return told


def recover(base: Path, diff: Path, out: Path) -> dict[str, Any]:
    """Write the tuned model into the folder `out`; what `diff.json` says.

    Raises:
        DiffError: the base is another than the diff was made from, the diff is damaged, or `out` is there already.
    """
    if not (diff / MANIFEST).is_file():
        raise DiffError(f"{diff}: no {MANIFEST} in it, so no complete diff.")
    try:
        told = json.loads((diff / MANIFEST).read_bytes())
        format = told["format"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DiffError(f"{diff / MANIFEST} is damaged: it does not tell what it is. Get the diff again.") from None
    if format != FORMAT:
        raise DiffError(f"{diff} is a diff of format {format}; this version knows format {FORMAT}.")
    wanted, theirs = told["base"], _tensors(base)
    missing = [name for name in wanted["tensors"] if name not in theirs]
    if missing:
        raise DiffError(_wrong_base(base, wanted["name"], f"it has no tensor {missing[0]}"))
    with _made(out) as folder:
        for name, expected in told["tuned"]["files"].items():
            if Path(name).name != name or not (diff / name).is_file():
                raise DiffError(f"{diff}: {name!r}, which {MANIFEST} tells of, is no file in it.")
            if name.endswith(".safetensors"):
                _recover_shard(Shard(diff / name), base, theirs, wanted, folder / name)
            else:
                shutil.copyfile(diff / name, folder / name)
            if _checksum_of_file(folder / name) != expected:
                raise DiffError(f"{diff / name} is damaged: what it gives is not the model it was made from.")
    return told


def _recover_shard(shard: Shard, base: Path, theirs: dict[str, Tensor], wanted: dict[str, Any], out: Path) -> None:
    with out.open("wb") as written:
        written.write(shard.head)
        for name, tensor in shard.tensors.items():
            bits = tensor.bits()
            if name in wanted["tensors"]:
                against = theirs[name].bits()
                if _checksum(against, theirs[name]) != wanted["tensors"][name]:
                    raise DiffError(_wrong_base(base, wanted["name"], f"its tensor {name} is another"))
                bits += _aligned(against, theirs[name], tensor)
            bits.tofile(written)


def _wrong_base(base: Path, name: str, why: str) -> str:
    return f"{base} is not the base that this diff was made from, {name}: {why}. Give {name} as --base."


def _aligned(bits: np.ndarray, base: Tensor, tuned: Tensor) -> np.ndarray:
    """The base's bits in the tuned tensor's type and shape: rows and columns it lacks are zero."""
    bits = _converted(bits, base.dtype, tuned.dtype)
    if base.shape == tuned.shape:
        return bits
    result = np.zeros(tuned.shape, bits.dtype)
    if len(base.shape) == len(tuned.shape):
        common = tuple(slice(min(sizes)) for sizes in zip(base.shape, tuned.shape))
        result[common] = bits.reshape(base.shape)[common]
    return result.ravel()


def _converted(bits: np.ndarray, old: str, new: str) -> np.ndarray:
    """Numbers of one type in another. It need not round well, only always alike."""
    if old == new:
        return bits
    if {old, new} - {*FLOATS, "BF16"}:
        raise DiffError(f"a tensor of type {new} cannot be told as a difference to one of type {old}.")
    if old == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            values = bits.view(FLOATS[old]).astype(np.float32)
    if new == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(FLOATS[new])
    return converted.view(BITS[converted.itemsize])


def _checksum(bits: np.ndarray, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode())
    digest.update(bits.data)
    return digest.hexdigest()


def _checksum_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _shards(folder: Path) -> list[Path]:
    if files := sorted(folder.glob("*.safetensors")):
        return files
    raise DiffError(f"{folder}: no *.safetensors in it. Name the folder of a model, or save it as safetensors first.")


def _small_files(folder: Path) -> list[Path]:
    """What belongs to a model beside its weights: configs, tokenizer, template, the list of shards."""
    return [file for file in model_files(folder) if file.suffix != ".safetensors"]


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in _shards(folder) for name, tensor in Shard(file).tensors.items()}


def _made(out: Path) -> AbstractContextManager[Path]:
    if out.exists():
        raise DiffError(f"{out} is there already. Name a new folder as --out.")
    return whole_folder(out)
