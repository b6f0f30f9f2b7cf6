"""The one prompt format: how an instruction becomes a prompt, in training and in inference alike.

A model with a chat template of its own is spoken to in that; a base model in the `### Instruction:` format of
Alpaca and Lion. Training text is the prompt and the answer in one string, tokenised apart at one fixed seam, so
that the prompt that inference sends is by construction a prefix of what training showed. Only the template has special
tokens: one that a question or an answer names is text, else a page of HTML with `</s>` in it would end an answer.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]

DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
A_DAY = datetime(2025, 1, 1)
QUOTED = re.compile("\ufdd0(.*?)\ufdd1")  # a special token's name as a message says it, while a template is rendered

# Alpaca's roles for a base model without a chat template. Ours to word; the headings are the published ones.
BASE_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: token ids of prompt and answer, and where the answer begins."""

    input_ids: list[int]
    prompt_length: int  # labels are -100 before it
    cut: bool  # the answer did not fit into max_length


def ensure_chat_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the `### Instruction:` one, which begins as the tokenizer has texts begin.

    A template that tells the date tells one that stays: a prompt is the same tomorrow, and as it was in training.
    """
    if not tokenizer.chat_template:
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + BASE_TEMPLATE
    elif "strftime_now(" in tokenizer.chat_template:
        tokenizer.chat_template = DATE.sub(lambda told: repr(A_DAY.strftime(told[2])), tokenizer.chat_template)


def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """The text that a model continues with its answer."""
    ensure_chat_template(tokenizer)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the prompt. Inference sends these; `encode_example` begins with these."""
    names = _names_of_special_tokens(tokenizer)
    told = [{**message, "content": names.sub("\ufdd0\\g<0>\ufdd1", message["content"])} for message in messages]
    parts = QUOTED.split(render_prompt(tokenizer, told))  # every second one is a name
    return [token for i, part in enumerate(parts) for token in _encode(tokenizer, part, as_text=i % 2 == 1)]


def encode_example(tokenizer: Any, messages: Messages, answer: str, *, whole: bool, max_length: int) -> Example:
    """Token ids of prompt, answer and end of turn.

    An answer too long for `max_length` is cut before its end of turn, which stays in the loss. An answer that
    the teacher itself never ended (`whole=False`) gets no end of turn: nothing is known of where it ends.
    """
    prompt = encode_prompt(tokenizer, messages)
    tokens = _encode(tokenizer, answer, as_text=True)
    end = [token for token in [end_of_turn(tokenizer)] if whole and token is not None]
    room = max(max_length - len(prompt) - len(end), 0)
    return Example([*prompt, *tokens[:room], *end], len(prompt), cut=len(tokens) > room)


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that closes an answer in the chat template; eos, if there is one, where the template has none of its own."""
    ensure_chat_template(tokenizer)
    said = "The answer."  # no template and no special token has it
    closed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}], tokenize=False
    )
    tail = _encode(tokenizer, closed.rpartition(said)[2])
    special = set(special_tokens(tokenizer))
    return next((token for token in tail if token in special), tokenizer.eos_token_id)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Names of the special tokens by their ids."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))


@lru_cache(maxsize=1)
def _names_of_special_tokens(tokenizer: Any) -> re.Pattern[str]:
    names = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)  # the longer of two that begin alike
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _encode(tokenizer: Any, text: str, as_text: bool = False) -> list[int]:
    """Token ids; `as_text` also of the names of special tokens. A long text is no mistake."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)
    tokens: list[int] = encoded["input_ids"]
    return tokens


def end_with_turns(directory: Path) -> None:
    """Have the model's generation config name the chat template's end of turn, which is all that a server looks at."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    file = directory / "generation_config.json"
    if file.is_file():
        config = GenerationConfig.from_pretrained(directory)
    else:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(directory))
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = end_of_turn(AutoTokenizer.from_pretrained(directory))
    if end is not None and end not in named:
        config.eos_token_id = [token for token in (*named, end) if token is not None]
        file.unlink(missing_ok=True)  # it may be a link to the file of somebody else's model
        config.save_pretrained(directory)
