"""Is a candidate instruction new and usable? ROUGE-L against everything known so far, and checks of the text.

Lion (arXiv 2305.12870) drops a candidate whose ROUGE-L F to a known instruction is above 0.7. `NoveltyIndex`
decides that without comparing the candidate with every known text, and its decisions are those of the full
comparison. `check_text` names what is wrong with a text on its own.

Knows nothing of models, prompts, tables or Prefect.

    >>> index = NoveltyIndex()
    >>> index.add("seed-1", "Write a short poem about the first snow.")
    >>> index.nearest("Write a short poem about the last snow.")
    Near(key='seed-1', similarity=0.875)
    >>> index.nearest("Why is the sky blue?") is None
    True
    >>> check_text("The the the the the the the the")
    <Rejection.REPETITIVE: 'repetitive'>
"""

import re
import sys
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import LCSseq


class Rejection(StrEnum):
    """Why a candidate instruction was rejected. The first six are what can become of the generator's reply."""

    TRUNCATED = "truncated"  # cut at max_tokens: half an instruction
    FILTERED = "filtered"  # withheld by a content filter
    REFUSED = "refused"  # the generator declined
    FAILED = "failed"  # no reply
    EMPTY = "empty"  # nothing but white space
    MALFORMED = "malformed"  # JSON that broke off, or has no instruction
    TEMPLATE_LEAK = "template_leak"  # a phrase of our own prompts, or a special token
    NOT_AN_INSTRUCTION = "not_an_instruction"  # no words, or a remark about the task instead of a task
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    REPETITIVE = "repetitive"  # a loop, as small models fall into
    NEAR_DUPLICATE = "near_duplicate"  # ROUGE-L above the threshold: `NoveltyIndex` finds these
    SURPLUS = "surplus"  # good, but its side was full already


# Tokens and ROUGE-L

ROUGE_TOKEN = re.compile(r"[a-z0-9]+")

# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
SPACELESS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
TOKEN_OF_ANY_SCRIPT = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+")


def rouge_tokens(text: str) -> list[str]:
    """The tokens of the package rouge_score, without stemming: runs of a-z and 0-9 in the lower-cased text."""
    return ROUGE_TOKEN.findall(text.lower())


def tokens_of_any_script(text: str) -> list[str]:
    """The words of any script, or the characters where a script has no spaces."""
    return TOKEN_OF_ANY_SCRIPT.findall(unicodedata.normalize("NFKC", text).lower())


def tokenizer_for(text: str) -> Callable[[str], list[str]]:
    """What finds the tokens of a text, and of those that are compared with it: `rouge_tokens`, unless it misses most.

    In other scripts rouge_score sees nothing, or only the word "Python" amid a Chinese question; it would find
    any two such questions wholly different, or equal. So where at most half of the letters and digits are in
    a-z and 0-9, the tokens are `tokens_of_any_script`.
    """
    seen = text.isascii() or 2 * sum(map(len, rouge_tokens(text))) > sum(map(str.isalnum, text))
    return rouge_tokens if seen else tokens_of_any_script


def tokens_of(text: str) -> list[str]:
    """The tokens that the index compares."""
    return tokenizer_for(text)(text)


