"""The reference score: how close a response is to the teacher's words, on the referee's scale."""

from tasks.models.reviews import BEST_SCORE, WORST_SCORE
from tasks.novelty import rouge_l


def reference_score(response: str, reference: str) -> float:
    """1 + 9 x ROUGE-L F of a response to the reference: 10 for the same words, 1 for none in common.

    The same text is a 10 also where ROUGE sees no words in it, as in one of symbols alone.
    """
    if response.strip() == reference.strip():
        return BEST_SCORE
    return WORST_SCORE + (BEST_SCORE - WORST_SCORE) * rouge_l(reference, response)
