"""A finished run of one iteration with known rows, written straight into the home: nothing is trained or asked."""

from pathlib import Path
from typing import Any

from flows.config import resolve
from storage.files import Checkpoint, Snapshot
from storage.pools import instruction_id, write_snapshot
from storage.runs import Baseline, Evaluation, Generated, IterationRecord, Manifest
from tasks.selection import compare

SEEDS = ["Why is the sky blue?", "Name three prime numbers.", "Write a haiku about snow."]
HELDOUT = ["What is a volcano?", "Add 2 and 3."]
IDS = [instruction_id(text, None) for text in SEEDS]
HELDOUT_IDS = [instruction_id(text, None) for text in HELDOUT]


def snapshot(table: str, rows: list[dict[str, Any]], step: str, *inputs: Snapshot) -> Snapshot:
    return write_snapshot(table, rows, step=step, version=1, inputs=list(inputs))


def instructions(texts: list[str], origin: str) -> list[dict[str, Any]]:
    return [
        {"instruction_id": instruction_id(text, None), "instruction": text, "category": "science", "origin": origin}
        for text in texts
    ]


def responses(texts: list[str | None], role: str, ids: list[str] | None = None) -> list[dict[str, Any]]:
    model = {"teacher": "t", "student": "s"}[role]
    return [
        {"instruction_id": key, "role": role, "model": model, "status": "failed" if text is None else "ok"}
        | {"response": text, "prompt_tokens": 5, "completion_tokens": 5}
        for key, text in zip(ids or IDS, texts, strict=True)
    ]


def reviews(*scores: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Rows of (instruction, order, teacher's score, student's score)."""
    return [
        {"instruction_id": key, "order": order, "vote": 0, "outcome": "ok" if teacher else "unparsable"}
        | {"teacher_score": teacher, "student_score": student}
        for key, order, teacher, student in scores
    ]


def evaluation(*rows: tuple[str, float, float]) -> Evaluation:
    """Of the held-out instructions: answer, loss over ten tokens, score."""
    details = [
        {"instruction_id": instruction_id(text, None), "response": said, "status": "ok"}
        | {"loss_sum": loss, "tokens": 10, "score": score}
        for text, (said, loss, score) in zip(HELDOUT, rows, strict=True)
    ]
    loss, score = sum(row[1] for row in rows) / (10 * len(rows)), sum(row[2] for row in rows) / len(rows)
    made = snapshot("evaluations", details, "evaluate")
    return Evaluation(loss=loss, score=score, rows=len(rows), scored=len(rows), details=made)


def checkpoint(name: str, source: Path | None = None) -> Checkpoint:
    """A checkpoint of this home: that of `source`, or files that only look like one."""
    made = Checkpoint(digest=name, content="")
    if source:
        made.path.parent.mkdir(parents=True, exist_ok=True)
        made.path.symlink_to(source)
    else:
        made.path.mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "job.json", "log.txt"):
            (made.path / file).write_text("{}")
    return made


def record_run(run_id: str = "recorded-1", model: Path | None = None, *settings: str) -> Manifest:
    """The run, saved. Of its three rows the first two are answered; both reviews of the first agree."""
    pool = snapshot("instructions", instructions(SEEDS, "seed"), "seed")
    heldout = snapshot("instructions", instructions(HELDOUT, "heldout"), "seed")
    teacher = snapshot(
        "responses", responses(["Rayleigh scattering.", "2, 3 and 5.", None], "teacher"), "teacher", pool
    )
    student = snapshot("responses", responses(["It is blue.", "4, 6, 8.", "Snow."], "student"), "student", pool)
    judged = snapshot(
        "reviews",
        reviews(
            (IDS[0], "teacher_first", 9.0, 4.0), (IDS[0], "student_first", 8.0, 5.0),
            (IDS[1], "teacher_first", 7.0, 6.0), (IDS[1], "student_first", 5.0, 6.0),
            (IDS[2], "teacher_first", None, None), (IDS[2], "student_first", 8.0, 1.0),
        ),
        "referee", pool, teacher, student,
    )  # fmt: skip
    verdicts = snapshot(
        "verdicts",
        [
            {"instruction_id": IDS[0], "teacher_score": 8.5, "student_score": 4.5, "score_gap": 4.0}
            | {"threshold": 1.0, "difficulty": "hard"},
            {"instruction_id": IDS[1], "teacher_score": 6.0, "student_score": 6.0, "score_gap": 0.0}
            | {"threshold": 1.0, "difficulty": "easy"},
            {"instruction_id": IDS[2], "threshold": 1.0, "difficulty": "undecided", "reason": "missing_review"},
        ],
        "discriminate", judged,
    )  # fmt: skip
    candidates = snapshot(
        "candidates",
        [
            {"parent_id": IDS[0], "side": "hard", "draw": 0, "instruction": "What is a big volcano?"}
            | {"rejection": "near_duplicate", "near_id": HELDOUT_IDS[0], "similarity": 0.8}
        ],
        "generate", pool, verdicts,
    )  # fmt: skip
    taught = [
        {"instruction_id": key, "messages": [{"role": "user", "content": asked}], "response": said, "whole": True}
        for key, asked, said in zip(IDS[:2], SEEDS, ("Rayleigh scattering.", "2, 3 and 5."))
    ]
    examples = snapshot("examples", taught, "finetune", pool, teacher)
    before, after = evaluation(("hm", 30.0, 1.0), ("hm", 30.0, 2.0)), evaluation(("Lava.", 20.0, 6.0), ("5", 10.0, 3.0))
    start, trained = checkpoint(f"{run_id}-start", model), checkpoint(f"{run_id}-trained", model)
    said = snapshot("responses", responses(["A mountain.", "5"], "teacher", HELDOUT_IDS), "teacher", heldout)
    manifest = Manifest(
        run_id=run_id,
        state="completed",
        config=resolve("smoke", ["teacher.license=apache-2.0", "teacher.system_prompt=null", *settings]).model_dump(
            mode="json"
        ),
        seeds={"path": "bundled", "rows": 3, "duplicates": 0, "near_heldout": 1},
        baseline=Baseline(
            evaluation=before, student=start, snapshots={"seeds": pool, "heldout": heldout, "heldout_answers": said}
        ),
        iterations=[
            IterationRecord(
                iteration=1, train_rows=3, cache_rows=3, trained_rows=2, left_out={"failed": 1}, hard=1, easy=1,
                undecided=1, threshold=1.0, generated=Generated(rejected={"near_duplicate": 1}, wanted=2),
                evaluation=after, comparison=compare(after, before, 0, 0), student=trained,
                training={"loss_by_step": [[1, 3.0], [2, 2.0]]},
                snapshots={
                    "train_pool": pool, "cache_pool": pool, "teacher_responses": teacher, "student_responses": student,
                    "reviews": judged, "verdicts": verdicts, "candidates": candidates, "examples": examples,
                },
            )
        ],
    )  # fmt: skip
    manifest.save()
    return manifest
