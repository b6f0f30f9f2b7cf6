"""Training rows: from Parquet to token ids in a mapped file, and from there to batches.

Rows are rendered and tokenised once, a few thousand at a time, into an Arrow file that stays on disk and is mapped:
memory holds the lengths and the batch at hand, however many rows there are.

Knows nothing of models, of the Trainer or of several processes.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset, Sampler

from storage.files import write_atomic
from tasks.jobs.settings import SftSettings
from tasks.jobs.template import encode_example, end_of_turn

IGNORE = -100  # the label that a loss passes over
CHUNK_ROWS = 4096
WINDOW_BATCHES = 32  # batches that are made together, so that each finds rows of like length

SCHEMA = pa.schema(
    [("instruction_id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("prompt_length", pa.int32())]
)


class DataError(Exception):
    """The rows, or the tokenizer, are nothing to train with."""


def encode_rows(data: Path, tokenizer: Any, max_length: int, target: Path) -> dict[str, Any]:
    """Write the rows of a Parquet file as token ids into `target`, and say what became of them.

    The report is written last, beside `target`: where it is, both are complete and are not made again. A row is left
    out where its prompt alone fills `max_length`, where its answer is blank, and where the chat template refuses it.

    Raises:
        DataError: nothing is left, or the tokenizer knows no end.
    """
    report_file = target.with_suffix(".json")
    if report_file.exists():
        return json.loads(report_file.read_bytes())
    end = end_of_turn(tokenizer)
    if end is None:
        raise DataError("no answer could end: the tokenizer has no eos_token, and the chat template no end of turn")
    left_out: dict[str, list[str]] = {"no_label": [], "empty": [], "refused_by_template": []}
    cut, not_whole, kept = [], 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in pq.ParquetFile(data).iter_batches(CHUNK_ROWS):
            rows = []
            for row in batch.to_pylist():
                name, whole = row["instruction_id"], row["whole"]
                try:
                    example = encode_example(
                        tokenizer, row["messages"], row["response"], whole=whole, max_length=max_length
                    )
                except TemplateError:
                    left_out["refused_by_template"].append(name)
                    continue
                answer_tokens = len(example.input_ids) - example.prompt_length - whole
                if not row["response"].strip():
                    left_out["empty"].append(name)
                    continue
                if answer_tokens <= 0 or len(example.input_ids) > max_length:
                    left_out["no_label"].append(name)
                    continue
                cut += [name] if example.cut else []
                not_whole += not whole
                kept += 1
                rows.append((name, example.input_ids, example.prompt_length))
            if rows:
                writer.write_batch(pa.record_batch([list(column) for column in zip(*rows)], schema=SCHEMA))
    if not kept:
        raise DataError(
            f"none of {sum(map(len, left_out.values()))} rows has a label: the prompt alone fills max_length "
            f"{max_length} in {len(left_out['no_label'])}, the answer is empty in {len(left_out['empty'])}, the chat template "
            f"refuses {len(left_out['refused_by_template'])}"
        )
    report = {
        "rows": kept,
        "left_out": left_out,
        "cut": cut,
        "cut_share": round(len(cut) / kept, 4),
        "end_of_turn": end,
        "rows_with_end_of_turn_in_loss": kept - not_whole,
        "rows_without_end": not_whole,
    }
    write_atomic(report_file, json.dumps(report, ensure_ascii=False))
    return report


class Examples(Dataset[dict[str, Any]]):
    """Encoded rows of a mapped file, or some of them. The one beyond the last has a token and no label: see `Order`."""

    def __init__(self, path: Path, places: np.ndarray | None = None):
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.places = np.arange(self._table.num_rows) if places is None else places
        self.lengths = pc.list_value_length(self._table["input_ids"]).to_numpy()[self.places]
        self.labelled = self.lengths - self._table["prompt_length"].to_numpy()[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == len(self):
            return {"instruction_id": "", "input_ids": np.zeros(1, np.int32), "prompt_length": 1}  # nothing is learned
        place = int(self.places[index])
        return {
            "instruction_id": self._table["instruction_id"][place].as_py(),
            "input_ids": self._table["input_ids"][place].values.to_numpy(),
            "prompt_length": self._table["prompt_length"][place].as_py(),
        }

    def split(self, share: float, seed: int) -> tuple["Examples", "Examples"]:
        """Rows to train on and rows held out."""
        order = np.random.default_rng(seed).permutation(self.places)
        held_out = math.floor(share * len(order))
        return Examples(self.path, np.sort(order[held_out:])), Examples(self.path, np.sort(order[:held_out]))


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as tensors (rows, longest), padded on the right by their lengths: no token is taken for padding.

    Labels are given for the labelled positions alone, and `logits_to_keep` says which these are: the model computes
    its vocabulary there and nowhere else.
    """
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    input_ids = np.zeros(shape, np.int64)
    attention_mask, predicting = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[place, :length] = row["input_ids"]
        attention_mask[place, :length] = 1
        predicting[place, :length] = _predicting(row)
    return _batch(rows, input_ids, predicting, attention_mask=torch.from_numpy(attention_mask))


def packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows end to end in one sequence (1, tokens). Positions begin anew with each row, which keeps attention apart."""
    input_ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)[None]
    position_ids = np.concatenate([np.arange(len(row["input_ids"])) for row in rows])[None]
    predicting = np.concatenate([_predicting(row) for row in rows])[None]
    return _batch(rows, input_ids, predicting, position_ids=torch.from_numpy(position_ids))


def _predicting(row: dict[str, Any]) -> np.ndarray:
    """(tokens), whether a label follows: from the prompt's last token on, and not after the row's last."""
    following = np.arange(1, len(row["input_ids"]) + 1)
    return (row["prompt_length"] <= following) & (following < len(row["input_ids"]))


def _batch(rows: list[dict[str, Any]], input_ids: np.ndarray, predicting: np.ndarray, **more: Any) -> dict[str, Any]:
    labels = torch.from_numpy(np.concatenate([row["input_ids"][row["prompt_length"] :] for row in rows])).long()
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": labels,  # (labelled positions,), as is shift_labels: already those of the next token
        "shift_labels": labels,
        "logits_to_keep": torch.from_numpy(predicting),
        "instruction_ids": [row["instruction_id"] for row in rows],
        "tokens": sum(len(row["input_ids"]) for row in rows if row["prompt_length"] < len(row["input_ids"])),
        **more,
    }


COLLATE: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "none": padded,
    "grouped": padded,
    "packed": packed,
}


class Order(Sampler[int]):
    """In which order an epoch shows its rows: by seed and epoch alone, so that a resumed training goes on in it.

    Where several processes train, an epoch is filled up with rows without a label until all have as many batches: what
    accelerate would fill it up with are rows that were trained on already.
    """

    def __init__(self, examples: Examples, settings: SftSettings, seed: int):
        self.lengths, self.settings, self.seed, self.epoch = examples.lengths, settings, seed, 0
        at_once = settings.per_device_train_batch_size * settings.world_size
        self.fill = -len(examples) % at_once if settings.world_size > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fill

    def __iter__(self) -> Iterator[int]:
        order = order_of_rows(self.lengths, self.settings, self.seed, self.epoch).tolist()
        return iter(order + [len(self.lengths)] * self.fill)


def order_of_rows(lengths: np.ndarray, settings: SftSettings, seed: int, epoch: int) -> np.ndarray:
    """Rows of an epoch; consecutive ones share a batch, consecutive batches go to the devices in turn.

    Rows are drawn at random. Within a window of whole optimizer steps, and of at least 32 batches, they are then put
    into batches by length. Where a step has that many batches it sees the very rows that it would have seen in random
    order, and its gradient is the same.

    In the first epoch the batch that needs the most memory comes first, so that memory falls short at once or never.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    at_once = settings.per_device_train_batch_size * settings.world_size
    window = settings.global_batch_size * math.ceil(WINDOW_BATCHES * at_once / settings.global_batch_size)
    if settings.packing != "none":
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        order = np.concatenate([_regroup(rows, lengths, settings, at_once, rng) for rows in windows])
    whole = len(order) // at_once * at_once
    if epoch == 0 and whole:
        longest = int(lengths[order].argmax())
        if longest >= whole:  # it is left over
            order[[0, longest]] = order[[longest, 0]]
        batches = order[:whole].reshape(-1, at_once)
        size = lengths[batches].sum(1) if settings.packing == "packed" else lengths[batches].max(1)
        largest = int(size.argmax())
        batches[[0, largest]] = batches[[largest, 0]]
        order = np.concatenate([batches.reshape(-1), order[whole:]])
    return order


def _regroup(
    rows: np.ndarray, lengths: np.ndarray, settings: SftSettings, at_once: int, rng: np.random.Generator
) -> np.ndarray:
    """The rows of a window, batch by batch. Rows that fill no batch of all devices stay at the end."""
    whole = len(rows) // at_once * at_once
    by_length = rows[:whole][np.argsort(lengths[rows[:whole]], kind="stable")]
    if settings.packing == "packed":  # each batch gets its part of short and of long rows: all are alike in tokens
        by_length = by_length.reshape(settings.per_device_train_batch_size, -1).T
    batches = rng.permutation(by_length.reshape(-1, at_once))
    return np.concatenate([batches.reshape(-1), rows[whole:]])
