"""Is a candidate instruction new? ROUGE-L against everything known so far, and checks of the text itself.

A candidate is dropped where its ROUGE-L F to a known instruction is above 0.7 (Lion, arXiv 2305.12870).
`NoveltyIndex` answers that without comparing the candidate with every known text, and exactly so: its
decisions are those of the full comparison. `check_text` names what is wrong with a text on its own.

Knows nothing of models, prompts, tables or Prefect.

    >>> index = NoveltyIndex()
    >>> index.add("seed-1", "Write a short poem about the first snow.")
    >>> index.nearest("Write a short poem about the last snow.")
    Near(key='seed-1', similarity=0.875)
    >>> index.nearest("Why is the sky blue?") is None
    True
    >>> check_text("Sure! Here is a new instruction:")
    <Rejection.NOT_AN_INSTRUCTION: 'not_an_instruction'>
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq


class Rejection(StrEnum):
    """Why a candidate instruction was rejected. The first six are what can become of the generator's reply."""

    TRUNCATED = "truncated"  # cut at max_tokens: half an instruction
    FILTERED = "filtered"  # withheld by a content filter
    REFUSED = "refused"  # the generator declined
    EMPTY = "empty"  # nothing but white space
    FAILED = "failed"  # no reply at all
    TEMPLATE_LEAK = "template_leak"  # holds a phrase of our own prompt, or a special token
    NOT_AN_INSTRUCTION = "not_an_instruction"  # no words, or a remark about the task instead of a task
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    REPETITIVE = "repetitive"  # a loop, as small models fall into
    NEAR_DUPLICATE = "near_duplicate"  # ROUGE-L above the threshold; `NoveltyIndex` finds these
    SURPLUS = "surplus"  # good, but its side was full already


# --- tokens and ROUGE-L ---------------------------------------------------------------------------------------

ROUGE_TOKEN = re.compile(r"[a-z0-9]+")

# Scripts written without spaces, where a character is the better token: Thai, Lao, Myanmar, Khmer, kana, Han.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
ANY_TOKEN = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+")


