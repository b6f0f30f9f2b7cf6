"""ROUGE-L against rouge_score, the index against the full comparison, and a test for each reason to reject."""

import random
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tasks.generate import PROMPTS
from tasks.models.chat import Status
from tasks.novelty import (
    Near,
    NoveltyIndex,
    Rejection,
    check_text,
    lcs_f_measure,
    rouge_l,
    rouge_tokens,
    tokenizer_for,
    tokens_of,
)

few_words = st.lists(
    st.sampled_from(["a", "b", "c", "d", "the", "The", "Cat", "cat,", "7", "naïve", "x_y"]), max_size=14
).map(" ".join)
any_text = few_words | st.text(max_size=40)


@cache
def scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)


def nearest_by_full_comparison(known: list[str], text: str, threshold: float) -> Near | None:
    """What the index must answer, the slow way."""
    scores = [lcs_f_measure(tokens_of(text), tokens_of(other)) for other in known]
    best = max(scores, default=0.0)
    return Near(str(scores.index(best)), best) if best > threshold else None


def index_of(*texts: str, threshold: float = 0.7) -> NoveltyIndex:
    index = NoveltyIndex(threshold)
    index.add_many((str(number), text) for number, text in enumerate(texts))
    return index


# ROUGE-L


@settings(max_examples=300, deadline=None)
@given(any_text, any_text)
def test_rouge_l_equals_rouge_score(a: str, b: str) -> None:
    assume(tokenizer_for(a) is rouge_tokens)
    assert rouge_l(a, b) == pytest.approx(scorer().score(a, b)["rougeL"].fmeasure, abs=1e-12)


def test_rouge_l_of_texts_without_latin_letters_is_that_of_their_words() -> None:
    assert rouge_l("Напиши стихотворение", "Напиши стихотворение") == 1.0
    assert rouge_l("Напиши стихотворение", "напиши ПИСЬМО") == 0.5
    assert rouge_l("写诗 ab", "ab") == 0.5, "where half of the letters are Latin, the others are words, too"


# The index


@settings(max_examples=200, deadline=None)
@given(st.lists(few_words, max_size=12), few_words, st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.9, 1.0]))
def test_index_decides_as_the_full_comparison_does(known: list[str], text: str, threshold: float) -> None:
    assert index_of(*known, threshold=threshold).nearest(text) == nearest_by_full_comparison(known, text, threshold)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("写 一首诗关于雪 для снега ab", max_size=20), max_size=8),
    st.text("写 一首诗 снега ab", max_size=20),
)
def test_index_decides_as_the_full_comparison_does_in_other_scripts(known: list[str], text: str) -> None:
    assert index_of(*known).nearest(text) == nearest_by_full_comparison(known, text, 0.7)


