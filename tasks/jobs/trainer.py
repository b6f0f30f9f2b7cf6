"""Hugging Face's Trainer, and what we change of it: the order of rows, what is watched, when a checkpoint is whole.

Knows nothing of jobs, of loading and of saving the final model: `tasks.jobs.sft` does.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Trainer, TrainerCallback

from storage.files import write_atomic
from tasks.jobs.dataset import IGNORE, Examples, Order, packed, padded
from tasks.jobs.distributed import raise_unless_sharded, shard_on_cpu
from tasks.jobs.launch import report_progress
from tasks.jobs.settings import SftSettings

CHECKED_ROWS = 2
NOTHING_DONE = {"step": 0, "seconds": 0.0, "tokens": 0, "padded_tokens": 0}  # what a history begins after
PROGRESS_SECONDS, LOG_SECONDS = 1.0, 15.0
# By how much of it, or of a nat where it is less, our loss of a few rows may differ from the model's own: 16 bit sum up
# otherwise in other shapes, and logits at the wrong places cost several nats.
OWN_LOSS_TOLERANCE, OWN_LOSS_TOLERANCE_16_BIT = 1e-2, 0.1


class TrainingError(Exception):
    """Training cannot go on, or made something that cannot be trusted."""


class SftTrainer(Trainer):
    """The Trainer with our order of rows, a count of tokens, and checkpoints that say that they are complete."""

    def __init__(self, settings: SftSettings, history: list[dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self.settings, self.history = settings, history
        self.order = Order(self.train_dataset, settings, self.args.seed)
        self.difference_from_own_loss: float | None = None  # as FirstCheck finds it
        # Tokens of this process, real and padded; what was counted before a restart is the first process's.
        before = history[-1] if history and self.is_world_process_zero() else NOTHING_DONE
        self.counted = torch.tensor([before["tokens"], before["padded_tokens"]], device=self.args.device)
        self._last: tuple[float, int, int] | None = None  # when it was logged, and both counts

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule from its second step on: in its first the rate is 0, and nothing is learned."""
        if self.lr_scheduler is not None:  # DeepSpeed had it made
            return self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        scheduler.lr_lambdas = [partial(_a_step_on, rate) for rate in scheduler.lr_lambdas]
        for group, peak, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = peak * rate(0)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        ids, tokens = inputs.pop("instruction_ids"), inputs.pop("tokens")
        self.counted += torch.tensor([tokens, inputs["input_ids"].numel()], device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}, on the rows {', '.join(ids)}; "
                "lower the learning rate or look at these rows"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens, padded_tokens = self.accelerator.reduce(self.counted).tolist()
            logs |= {"tokens": tokens, "padded_tokens": padded_tokens, "memory_gb": peak_memory_gb()}
            now = time.perf_counter()
            if self._last:  # rates of the steps since the last line
                then, tokens_then, padded_then = self._last
                logs["tokens_per_second"] = (tokens - tokens_then) / (now - then)
                logs["padded_tokens_per_second"] = (padded_tokens - padded_then) / (now - then)
            self._last = (now, tokens, padded_tokens)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer does; then, once all processes have written their part, mark it and drop the oldest."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            output = Path(self.args.output_dir)
            (output / f"checkpoint-{self.state.global_step}" / "complete").touch()
            for path in complete_checkpoints(output)[: -self.settings.save_total_limit]:
                shutil.rmtree(path)

    @torch.no_grad()
    def mean_loss(self, examples: Examples) -> float:
        """Loss a labelled token over rows, without learning from them. Each process takes its share."""
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        by_length = np.argsort(examples.lengths, kind="stable")
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model_wrapped.eval()
        # Every process computes equally often, for sharded models compute together.
        for turn in range(math.ceil(len(batches) / world)):
            place = turn * world + self.args.process_index
            batch = padded([examples[int(row)] for row in batches[min(place, len(batches) - 1)]])
            loss = self.model_wrapped(**self._prepare_inputs(model_inputs(batch))).loss
            if place < len(batches):
                labels = total.new_tensor(len(batch["labels"]))
                total += torch.stack([loss.double() * labels, labels])
        self.model_wrapped.train()
        summed, labels = self.accelerator.reduce(total).tolist()
        return summed / labels


def _a_step_on(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)


