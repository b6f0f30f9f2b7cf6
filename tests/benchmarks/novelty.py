"""What it costs to tell whether a candidate is new, at 52,000 and at 1,000,000 known instructions.

    python -m tests.benchmarks.novelty

**The instructions are synthetic**: no collection of a million comes with this project. Each begins with the first
three words of a bundled seed (some openings far more often than others) and goes on with words drawn one by one.
The vocabulary is that of the seeds, most frequent first, so that its head is real function words, continued with
made-up words to 200,000; frequencies follow Zipf's law for 5,000 ranks and fall faster after that, as in English
text. A fifth of the words come from one of 2,000 topics. Lengths are log-normal, 5 to 200 words, 13.5 on average.
What this lacks is grammar: real instructions share phrases within a sentence, not only at its start. Tried once by
hand on seeds with 60 or 40 % of their words replaced: 134 and 143 us at 52,000, and 1.7 and 2.7 times that at a
million. Decisions are checked against the alternatives in the same run.

Of the 1,000 candidates a quarter are known instructions with one word changed; the rest are drawn like the known
ones, and some of them come too close by themselves, the short ones by their opening alone.

All run on one core, and processor time is what is measured. The alternatives get the known texts already split
into tokens:

- *pure-Python LCS*: rouge_score's `_score_lcs` against every known text, one candidate at a time, which is what
  the original hands to its process pool. Timed on three candidates.
- *rapidfuzz cdist*: a batch of candidates against every known text, with a cutoff at the threshold.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from rouge_score import rouge_scorer

from tasks.novelty import NoveltyIndex, rouge_tokens
from tests.benchmarks.run import figure

SMALL, LARGE = 52_000, 1_000_000
CANDIDATES = 1_000
BATCH = 50  # of the candidates, for cdist
VOCABULARY = 200_000
THRESHOLD = 0.7
SEEDS = Path(__file__).parents[2] / "tasks" / "data" / "seeds.jsonl"


def make_instructions(count: int, rng: np.random.Generator) -> list[str]:
    """Synthetic instructions, as the module's docstring describes them."""
    with SEEDS.open(encoding="utf-8") as file:
        seeds = [rouge_tokens(json.loads(line)["instruction"]) for line in file]
    vocabulary = [word for word, _ in Counter(word for seed in seeds for word in seed).most_common()]
    vocabulary += [f"w{rank}" for rank in range(len(vocabulary), VOCABULARY)]
    openings = [" ".join(seed[:3]) for seed in seeds]

    ranks = np.arange(VOCABULARY) + 2.7
    chances = np.cumsum(np.where(ranks < 5000, 1 / ranks, 5000**0.8 / ranks**1.8))
    chances /= chances[-1]
    topics = np.searchsorted(chances, rng.uniform(chances[100], 1, (2000, 60)))
    opening_chances = np.cumsum(1 / (np.arange(len(openings)) + 1))
    opening = np.searchsorted(opening_chances / opening_chances[-1], rng.random(count))

    lengths = np.clip(rng.lognormal(np.log(12), 0.55, count), 5, 200).astype(int) - 3
    words = np.searchsorted(chances, rng.random(lengths.sum()))
    topical = rng.random(len(words)) < 0.2
    topic = np.repeat(rng.integers(len(topics), size=count), lengths)[topical]
    words[topical] = topics[topic, (60 * rng.random(len(topic)) ** 2).astype(int)]
    ends = np.cumsum(lengths)
    return [
        " ".join([openings[first], *(vocabulary[word] for word in words[end - length : end])])
        for first, length, end in zip(opening, lengths, ends, strict=True)
    ]


def make_candidates(known: list[str], rng: np.random.Generator) -> list[str]:
    """Fresh instructions, every fourth of them replaced by a known one with a word changed."""
    candidates = make_instructions(CANDIDATES, rng)
    for i in range(0, CANDIDATES, 4):
        words = known[rng.integers(SMALL)].split()
        words[rng.integers(len(words))] = "changed"
        candidates[i] = " ".join(words)
    return candidates