def rouge_tokens(text: str) -> list[str]:
    """The tokens of `rouge_score` without stemming: runs of a-z and 0-9 in the lower-cased text."""
    return ROUGE_TOKEN.findall(text.lower())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F (Lin 2004) of two texts: 2 * LCS / (m + n) over their m and n tokens, from 0 to 1.

    Equal to `RougeScorer(["rougeL"], use_stemmer=False)` of the package rouge_score up to the rounding of that
    package's detour over precision and recall. A text without a-z and 0-9 has no tokens, so its score is 0.
    """
    return _f_measure(rouge_tokens(a), rouge_tokens(b))


def tokens_of(text: str) -> list[str]:
    """The tokens that the index compares: those of `rouge_score`, unless they miss most of the text.

    In other scripts rouge_score sees nothing, or only the word "Python" in the middle of a Chinese question, and
    would call any two such questions different, or equal. Where most letters are outside a-z the tokens are
    words in any script instead, or single characters in the scripts that put no spaces between words.
    """
    tokens = rouge_tokens(text)
    if text.isascii() or 2 * sum(map(len, tokens)) > sum(map(str.isalnum, text)):
        return tokens
    return ANY_TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def _f_measure(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return 0.0
    ids: dict[str, int] = {}
    first, second = ([ids.setdefault(token, len(ids)) for token in tokens] for tokens in (a, b))
    return 2 * LCSseq.similarity(first, second) / (len(a) + len(b))


# --- near duplicates ------------------------------------------------------------------------------------------


class Near(NamedTuple):
    """The most similar known text: the key it was added under, and its ROUGE-L F."""

    key: str
    similarity: float


class NoveltyIndex:
    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; ROUGE-L runs from 0 to 1 (the paper's is 0.7)")
        self.threshold = threshold
        self._keys: list[str] = []
        self._ids: dict[str, int] = {}
        self._tokens = array("i")
        self._ends = array("q", [0])
        self._folded = array("Q")
        self._words = [array("Q") for _ in range(4)]
        self._lengths = array("i")
        self._postings: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, text: str) -> None:
        row = len(self._keys)
        tokens = tokens_of(text)
        ids = self._ids
        elements = [ids.setdefault(name, len(ids)) for name in _numbered(tokens)]
        bucket = bisect_right(STARTS, len(tokens))
        postings = self._postings
        for element in elements:
            k = element << 6 | bucket
            if k in postings:
                postings[k].append(row)
            else:
                postings[k] = array("i", (row,))
        folded, words = _signature(elements)
        self._folded.append(folded)
        for w, x in zip(self._words, words):
            w.append(x)
        self._lengths.append(len(tokens))
        self._tokens.extend([ids[t] for t in tokens])
        self._ends.append(len(self._tokens))
        self._keys.append(key)

    def add_many(self, pairs):
        for k, t in pairs:
            self.add(k, t)

    def nearest(self, text):
        tokens = tokens_of(text)
        m = len(tokens)
        ids, postings = self._ids, self._postings
        elements = [ids.get(name, -1) for name in _numbered(tokens)]
        known = [e for e in elements if e >= 0]
        unseen = m - len(known)
        lists = []; required = []
        least = m
        for b, count, need in _probes(m, self.threshold):
            found = [p for e in known if (p := postings.get(e << 6 | b)) is not None]
            count -= m - len(found)
            if count > 0:
                if count < len(found):
                    found.sort(key=len)
                    del found[count:]
                lists += found
                if PER: required += [need]*len(found)
                if need < least: least = need
        if not lists: return None
        rows = np.frombuffer(lists[0] if len(lists)==1 else b"".join(lists), dtype=np.int32)
        self.n_entries = getattr(self,'n_entries',0) + len(rows)
        folded, words = _signature(known)
        slack = len(known) - folded.bit_count()
        shared = np.bitwise_count(np.frombuffer(self._folded, dtype=np.uint64).take(rows) & np.uint64(folded))
        if PER: least = np.repeat(np.array(required), [len(l) for l in lists])
        rows = rows[shared >= (least - slack)]
        self.n_sieve = getattr(self,'n_sieve',0) + len(rows)
        if not len(rows): return None
        overlap = sum(np.bitwise_count(np.frombuffer(w, dtype=np.uint64).take(rows) & np.uint64(x)) for w, x in zip(self._words, words)) + (len(known) - sum(w.bit_count() for w in words))
        bounds = 2 * overlap / (m + np.frombuffer(self._lengths, dtype=np.int32).take(rows))
        keep = bounds > self.threshold
        rows, first = np.unique(rows[keep], return_index=True)
        bounds = bounds[keep][first]
        self.n_lcs = getattr(self,'n_lcs',0) + len(rows)
        order = np.lexsort((rows, -bounds))
        best = -1
        bs = self.threshold
        query = array("i", [ids.get(t, 2**31-1) for t in tokens])
        st = self._ends
        for row, bound in zip(rows[order].tolist(), bounds[order].tolist()):
            if bound < bs or (bound == bs and row > best):
                break
            self.n_lcs2 = getattr(self,'n_lcs2',0) + 1
            a, z = st[row], st[row+1]
            s = 2 * LCSseq.similarity(query, self._tokens[a:z]) / (m + z - a)
            if s > bs or (s == bs and row < best):
                best, bs = row, s
        return None if best < 0 else Near(self._keys[best], bs)

    def nearest_many(self, texts):
        return [self.nearest(t) for t in texts]

def _signature(elements):
    s = 0
    for e in elements:
        s |= 1 << (e & 255)
    M = (1<<64)-1
    w = (s & M, s >> 64 & M, s >> 128 & M, s >> 192)
    return w[0]|w[1]|w[2]|w[3], w

from bisect import bisect_right
from functools import lru_cache
from os import environ
PER = environ.get('PER')=='1'
Q = int(environ.get("Q", "4"))
STARTS = sorted({max(1, int(2 ** (i / Q))) for i in range(Q*12+1)})
assert len(STARTS) < 63

def _lcs_above(total, threshold):
        lcs = int(threshold * total / 2)
        while 2 * lcs / total > threshold:
            lcs -= 1
        while 2 * lcs / total <= threshold:
            lcs += 1
        return lcs

@lru_cache(4096)
def _probes(m, threshold):
    out = []
    for b, lo in enumerate(STARTS, 1):
        for n in range(lo, STARTS[b] if b < len(STARTS) else lo + 2**20):
            need = _lcs_above(m + n, threshold)
            if need <= min(m, n):
                out.append((b, m - need + 1, need))
                break
            if need > m:
                break
    return tuple(out)
def _numbered(tokens):
    seen = {}
    out = []
    for t in tokens:
        if t in seen:
            seen[t] += 1
            out.append(f"{t} {seen[t]}")
        else:
            seen[t] = 1
            out.append(t)
    return out
