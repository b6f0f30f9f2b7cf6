"""A tiny randomly initialised Llama with a tokenizer and a chat template of its own, for tests.

It speaks nonsense, but it is a real checkpoint: everything that loads, trains, answers or saves a model can
be tried on it in milliseconds.

    >>> make_tiny_model(tmp_path / "model")  # doctest: +SKIP
"""

from pathlib import Path

from tasks.models.chat import Request

# Words enough for about a thousand merges; what they say does not matter.
TOPICS = [
    "the history of bridges",
    "the water cycle",
    "sorting a list in Python",
    "photosynthesis in green plants",
    "healthy breakfast ideas",
    "the capital of Australia",
    "prime numbers",
    "writing a polite letter",
    "black holes",
    "the rules of chess",
    "learning to swim",
    "electric vehicles",
    "renewable energy",
    "the human heart",
    "compound interest",
    "baking sourdough bread",
    "growing tomatoes on a balcony",
    "planning a journey through Scandinavia",
    "the difference between weather and climate",
    "negotiating a salary",
    "musical scales",
    "volcanoes",
    "a database index",
    "public libraries",
    "recycling plastic bottles",
    "ancient Roman architecture",
    "jealousy in drama",
]
QUESTIONS = (
    "Explain {} to a child of ten years.",
    "Write a short poem about {}, with exactly four lines!",
    "List three surprising facts regarding {}: which one matters most?",
    "Translate the following sentence about {} into French and German.",
    "Compare {} with something from everyday life; give an example.",
    "Summarise what is known of {} in 25 words.\n- first point\n- second point",
    "1. {}\n2. Why do people disagree about {}?\n3. How would you measure it (0, 10, 100)?",
    "Is it true that {} changed between 1950 and 2024? Answer yes or no, then justify yourself.",
)
TEXTS = [question.replace("{}", topic) for question in QUESTIONS for topic in TOPICS]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def requests(count: int) -> list[Request]:
    """So many different instructions."""
    said = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(count)]
    return [Request(id=str(number), messages=({"role": "user", "content": text},)) for number, text in enumerate(said)]


def make_tiny_model(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    """Save a Llama of `layers` layers, about 1,000 tokens of vocabulary and a context of 512 into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide, so that the next token depends on the text and greedy answers differ
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
