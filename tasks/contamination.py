"""Which instructions come too near to those of an evaluation. Nothing near one may be learned from."""

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.novelty import Near, NoveltyIndex

MAX_SIMILARITY = 0.7  # ROUGE-L F, as for candidates (the paper's)


def find_near(
    rows: Iterable[Mapping[str, Any]], evaluation: Iterable[Mapping[str, Any]], max_similarity: float = MAX_SIMILARITY
) -> list[tuple[Mapping[str, Any], Near]]:
    """The rows that are near an evaluation instruction, and which; its key is its place in `evaluation`, from 0.

    A near duplicate of the instruction alone counts as one of instruction and input, too.
    """
    index = NoveltyIndex(max_similarity)
    for number, row in enumerate(evaluation):
        for text in {row["instruction"], _whole(row)}:
            index.add(str(number), text)
    found = []
    for row in rows:
        near = [near for text in {row["instruction"], _whole(row)} if (near := index.nearest(text))]
        if near:
            found.append((row, max(near, key=lambda one: one.similarity)))
    return found


def _whole(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