def lcs_f_measure(a: Sequence[str], b: Sequence[str]) -> float:
    """2 * LCS / (m + n) of two token lists of lengths m and n, from 0 to 1; 0 where one of them is empty."""
    if not a or not b:
        return 0.0
    ids: dict[str, int] = {}
    first, second = ([ids.setdefault(token, len(ids)) for token in tokens] for tokens in (a, b))
    return 2 * LCSseq.similarity(first, second) / (len(a) + len(b))


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L F (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries") of a text to a reference.

    For a reference in Latin letters (`tokenizer_for`) equal to `RougeScorer(["rougeL"], use_stemmer=False)` of the
    package rouge_score, up to that package's rounding: it goes by way of precision and recall, and can find
    0.7000000000000001 where seven tokens of ten are shared. The score here is the float nearest to the true one, so it
    is above 0.7 only if that is.
    """
    tokenize = tokenizer_for(reference)
    return lcs_f_measure(tokenize(reference), tokenize(text))


# Near duplicates

# Known texts are filed by length, so that a candidate meets only those it could resemble. Two buckets an octave:
# fewer let in more texts that are too long or too short, more cost more look-ups (measured with 1 to 4).
BUCKET_STARTS = tuple(sorted({int(2 ** (i / 2)) for i in range(25)}))  # 1, 2, 4, 5, 8, 11, ... 4096
BUCKET_BITS = 5
WORDS, WORD_BITS = 4, 64  # a signature has 256 bits, kept as four columns of 64
WORD_MASK = 2**WORD_BITS - 1
UNSEEN = 2**31 - 1  # stands for every token that no known text has

Rows = npt.NDArray[np.int32]


class Near(NamedTuple):
    """The known text most similar to a candidate: the key it was added under, and their ROUGE-L F."""

    key: str
    similarity: float


class NoveltyIndex:
    """All known instructions, asked which of them a text comes too close to. Grows as candidates are accepted.

    Three steps, each exact: what they leave out cannot be above the threshold.

    1. *Prefix filter* (Chaudhuri et al. 2006, Bayardo et al. 2007). A similarity above t needs a common
       subsequence, hence shared tokens, above t * (m + n) / 2. A text that shares so many of the candidate's m
       tokens has one of its `m - needed + 1` rarest, whichever these are; only their posting lists are read.
       Every token is listed, so the rarest are chosen by the lists' lengths at the time of asking.
    2. *Signatures.* A bit for each token, folded to 64 and then to 256 bits: a bit of the candidate that is
       missing from a text is a token they do not share, which bounds the similarity from above.
    3. The few that are left are compared in full, the highest bound first, until no bound beats the best found.

    A token's second occurrence in a text counts as a token of its own, so that shared tokens are counted with
    their multiplicity. Texts without any word or digit are never near anything. Not safe for threads.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        """Args: threshold: a similarity strictly above it is too close; the paper's is 0.7."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, but ROUGE-L lies between 0 and 1 (the paper's is 0.7)")
        self.threshold = threshold
        self._keys: list[str] = []  # row -> key; the columns below have a row for each text, too
        self._lengths = array("i")
        self._ends = array("q", [0])  # where a row's tokens end in _tokens, and the next row's begin
        self._tokens = array("i")  # the texts as token ids, one after the other
        self._folded = array("Q")  # signature folded to 64 bits
        self._words = [array("Q") for _ in range(WORDS)]  # signature of 256 bits
        self._ids: dict[str, int] = {}  # numbered token -> id
        self._postings: dict[int, array[int]] = {}  # id and length bucket -> rows that have the token

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, text: str) -> None:
        """Make a text known. `nearest` sees it at once."""
        row = len(self._keys)
        tokens = tokens_of(text)
        ids = [self._ids.setdefault(name, len(self._ids)) for name in _numbered(tokens)]
        bucket = bisect_right(BUCKET_STARTS, len(tokens))
        for id in ids:
            posting = self._postings.get(id << BUCKET_BITS | bucket)
            if posting is None:
                self._postings[id << BUCKET_BITS | bucket] = array("i", (row,))
            else:
                posting.append(row)
        self._keys.append(key)
        self._lengths.append(len(tokens))
        self._tokens.extend([self._ids[token] for token in tokens])
        self._ends.append(len(self._tokens))
        folded, words = _signature(ids)
        self._folded.append(folded)
        for column, word in zip(self._words, words, strict=True):
            column.append(word)

    def add_many(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Make many texts known: pairs of key and text."""
        for key, text in pairs:
            self.add(key, text)

    def nearest(self, text: str) -> Near | None:
        """The known text most similar to this one, the first added among equals; None if none is too close."""
        tokens = tokens_of(text)
        known = [id for name in _numbered(tokens) if (id := self._ids.get(name)) is not None]
        rows, needed = self._sharing_a_rare_token(known, len(tokens))
        if not len(rows):
            return None
        rows, bounds = self._possibly_near(rows, needed, known, len(tokens))

        query = array("i", [self._ids.get(token, UNSEEN) for token in tokens])
        best, highest = -1, self.threshold
        order = np.lexsort((rows, -bounds))
        for row, bound in zip(rows[order].tolist(), bounds[order].tolist(), strict=True):
            if bound < highest or (bound == highest and row > best):
                break
            other = self._tokens[self._ends[row] : self._ends[row + 1]]
            similarity = 2 * LCSseq.similarity(query, other) / (len(query) + len(other))
            if similarity > highest or (similarity == highest and row < best):
                best, highest = row, similarity
        return Near(self._keys[best], highest) if best >= 0 else None

    def _sharing_a_rare_token(self, known: list[int], m: int) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Step 1: rows, some more than once, and beside each how many shared tokens it needs at least."""
        postings: list[array[int]] = []
        needed: list[int] = []
        for bucket, least in _length_buckets(m, self.threshold):
            found = [p for id in known if (p := self._postings.get(id << BUCKET_BITS | bucket)) is not None]
            # Tokens that no text of this bucket has are the rarest of all, and there is nothing to read for them.
            count = (m - least + 1) - (m - len(found))
            if count <= 0:
                continue
            found.sort(key=len)
            postings += found[:count]
            needed += [least] * min(count, len(found))
        rows = np.frombuffer(b"".join(postings), dtype=np.int32)
        return rows, np.repeat(np.array(needed, dtype=np.int64), [len(posting) for posting in postings])

    def _possibly_near(
        self, rows: Rows, needed: npt.NDArray[np.int64], known: list[int], m: int
    ) -> tuple[Rows, npt.NDArray[np.float64]]:
        """Step 2: the rows whose signature allows a similarity above the threshold, and that upper bound."""
        folded, words = _signature(known)
        # Tokens that fell on one bit cannot be told apart: they count as shared.
        hidden = len(known) - folded.bit_count()
        rows = rows[_common_bits(self._folded, rows, folded) >= needed - hidden]

        shared = np.full(len(rows), len(known) - sum(word.bit_count() for word in words))
        for column, word in zip(self._words, words, strict=True):
            shared += _common_bits(column, rows, word)
        bounds = 2 * shared / (m + np.frombuffer(self._lengths, dtype=np.int32).take(rows))
        possible = bounds > self.threshold
        rows, first = np.unique(rows[possible], return_index=True)
        return rows, bounds[possible][first]


def _numbered(tokens: list[str]) -> list[str]:
    """Tokens with their second, third, ... occurrences told apart: the cat the -> the, cat, "the 2"."""
    counts: dict[str, int] = {}
    names = []
    for token in tokens:
        counts[token] = count = counts.get(token, 0) + 1
        names.append(token if count == 1 else f"{token} {count}")
    return names


def _signature(ids: list[int]) -> tuple[int, list[int]]:
    """A bit for each token, of 256; once folded to a single word and once as four."""
    bits = 0
    for id in ids:
        bits |= 1 << id % (WORDS * WORD_BITS)
    words = [bits >> WORD_BITS * i & WORD_MASK for i in range(WORDS)]
    return words[0] | words[1] | words[2] | words[3], words


def _common_bits(column: "array[int]", rows: Rows, word: int) -> npt.NDArray[np.uint8]:
    """How many bits the words of these rows have in common with `word`."""
    counts: npt.NDArray[np.uint8] = np.bitwise_count(
        np.frombuffer(column, dtype=np.uint64).take(rows) & np.uint64(word)
    )
    return counts


def _least_lcs(total: int, threshold: float) -> int:
    """The shortest common subsequence that makes 2 * LCS / total greater than the threshold, as floats go."""
    lcs = int(threshold * total / 2)
    while 2 * lcs / total > threshold:
        lcs -= 1
    while 2 * lcs / total <= threshold:
        lcs += 1
    return lcs


@lru_cache(maxsize=4096)
def _length_buckets(m: int, threshold: float) -> tuple[tuple[int, int], ...]:
    """Buckets with texts that m tokens can be near to, and how many shared tokens that takes at least.

    The need grows with the length, by one at most for each token: so it is least at the shortest length n that
    can satisfy it by itself, and no length is of use once the need is above m.
    """
    buckets = []
    for bucket, start in enumerate(BUCKET_STARTS, 1):
        end = BUCKET_STARTS[bucket] if bucket < len(BUCKET_STARTS) else sys.maxsize
        for n in range(start, end):
            least = _least_lcs(m + n, threshold)
            if least > m:
                break
            if least <= n:
                buckets.append((bucket, least))
                break
    return tuple(buckets)


# The text by itself

LEAKS = (  # lower case
    "#given instruction#",
    "#created instruction#",
    "#new instruction#",
    "#rewritten instruction#",
    "here is a list of questions and tasks",
    "here is a list of unusual questions and tasks",
    "you write tasks that show what a language model can and cannot do",
    "### instruction:",
    "### response:",
)
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>")

# Openings that only an answer to *our* prompt has. "Here is a list of numbers" opens many a good task, and so does
# "I can't ..."; when in doubt it is an instruction.
REMARK = re.compile(
    r"(?:sure|certainly|absolutely|of course)\b[!,.:]* here(?:'s| is| are)\b"
    r"|here(?:'s| is) (?:a|an|the|your|another|one) (?:new|created|rewritten|similar|revised)"
    r" (?:instruction|prompt|task|question)\b"
    r"|(?:the|this|your) (?:given|created|rewritten) instruction\b"
    r"|as an ai(?: language)?(?: model| assistant)?,? i\b"
    r"|i(?:'m| am) sorry,? (?:but )?i (?:can't|cannot|can not) (?:help|assist|comply|fulfil)"
)


# Tokens are those of `tokens_of`: words, mostly. "Explain photosynthesis." has two; long tasks are wanted, and a runaway
# is cut anyway.
FEWEST_TOKENS, MOST_TOKENS = 2, 1024


def check_text(text: str) -> Rejection | None:
    """What makes a candidate unusable by itself, or None. Near duplicates are `NoveltyIndex`'s business.

    Neither the word "instruction" nor a leading quote nor a letter outside a-z is a reason.

    Args:
        text: the candidate, as cut out of a whole reply; what became of other replies is the caller's to say.
    """
    if not text.strip():
        return Rejection.EMPTY
    if leaks(text):
        return Rejection.TEMPLATE_LEAK
    lowered = _lowered(text)
    tokens = tokens_of(text)
    if not any(map(str.isalpha, text)) or REMARK.match(lowered):
        return Rejection.NOT_AN_INSTRUCTION
    if len(tokens) < FEWEST_TOKENS:
        return Rejection.TOO_SHORT
    if len(tokens) > MOST_TOKENS:
        return Rejection.TOO_LONG
    return Rejection.REPETITIVE if is_repetitive(tokens) else None


def leaks(text: str) -> bool:
    """Whether a phrase of our own prompts or a special token, which a server would take for one in the next prompt, is in a text."""
    lowered = _lowered(text)
    return any(phrase in lowered for phrase in LEAKS) or SPECIAL_TOKEN.search(text) is not None


def _lowered(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


def is_repetitive(tokens: list[str]) -> bool:
    """Whether a text runs in a loop.

    Either at most a third of its runs of three words are different ones, or up to eight words come four times
    or more in a row, over twelve words at least. Numbers are left out: a table of zeros is data, not a loop.
    """
    words = [token for token in tokens if not token.isdigit()]
    threes = list(zip(words, words[1:], words[2:], strict=False))
    if len(threes) >= 4 and 3 * len(set(threes)) <= len(threes):
        return True
    for period in range(1, 9):
        equal = 0  # words in a row that repeat the one a period before
        for earlier, word in zip(words, words[period:], strict=False):
            equal = equal + 1 if word == earlier else 0
            if equal + period >= max(12, 4 * period):
                return True
    return False
