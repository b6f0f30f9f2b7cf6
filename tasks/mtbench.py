"""Answers and reviews as FastChat's MT-bench keeps them, for its tools and for whoever reads JSON lines.

`student.jsonl` and `reference.jsonl`, as `lion evaluate` calls them, go into `data/<bench>/model_answer/`, `reviews.jsonl`
into `data/<bench>/model_judgment/`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from storage.files import digest_of

WINNERS = {1: "model_1", 0: "tie", -1: "model_2"}


def question_lines(ids: list[str | int], conversations: list[list[str]], turns: Mapping[str, Any]) -> list[str]:
    """`question.jsonl`. Args: turns: rows of the table instructions, by instruction_id."""
    return [
        _line(question_id=id, category=turns[keys[0]]["category"], turns=[_asked(turns[key]) for key in keys])
        for id, keys in zip(ids, conversations, strict=True)
    ]


def answer_lines(
    model: str, ids: list[str | int], conversations: list[list[str]], responses: Mapping[str, Any]
) -> list[str]:
    """A model's answers. A turn without an answer is an empty text, and its status says why."""
    lines = []
    for id, keys in zip(ids, conversations, strict=True):
        said = [responses[key] for key in keys]
        choice = {
            "index": 0,
            "turns": [row["response"] or "" for row in said],
            "status": [str(row["status"]) for row in said],
        }
        lines.append(_line(question_id=id, answer_id=digest_of([model, id])[:22], model_id=model, choices=[choice]))
    return lines


def review_lines(
    student: str,
    reference: str,
    judge: str,
    ids: list[str | int],
    conversations: list[list[str]],
    reviews: Iterable[dict[str, Any]],
) -> list[str]:
    """Pairwise reviews: game 1 has the student first, game 2 the reference; a metric's one review is both games."""
    by_key: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in reviews:
        by_key.setdefault(row["instruction_id"], {}).setdefault(row["order"], []).append(row)
    lines = []
    for id, keys in zip(ids, conversations, strict=True):
        for turn, key in enumerate(keys, 1):
            games = by_key.get(key, {})
            record: dict[str, Any] = {
                "question_id": id,
                "model_1": student,
                "model_2": reference,
                "judge": [judge, "pair"],
            }
            for game, order in (("g1", "student_first"), ("g2", "teacher_first")):
                votes = games.get(order) or games.get("unordered") or []
                record[f"{game}_winner"] = _winner(votes)
                record[f"{game}_scores"] = [[row["student_score"], row["teacher_score"]] for row in votes]
                record[f"{game}_judgment"] = "\n\n".join(row["evidence"] or str(row["outcome"]) for row in votes)
            lines.append(_line(**record, turn=turn))
    return lines


def _asked(turn: Mapping[str, Any]) -> str:
    return f"{turn['instruction']}\n\n{turn['input']}" if turn["input"] else turn["instruction"]


def _winner(votes: list[dict[str, Any]]) -> str:
    """Who has the higher summed score; "error" where no vote is valid, as FastChat writes it."""
    gaps = [row["student_score"] - row["teacher_score"] for row in votes if row["student_score"] is not None]
    gap = round(sum(gaps), 9)  # of scores such as 8.1 a sum is off in its last digits
    return WINNERS[(gap > 0) - (gap < 0)] if gaps else "error"


def _line(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"
