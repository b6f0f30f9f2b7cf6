"""What a run shows in the Prefect UI: artifacts under keys that stay the same, so that each has a history.

`NAME` is the name of the run's configuration: `NAME-iterations`, `NAME-hardest`, `NAME-spend`, `NAME-report`, where the
referee is a model `NAME-judge`, and one for each chart. How far a long stage is shows `tasks/progress.py`.
"""

import base64
import os
import re
from typing import Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

from storage.journal import Spent, spend_of
from storage.runs import Manifest
from tasks.policies import on_a_server
from tasks.report import charts, counts, progress_rows, verdict, widest

HARDEST = 10
CELL = 300  # characters of a text in a table


def publish_artifacts(manifest: Manifest) -> None:
    """Show the run as far as it has come; without a server there is nobody to show it to."""
    if not on_a_server():
        return
    name = manifest.config["name"]
    create_table_artifact(
        _iterations(manifest),
        key=f"{name}-iterations",
        description=f"Run {manifest.run_id}. {verdict(manifest)} Loss: nats per token of the teacher's held-out answers. "
        "Score: 1 to 10.",
    )
    create_table_artifact(
        _hardest(manifest), key=f"{name}-hardest", description="Where the student falls furthest behind."
    )
    if judged := [(record.iteration, record.judge) for record in manifest.iterations if record.judge]:
        create_table_artifact(
            [{"iteration": iteration, **judge.model_dump(exclude={"unusable"})} for iteration, judge in judged],
            key=f"{name}-judge",
            description="How far the referee can be trusted. flip_share and tie_share are of pairs read in both orders.",
        )
    spent = spend_of(manifest.run_id)
    create_table_artifact(
        _paid(spent) or [{"nothing": "All models of this run are on this machine."}],
        key=f"{name}-spend",
        description=f"${sum(line.usd for line in spent):.2f} so far.",
    )
    latest = {_slug(chart["title"]): chart for chart in charts(manifest)}  # earlier iterations' are there already
    for slug, chart in latest.items():
        create_image_artifact(
            "data:image/svg+xml;base64," + base64.b64encode(chart["svg"].encode()).decode(),
            key=f"{name}-{slug}",
            description=f"{chart['title']}. {chart['note']}",
        )
    create_link_artifact(
        _link(manifest), link_text="Report", key=f"{name}-report", description=str(manifest.folder / "report.html")
    )


def _iterations(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "iteration": line.iteration or "start",
            **counts(line.record),
            "loss": _rounded(line.loss),
            "score": _rounded(line.score),
            **({"judged, %": _rounded(100 * line.relative.value)} if line.relative else {}),
            "seconds": round(sum(line.seconds.values())),
        }
        for line in progress_rows(manifest)
    ]


def _hardest(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "gap": _rounded(row["score_gap"]),
            **{name: cell(row[name]) for name in ("category", "instruction", "teacher", "student")},
        }
        for row in widest(manifest, HARDEST)
    ]


def _paid(spent: list[Spent]) -> list[dict[str, Any]]:
    return [
        {
            "iteration": line.iteration,
            "role": line.role,
            "model": line.model,
            "requests": line.requests,
            "tokens": line.prompt_tokens + line.completion_tokens,
            "usd": round(line.usd, 4),
        }
        for line in spent
    ]


def _link(manifest: Manifest) -> str:
    """Where the report is: on this machine, or under LION_REPORTS_URL where the home's `runs` is served."""
    served = os.environ.get("LION_REPORTS_URL")
    return (
        f"{served.rstrip('/')}/{manifest.run_id}/report.html" if served else (manifest.folder / "report.html").as_uri()
    )


def _slug(title: str) -> str:
    """A chart's title as a key. Charts of a single iteration are its latest state, so its number is left out."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r", iteration \d+$", "", title).lower()).strip("-")


def cell(text: str | None) -> str:
    """A stranger's text for a table, cut. One of Prefect's two UIs reads Markdown and HTML in it, and would fetch its pictures
    and run what its links hold; a word joiner, which nobody sees, keeps it from that."""
    text = text or ""
    text = text if len(text) <= CELL else text[:CELL] + " …"
    return text.replace("]", "]\u2060").replace("<", "<\u2060")


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)
