"""Answers one conversation after another, a few words at a time: `python -m tasks.jobs.chat MODEL PRECISION QUANTIZATION`.

Reads lines `{"messages", "temperature", "top_p", "max_tokens"}` from standard input; for each prints lines
`{"text"}` as the words come and then `{"finish_reason"}`, or `{"error"}`. Ends when its input does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from tasks.jobs.engine import stop_tokens_of
from tasks.jobs.network import DTYPES, best_precision, load_weights
from tasks.jobs.template import encode_prompt


class Pieces(TextStreamer):
    """Prints words as JSON lines once no later token can change them."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            say(text=text)


def say(**line: Any) -> None:
    print(json.dumps(line, ensure_ascii=False), flush=True)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, asked: dict[str, Any]) -> None:
    """Answer one conversation. Of one too long for the context only the error is said."""
    prompt = encode_prompt(tokenizer, asked["messages"])
    room = model.config.get_text_config().max_position_embeddings - len(prompt)
    if room < 1:
        say(error=f"the conversation has {len(prompt)} tokens, more than the model's context holds; start a new one")
        return
    stops = stop_tokens_of(model, tokenizer)
    greedy = asked["temperature"] == 0
    sampling = {} if greedy else {"temperature": asked["temperature"], "top_p": asked["top_p"], "top_k": 0}
    ids = torch.tensor([prompt], device=model.device)
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(asked["max_tokens"], room),
        do_sample=not greedy,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    say(finish_reason="stop" if int(tokens[0, -1]) in stops else "length")


def main(path: str, precision: str, quantization: str) -> None:
    """Load the model, held as in an engine, then answer until standard input ends."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[best_precision(device) if precision == "auto" else precision]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, _ = load_weights(Path(path), dtype, device, quantization)
    say(ready=True)
    for line in sys.stdin:
        answer(model, tokenizer, json.loads(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
