"""Which instructions come too near to those of an evaluation. Nothing near one may be learned from."""

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.novelty import Near, NoveltyIndex

MAX_SIMILARITY = 0.7  # ROUGE-L F, as for candidates (the paper's)


class Evaluated:
    """The instructions of an evaluation. A near duplicate of the instruction alone is one of instruction and input, too."""

    def __init__(self, rows: Iterable[tuple[str, Mapping[str, Any]]], max_similarity: float = MAX_SIMILARITY):
        """Args: rows: pairs of a key and a row."""
        self._index = NoveltyIndex(max_similarity)
        for key, row in rows:
            for text in _texts(row):
                self._index.add(key, text)

    def nearest(self, row: Mapping[str, Any]) -> Near | None:
        """The instruction that a row is nearest to; None if it is near none."""
        near = [near for text in _texts(row) if (near := self._index.nearest(text))]
        return max(near, key=lambda one: one.similarity, default=None)


def find_near(
    rows: Iterable[Mapping[str, Any]], evaluation: Iterable[Mapping[str, Any]], max_similarity: float = MAX_SIMILARITY
) -> list[tuple[Mapping[str, Any], Near]]:
    """The rows that are near an evaluation instruction, and which; its key is its place in `evaluation`, from 0."""
    evaluated = Evaluated(((str(number), row) for number, row in enumerate(evaluation)), max_similarity)
    return [(row, near) for row in rows if (near := evaluated.nearest(row))]


def whole_text(row: Mapping[str, Any]) -> str:
    """Instruction and input as one text."""
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def _texts(row: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([row["instruction"], whole_text(row)]))
