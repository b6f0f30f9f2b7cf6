"""A run's pools and training set in the forms that other programs read, each row with its lineage and licence.

lion export --format messages --to train.jsonl
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from storage.catalog import ask
from storage.files import home, write_atomic, write_json_lines, write_json_list
from storage.pools import by_id, write_parquet
from storage.runs import Manifest
from tasks.models.chat import conversation

Form = Literal["alpaca", "sharegpt", "messages", "dpo", "parquet", "hf"]
What = Literal["training", "train_pool", "cache_pool"]
LINEAGE = (
    "instruction_id", "parent_id", "origin", "category", "run_id", "iteration", "teacher", "whole", "teacher_license"
)  # fmt: skip

# An instruction that several iterations hold counts for the first; its answer is the latest. What was trained on is the
# answer of its own iteration: a run that goes on with another teacher asks that one all over again.
ANSWERED = """
select distinct on (p.instruction_id)
    p.instruction_id, p.parent_id, p.origin, p.category, p.run_id, p.iteration, p.instruction, p.input,
    r.response, r.status, r.model
from {pool} as p
left join responses as r on r.run_id = p.run_id and r.instruction_id = p.instruction_id and r.role = 'teacher'
    and (r.iteration = p.iteration or not $trained)
where p.run_id = $run and ($iteration is null or p.iteration = $iteration)
order by p.instruction_id, p.iteration, r.iteration desc
"""

# The teacher's answer over the student's, where the reviews in every order say so; the latest iteration's.
PREFERRED = """
with in_order as (
    select run_id, iteration, instruction_id, "order", avg(teacher_score) as teacher, avg(student_score) as student
    from reviews where run_id = $run and ($iteration is null or iteration = $iteration) group by all
), agreed as (
    select run_id, iteration, instruction_id, avg(teacher) as teacher_score, avg(student) as student_score
    from in_order group by all having bool_and(coalesce(teacher > student, false))
)
select distinct on (a.instruction_id)
    a.instruction_id, p.parent_id, p.origin, p.category, a.run_id, a.iteration, p.instruction, p.input,
    t.response as chosen, t.status, t.model, s.response as rejected, a.teacher_score, a.student_score
from agreed as a
join cache_pool as p using (run_id, iteration, instruction_id)
join responses as t on (t.run_id, t.iteration, t.instruction_id) = (a.run_id, a.iteration, a.instruction_id)
    and t.role = 'teacher'
join responses as s on (s.run_id, s.iteration, s.instruction_id) = (a.run_id, a.iteration, a.instruction_id)
    and s.role = 'student' and s.status in ('ok', 'truncated')
where t.response <> s.response
order by a.instruction_id, a.iteration desc
"""


class NothingToExport(ValueError):
    """The run has no row of what was asked for."""


def export(manifest: Manifest, form: Form, to: Path, what: What = "training", iteration: int | None = None) -> int:
    """Write a run's rows and return how many.

    Args:
        form: `hf` writes a folder, every other form a file; a written file is replaced whole.
        what: training: what the best student was trained on, through all iterations that it descends from; the rows that
            the trainer set apart for its own validation are among them. A pool: all its instructions, answered or not.
        iteration: of the training, of the pool, or of the reviews; by default all together.

    Raises:
        NothingToExport: there is no such row.
    """
    rows = _preferred(manifest, iteration) if form == "dpo" else _answered(manifest, what, iteration)
    if not rows:
        where = f" of iteration {iteration}" if iteration is not None else ""
        raise NothingToExport(f"{manifest.run_id} has no row for {what}{where} as {form}. `lion pools` counts them.")
    system = manifest.config["student"]["system_prompt"]
    records = [_record(row, form, system) for row in rows]
    if form == "hf":
        write_parquet(to / "data" / "train.parquet", records)
        write_atomic(to / "README.md", render_card("dataset.md.jinja", manifest=manifest, what=what, rows=rows))
    elif form == "parquet":
        write_parquet(to, records)
    elif form in {"alpaca", "sharegpt"}:  # one JSON list, as their readers expect
        write_json_list(to, records)
    else:
        write_json_lines(to, records)
    return len(records)


def render_card(template: str, **values: Any) -> str:
    """A Markdown card from a template beside this module."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def _answered(manifest: Manifest, what: What, iteration: int | None) -> list[dict[str, Any]]:
    is_training = what == "training"
    pool = "train_pool" if is_training else what
    asked = {"run": manifest.run_id, "iteration": iteration, "trained": is_training}
    rows = ask(ANSWERED.format(pool=pool), asked)
    if is_training:
        trained = _trained_on(manifest, iteration)
        rows = [row for row in rows if row["instruction_id"] in trained]
    return _with_teacher(manifest, rows)


def _trained_on(manifest: Manifest, iteration: int | None) -> set[str]:
    """Ids of the rows that a student saw: that of an iteration in this one alone, the best in all that led to it."""
    best = manifest.best()
    if iteration is not None:
        records = [record for record in manifest.iterations if record.iteration == iteration]
    else:
        records = manifest.lineage(best[0]) if best else []
    found: set[str] = set()
    for record in records:
        if examples := record.snapshots.get("examples"):
            left_out = {key for keys in record.training.get("left_out", {}).values() for key in keys}
            found |= by_id(examples, []).keys() - left_out
    return found


def _preferred(manifest: Manifest, iteration: int | None) -> list[dict[str, Any]]:
    rows = ask(PREFERRED, {"run": manifest.run_id, "iteration": iteration})
    return _with_teacher(manifest, [row for row in rows if row["status"] in _taught(manifest)])


def _taught(manifest: Manifest) -> set[str]:
    """Statuses of answers that the run trains on."""
    return {"ok", "truncated"} if manifest.config["finetune"]["train_on_truncated"] else {"ok"}


def _with_teacher(manifest: Manifest, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    license, local = manifest.config["teacher"].get("license"), manifest.baseline.teacher
    # An endpoint's name stands in the row itself; of a model of this machine it is the digest of what was prepared.
    jobs = {job.parent.name: json.loads(job.read_bytes()) for job in home().glob("checkpoints/*/job.json")}
    named = {digest: job["source"] for digest, job in jobs.items() if "source" in job}
    named |= {local.digest: manifest.teachers[0]} if local else {}
    ordered = sorted(rows, key=lambda row: (row["iteration"], row["instruction_id"]))
    return [
        row
        | {"teacher": named.get(row["model"], row["model"]), "whole": row["status"] == "ok", "teacher_license": license}
        for row in ordered
    ]


def _record(row: dict[str, Any], form: Form, system: str | None) -> dict[str, Any]:
    lineage = {key: row[key] for key in LINEAGE}
    asked = conversation(row["instruction"], row["input"], system)
    if form == "dpo":
        scores = {key: row[key] for key in ("teacher_score", "student_score")}
        return {"prompt": asked, "chosen": _said(row["chosen"]), "rejected": _said(row["rejected"])} | scores | lineage
    if form == "alpaca":
        return {"instruction": row["instruction"], "input": row["input"] or "", "output": row["response"]} | lineage
    if form == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        said = [
            {"from": names[turn["role"]], "value": turn["content"]} for turn in [*asked, *_said(row["response"])]
        ]  # fmt: skip
        return {"id": row["instruction_id"], "conversations": said} | lineage
    if form == "parquet":
        return {"instruction": row["instruction"], "input": row["input"], "output": row["response"]} | lineage
    return {"messages": [*asked, *_said(row["response"])]} | lineage


def _said(response: str | None) -> list[dict[str, str]]:
    return [] if response is None else [{"role": "assistant", "content": response}]