class FirstCheck(TrainerCallback):
    """Before the first step, on the wrapped model: the strategy took hold, and our batches give the model's own loss."""

    def __init__(self, trainer: SftTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        raise_unless_sharded(trainer.settings, trainer.model_wrapped)
        shortest = np.argsort(trainer.train_dataset.lengths, kind="stable")[:CHECKED_ROWS]
        rows = [trainer.train_dataset[int(place)] for place in shortest]
        trainer.difference_from_own_loss = difference = difference_from_own_loss(trainer, rows)
        if difference > (OWN_LOSS_TOLERANCE_16_BIT if args.bf16 or args.fp16 else OWN_LOSS_TOLERANCE):
            raise TrainingError(
                f"our batches give this model another loss than its own, by {difference:.3g} of it: "
                "it computes no logits at chosen places"
            )
        if trainer.settings.packing == "packed" and not keeps_rows_apart(trainer, rows):
            raise TrainingError(
                f"{type(trainer.model).__name__} does not keep the rows of a packed sequence apart: what one says "
                "changes the next; take packing: grouped"
            )


@torch.no_grad()
def difference_from_own_loss(trainer: SftTrainer, rows: list[dict[str, Any]]) -> float:
    """By what part of it, or of a nat, the loss of our batch differs from that of the rows one at a time, with all logits."""
    model = trainer.model_wrapped
    model.eval()
    ours = model(**trainer._prepare_inputs(model_inputs(trainer.data_collator(rows)))).loss.item()
    summed = labels = 0.0
    for row in rows:
        input_ids = torch.tensor(row["input_ids"], dtype=torch.long)[None]
        targets = input_ids.clone()
        targets[:, : row["prompt_length"]] = IGNORE
        loss = model(**trainer._prepare_inputs({"input_ids": input_ids, "labels": targets})).loss.item()
        count = input_ids.shape[1] - row["prompt_length"]
        summed, labels = summed + loss * count, labels + count
    model.train()
    return abs(ours - summed / labels) / max(summed / labels, 1.0)


@torch.no_grad()
def keeps_rows_apart(trainer: SftTrainer, rows: list[dict[str, Any]]) -> bool:
    """Whether the logits of a packed row stay what they are, to the bit, when the row before it says something else."""
    first, *others = rows
    other_first = first | {"input_ids": first["input_ids"][::-1]}
    model = trainer.model_wrapped
    model.eval()
    logits = [
        model(**trainer._prepare_inputs(model_inputs(packed([row, *others])))).logits[
            len(first["input_ids"]) - first["prompt_length"] :
        ]
        for row in (first, other_first)
    ]
    model.train()
    return bool(torch.equal(*logits))


class Watch(TrainerCallback):
    """Keeps the history, tells the parent process how far training is, and sets the epoch of the order of rows."""

    def __init__(self, trainer: SftTrainer, directory: Path):
        self._file, self._order, self._history = directory / "history.jsonl", trainer.order, trainer.history
        self._before = self._history[-1] if self._history else NOTHING_DONE
        self._told = self._logged = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        if state.is_world_process_zero:
            # Without the steps after the checkpoint: they come again.
            write_atomic(self._file, "".join(json.dumps(entry) + "\n" for entry in self._history))
            report_progress(state.global_step, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))  # accelerate forgets to, when several processes resume

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._started
        entry = {"step": state.global_step, "seconds": round(self._before["seconds"] + seconds, 3)}
        entry |= {name: logs.get(name) for name in ("epoch", "loss", "learning_rate", "grad_norm")}
        entry |= {name: int(logs[name]) for name in ("tokens", "padded_tokens")}
        self._history.append(entry)
        if not state.is_world_process_zero:
            return
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        rate = (entry["tokens"] - self._before["tokens"]) / seconds
        padded_rate = (entry["padded_tokens"] - self._before["padded_tokens"]) / seconds
        last = state.global_step == state.max_steps
        if last or seconds - self._told > PROGRESS_SECONDS:
            self._told = seconds
            figures = {"loss": round(entry["loss"], 3), "tokens/s": round(rate)}
            report_progress(state.global_step, state.max_steps, **figures)
        if last or seconds - self._logged > LOG_SECONDS:
            self._logged = seconds
            done = state.global_step - self._before["step"]
            print(
                f"step {state.global_step}/{state.max_steps}  loss {entry['loss']:.4f}  "
                f"learning rate {entry['learning_rate']:.3g}  gradient norm {entry['grad_norm']:.3g}  {rate:,.0f} tokens/s "
                f"({padded_rate:,.0f} with padding)  "
                f"memory {peak_memory_gb():.2f} GB  {seconds / done * (state.max_steps - state.global_step):,.0f} s left",
                flush=True,
            )

    def figures(self) -> dict[str, Any]:
        """What the whole training came to, earlier attempts at the job included."""
        last = self._history[-1]
        last_epoch = [entry["loss"] for entry in self._history if entry["epoch"] > math.ceil(last["epoch"]) - 1]
        return {
            "train_loss": sum(last_epoch) / len(last_epoch),
            "loss_by_step": [[entry["step"], entry["loss"]] for entry in self._history],
            "steps": last["step"],
            "tokens": last["tokens"],
            "padded_tokens": last["padded_tokens"],
            "padding_share": round(1 - last["tokens"] / last["padded_tokens"], 4),
            "tokens_per_second": round(last["tokens"] / last["seconds"], 1),
            "seconds": last["seconds"],
        }


def model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of a batch, what goes into the model."""
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def complete_checkpoints(output: Path) -> list[Path]:
    """Intermediate checkpoints that were written to their end, oldest first."""
    found = [path.parent for path in output.glob("checkpoint-*/complete")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def read_history(directory: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """The steps up to a checkpoint, of earlier attempts at this job."""
    if checkpoint is None:
        return []
    lines = (directory / "history.jsonl").read_text(encoding="utf-8").split("\n")
    entries = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half a line
    return [entry for entry in entries if entry["step"] <= int(checkpoint.name.split("-")[1])]


def peak_memory_gb() -> float:
    """The most that this process has held on its GPU; without one, what it holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