def seconds(*functions: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Processor time of each function: the least of some rounds, in which they take turns.

    Not the time on the clock, and in turns, so that a machine busy for a while does not favour one of them.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    return [min(times) for times in taken]


def too_close_by_lcs_loop(candidate: list[str], known: list[list[str]]) -> bool:
    """The original's way. The margin takes out the rounding of rouge_score at the very threshold."""
    best = max(rouge_scorer._score_lcs(tokens, candidate).fmeasure for tokens in known)
    return bool(best > THRESHOLD + 1e-9)


def too_close_by_cdist(candidates: list[str], known: list[str]) -> list[bool]:
    """Over texts with a character for each token, the form that rapidfuzz is fastest with."""
    scores = cdist(
        candidates, known, scorer=Indel.normalized_similarity, score_cutoff=THRESHOLD, dtype=np.float64, workers=1
    )
    return [bool(row.max() > THRESHOLD + 1e-9) for row in scores]


def run() -> list[dict[str, Any]]:
    """Measure, check that all decide alike, and return the figures."""
    rng = np.random.default_rng(0)
    known = make_instructions(LARGE, rng)
    candidates = make_candidates(known, rng)
    ids: dict[str, int] = {}
    as_characters = [
        "".join(chr(ids.setdefault(token, len(ids))) for token in text.split()) for text in known + candidates
    ]

    small, large = NoveltyIndex(THRESHOLD), NoveltyIndex(THRESHOLD)
    small.add_many((str(row), known[row]) for row in range(SMALL))
    large.add_many((str(row), known[row]) for row in range(LARGE))
    batch, pool = as_characters[LARGE : LARGE + BATCH], as_characters[:LARGE]
    pool_small = pool[:SMALL]
    tokens = [rouge_tokens(text) for text in known[:SMALL]]
    few = [rouge_tokens(text) for text in candidates[:3]]

    close = [near is not None for near in map(small.nearest, candidates)]
    close_in_large = [near is not None for near in map(large.nearest, candidates)]
    checks = {
        "rapidfuzz cdist at 52,000": (too_close_by_cdist(batch, pool_small), close[:BATCH]),
        "rapidfuzz cdist at 1,000,000": (too_close_by_cdist(batch, pool), close_in_large[:BATCH]),
        "the pure-Python LCS loop": ([too_close_by_lcs_loop(one, tokens) for one in few], close[: len(few)]),
    }
    for other, (theirs, decisions) in checks.items():
        if theirs != decisions:
            raise AssertionError(f"the index and {other} decide differently")

    our_times = seconds(lambda: [*map(small.nearest, candidates)], lambda: [*map(large.nearest, candidates)])
    ours = {size: taken / CANDIDATES for size, taken in zip((SMALL, LARGE), our_times, strict=True)}
    cdist_times = seconds(
        lambda: too_close_by_cdist(batch, pool_small), lambda: too_close_by_cdist(batch, pool), rounds=3
    )
    by_cdist = {size: taken / BATCH for size, taken in zip((SMALL, LARGE), cdist_times, strict=True)}
    loop = seconds(lambda: [too_close_by_lcs_loop(one, tokens) for one in few], rounds=1)[0] / len(few)

    growth = ours[LARGE] / ours[SMALL]
    cdist_growth = by_cdist[LARGE] / by_cdist[SMALL]
    per = "us per candidate"
    return [
        figure("novelty-52k", ours[SMALL] * 1e6, per, f"pure-Python LCS loop ({loop:.2f} s)", loop / ours[SMALL]),
        figure(
            "novelty-52k-cdist",
            ours[SMALL] * 1e6,
            per,
            f"rapidfuzz cdist ({by_cdist[SMALL] * 1e6:.0f} us)",
            by_cdist[SMALL] / ours[SMALL],
        ),
        figure(
            "novelty-1m-cdist",
            ours[LARGE] * 1e6,
            per,
            f"rapidfuzz cdist ({by_cdist[LARGE] * 1e6:.0f} us)",
            by_cdist[LARGE] / ours[LARGE],
        ),
        figure(
            "novelty-1m-cost",
            growth,
            "times the cost at 52k",
            f"rapidfuzz cdist ({cdist_growth:.1f} times)",
            cdist_growth / growth,
        ),
    ]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