@pytest.mark.parametrize("length", [6, 15, 60, 400])
def test_index_decides_as_the_full_comparison_does_among_near_duplicates(length: int) -> None:
    rng = random.Random(length)
    words = [f"w{i}" for i in range(600)]
    known = [" ".join(rng.choices(words[: 40 + length], k=rng.randint(length // 2, length))) for _ in range(60)]
    candidates = []
    for text in known:
        # Changes around the threshold: a share of the words is replaced, dropped, doubled or moved.
        changed = text.split()
        for _ in range(rng.randint(0, len(changed) // 2)):
            at = rng.randrange(len(changed))
            changed[at : at + 1] = rng.choice([[], [rng.choice(words)], [changed[at]] * 2, ["unseen"]])
            changed = changed or ["unseen"]
        candidates.append(" ".join(changed))
    index = index_of(*known)
    expected = [nearest_by_full_comparison(known, text, 0.7) for text in candidates]
    assert [index.nearest(text) for text in candidates] == expected
    assert 0 < sum(near is not None for near in expected) < len(expected)  # both decisions occur


def test_similarity_at_the_threshold_is_kept() -> None:
    known, candidate = "a b c d e f g h i j", "a b c d e f g x y z"
    assert rouge_l(known, candidate) == 0.7
    assert index_of(known).nearest(candidate) is None


def test_similarity_just_above_the_threshold_is_found() -> None:
    known, candidate = "a b c d e f g h i j", "a b c d e f g h y z"
    assert index_of(known).nearest(candidate) == Near("0", 0.8)


@pytest.mark.parametrize("shared,length", [(7, 10), (14, 20), (21, 30), (35, 50), (70, 100)])
def test_threshold_holds_exactly_at_every_length(shared: int, length: int) -> None:
    known = [f"k{i}" for i in range(length)]
    at = known[:shared] + [f"c{i}" for i in range(length - shared)]
    above = known[: shared + 1] + at[shared + 1 :]
    index = index_of(" ".join(known))
    assert index.nearest(" ".join(at)) is None
    assert index.nearest(" ".join(above)) is not None


def test_word_order_counts() -> None:
    assert index_of("one two three four five").nearest("five four three two one") is None


def test_repeated_words_count_once_for_each_occurrence() -> None:
    assert index_of("go go go go stop").nearest("go stop now please thanks") is None
    assert index_of("go go go go stop").nearest("go go go go now") == Near("0", 0.8)


def test_first_added_wins_among_equals() -> None:
    index = index_of("a b c d e", "a b c d f", "a b c d g")
    assert index.nearest("a b c d h") == Near("0", 0.8)


def test_first_added_wins_even_if_a_later_equal_looked_more_promising() -> None:
    # The second has all words of the candidate, so that its bound is 1.0, but not their order.
    assert index_of("a b c d x", "b a c d e").nearest("a b c d e") == Near("0", 0.8)


def test_most_similar_wins_over_first_added() -> None:
    assert index_of("a b c d x", "a b c d e").nearest("a b c d e") == Near("1", 1.0)


def test_added_text_is_seen_at_once() -> None:
    index = NoveltyIndex()
    assert index.nearest("Name three rivers of Europe.") is None
    index.add("new", "Name three rivers of Europe.")
    assert index.nearest("Name three rivers of Europe!") == Near("new", 1.0)
    assert len(index) == 1


def test_index_grows_after_it_was_asked() -> None:
    known = [f"Write {word} about {other}" for word in "abcde" for other in "xyz"]
    index = NoveltyIndex()
    for number, text in enumerate(known):
        assert index.nearest(text) == nearest_by_full_comparison(known[:number], text, 0.7)
        index.add(str(number), text)


def test_empty_index_and_wordless_texts_are_near_to_nothing() -> None:
    assert NoveltyIndex().nearest("Anything at all") is None
    index = index_of("", "...", "a b c")
    assert index.nearest("") is None
    assert index.nearest("...") is None


def test_texts_longer_than_a_signature_are_compared_exactly() -> None:
    words = [f"w{i}" for i in range(3000)]
    index = index_of(" ".join(words))
    assert index.nearest(" ".join(words[:2500])) == Near("0", 2 * 2500 / 5500)
    assert index.nearest(" ".join(reversed(words))) is None


def test_duplicates_in_other_scripts_are_found() -> None:
    index = index_of("写一首关于初雪的短诗", "Напиши короткое стихотворение о первом снеге")
    assert index.nearest("写一首关于初雪的短诗。") == Near("0", 1.0)
    assert index.nearest("Напиши короткое стихотворение о последнем снеге") == Near("1", 10 / 12)


def test_different_texts_in_other_scripts_that_share_a_latin_word_are_kept() -> None:
    known, candidate = "用 Python 写一个排序函数", "请解释 Python 的垃圾回收机制"
    assert rouge_tokens(known) == rouge_tokens(candidate) == ["python"]  # all that rouge_score sees
    assert index_of(known).nearest(candidate) is None


def test_accented_latin_text_is_compared_as_rouge_score_does() -> None:
    assert tokens_of("Schreibe ein Gedicht über Käse") == rouge_tokens("Schreibe ein Gedicht über Käse")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold is"):
        NoveltyIndex(threshold)


# Reasons to reject


@pytest.mark.parametrize("status", [status for status in Status if status != Status.OK])
def test_every_failed_reply_has_its_reason(status: Status) -> None:
    assert Rejection(status.value).value == status.value


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text_is_rejected(text: str) -> None:
    assert check_text(text) is Rejection.EMPTY


@pytest.mark.parametrize(
    "text",
    [
        "#Given Instruction#: Name a river.",
        "#Created Instruction#:\nName a river.",
        *(prompt.text.split("\n")[0] for prompt in PROMPTS.values()),
        "Name a river.\n### Response: The Danube",
        "Name a river.<|im_end|>",
        "[INST] Name a river. [/INST]",
    ],
)
def test_template_leak_is_rejected(text: str) -> None:
    assert check_text(text) is Rejection.TEMPLATE_LEAK


@pytest.mark.parametrize("text", ["...", "12 + 7 = 19", "?!", "***"])
def test_text_without_words_is_rejected(text: str) -> None:
    assert check_text(text) is Rejection.NOT_AN_INSTRUCTION


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is a task about rivers: name three of them.",
        "Here is a new instruction in the same domain:",
        "The given instruction asks for a list of rivers.",
        "As an AI language model, I do not have opinions.",
        "I’m sorry, but I can’t help with that.",
    ],
)
def test_remark_about_the_task_is_rejected(text: str) -> None:
    assert check_text(text) is Rejection.NOT_AN_INSTRUCTION


def test_single_word_is_too_short() -> None:
    assert check_text("Rivers") is Rejection.TOO_SHORT


def test_runaway_text_is_too_long() -> None:
    words = [f"word{i}" for i in range(1025)]
    assert check_text(" ".join(words)) is Rejection.TOO_LONG
    assert check_text(" ".join(words[:1024])) is None


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the the the",
        "What is the best way to cook rice? " * 5,
        "Tell me about the history of the old harbour and its ships and so on and so on and so on and so on and so on",
    ],
)
def test_loop_is_rejected(text: str) -> None:
    assert check_text(text) is Rejection.REPETITIVE


# What must not be rejected


@pytest.mark.parametrize("text", ["Write an instruction for assembling a chair.", "The instruction is unclear. Why?"])
def test_the_word_instruction_is_no_reason(text: str) -> None:
    assert check_text(text) is None


@pytest.mark.parametrize(
    "text", ['"To be or not to be": who says it?', "“Carpe diem” — explain it.", "'Tis the season: why?"]
)
def test_leading_quote_is_no_reason(text: str) -> None:
    assert check_text(text) is None


@pytest.mark.parametrize(
    "text", ["Explique la photosynthèse à un élève.", "解释光合作用", "Объясни фотосинтез.", "प्रकाश संश्लेषण समझाइए"]
)
def test_letters_outside_ascii_are_no_reason(text: str) -> None:
    assert check_text(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Explain photosynthesis.",
        "Here is a list of numbers: 4, 8, 15. Sort it.",
        "Here is an instruction from a recipe: fold in the egg whites. What does it mean?",
        "I can't log in to my account. What should I do?",
        "I'm sorry I forgot your birthday: make this sound warmer.",
        "As an AI language model, how do you store what you have read?",
        "Sure, but why? Discuss this reply to an offer.",
        "What does the HTML tag <s> do, and what does a < b > c mean?",
        "Translate: row, row, row your boat, gently down the stream",
        "Explain the sentence: Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo.",
        "Count the ones in 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 0 0.",
        "What is the capital of Peru? What is the capital of Chad? What is the capital of Laos? What is the capital of Mali?",
        "def f(x):\n    return x * x\n\nWhat does this function do?",
    ],
)
def test_unusual_but_good_task_is_kept(text: str) -> None:
    assert check_text(text) is None
