"""The trainer against Hugging Face's Trainer set as Lion sets it, and against TRL with packing: real tokens a second.

    python -m tests.benchmarks.training

Same rows (the embedded model's answers to bundled seeds, up to 384 tokens, so that most end by themselves), same model
(the embedded one pruned to 22 layers; the tests' tiny one), fp32, one epoch, each in a process of its own, one after the
other. Counted are the tokens of the rows, whatever is computed for them; timed are the steps, loading excluded.

- *Lion's way*: batches of 8 random rows, padded to the longest, logits at every position.
- *TRL*: `SFTTrainer` with `packing=True`, 4 sequences of 512 tokens a step, which is about as many tokens as 8 rows.
  It lives in a virtual environment of its own under ~/.cache/lion-bench, which sees this one's torch and transformers.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from storage.pools import write_snapshot
from tasks.jobs.convert import EMBEDDED, convert
from tasks.jobs.engine import Engine
from tasks.jobs.launch import run_job
from tasks.jobs.process import ENVIRONMENT
from tasks.jobs.sampling import Sampling
from tasks.jobs.settings import SftSettings
from tasks.jobs.template import encode_example
from tests.benchmarks.inference import make_requests
from tests.benchmarks.run import figure, install
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
TRL = Path.home() / ".cache" / "lion-bench" / "trl"
ROWS, MAX_TOKENS, MAX_LENGTH, LAYERS = 48, 384, 512, 22
RUN_SECONDS = 900
SETTINGS = SftSettings(
    num_train_epochs=1,
    precision="fp32",
    learning_rate=1e-4,
    max_length=MAX_LENGTH,
    global_batch_size=8,
    per_device_train_batch_size=8,
    save_steps=0,
)

COMMON = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments, set_seed
model_path, rows_path, output = sys.argv[1:]
set_seed(0)
rows = json.load(open(rows_path))
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, use_cache=False)
class Clock(TrainerCallback):
    def on_train_begin(self, *args, **kwargs): self.begin = time.perf_counter()
    def on_step_end(self, *args, **kwargs): self.seconds = time.perf_counter() - self.begin
clock = Clock()
settings = dict(output_dir=output, num_train_epochs=1, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=0.03,
                use_cpu=True, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, bf16=False)
"""
PLAIN = """
from transformers import DataCollatorForSeq2Seq, Trainer
data = [{"input_ids": row["input_ids"], "labels": [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"]:]}
        for row in rows]
trainer = Trainer(model=model, args=TrainingArguments(per_device_train_batch_size=8, **settings), train_dataset=data,
                  data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[clock])
"""
PACKED = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
data = Dataset.from_list([{"prompt": row["messages"], "completion": [{"role": "assistant", "content": row["response"]}]}
                          for row in rows])
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=4, packing=True, max_length=512, **settings),
                     train_dataset=data, processing_class=tokenizer, callbacks=[clock])
"""
TRAIN = """
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"seconds": clock.seconds, "loss": losses[-1], "steps": trainer.state.global_step}))
"""


def run() -> list[dict[str, Any]]:
    """Ours against both, on both models."""
    figures = []
    why_not = install("trl", TRL, with_ours=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["LION_HOME"] = name
        folder = Path(name)
        base = folder / "base"
        base.mkdir()
        convert(EMBEDDED, base)
        requests = make_requests()[:ROWS]
        answers = Engine(base).generate(requests, Sampling(max_tokens=MAX_TOKENS))
        replies = {reply["id"]: reply for batch in answers for reply in batch}
        examples = [
            {
                "instruction_id": request["id"],
                "messages": request["messages"],
                "response": replies[request["id"]]["text"],
                "whole": replies[request["id"]]["finish_reason"] == "stop",
            }
            for request in requests
        ]
        pruned = {"model": str(base), "layers": LAYERS, "prompts": [row["messages"] for row in examples[:20]]}
        run_job("tasks.jobs.prune", pruned, folder / "pruned")
        for label, model in (("", folder / "pruned"), ("-tiny", make_tiny_model(folder / "tiny"))):
            rows = folder / f"rows{label}.json"
            kept, tokens = _encode(model, examples, rows)
            data = write_snapshot("examples", kept, step="benchmark", version=1).path
            plain = tokens / _peer(sys.executable, PLAIN, model, rows, folder)["seconds"]
            packed, excuse = None, why_not
            if excuse is None:
                try:
                    packed = tokens / _peer(str(TRL / "bin" / "python"), PACKED, model, rows, folder)["seconds"]
                except subprocess.SubprocessError as error:
                    excuse = f"it failed: {str(getattr(error, 'stderr', '') or error).strip()[-200:]}"
            job = {"model": str(model), "data": str(data), "config": SETTINGS.model_dump(mode="json"), "seed": 0}
            result = run_job("tasks.jobs.sft", job, folder / f"ours{label}")
            assert result["tokens"] == tokens, "the peers were given other rows"
            ours = tokens / result["seconds"]
            unit, lion = "real tokens/s", f"HF Trainer, random batches padded to the longest ({plain:.0f}/s)"
            trl = f"TRL with packing ({packed:.0f}/s)" if packed else f"TRL not run: {excuse}"
            figures += [
                figure(f"training-vs-lion{label}", ours, unit, lion, ours / plain),
                figure(f"training-vs-trl{label}", ours, unit, trl, ours / packed if packed else None),
                figure(f"training-padding{label}", 100 * result["padding_share"], "% of positions"),
            ]
    return figures


def _encode(model: Path, examples: list[dict[str, Any]], file: Path) -> tuple[list[dict[str, Any]], int]:
    """Write the rows that this model can be trained on, with their token ids; the rows, and the number of tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, tokens, encoded = [], 0, []
    for row in examples:
        example = encode_example(tokenizer, row["messages"], row["response"], whole=row["whole"], max_length=MAX_LENGTH)
        if example.prompt_length + 2 < len(example.input_ids) <= MAX_LENGTH:
            kept.append(row)
            tokens += len(example.input_ids)
            encoded.append(row | {"input_ids": example.input_ids, "prompt_length": example.prompt_length})
    file.write_text(json.dumps(encoded))
    return kept, tokens


def _peer(python: str, trainer: str, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """What a peer's program printed last."""
    command = [python, "-c", COMMON + trainer + TRAIN, str(model), str(rows), str(folder / "peer")]
    environment = {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=RUN_SECONDS
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
