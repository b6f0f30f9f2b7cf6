"""The report's part on what the training was worth: loss, scores and gains with intervals, answers that got better; and
what one needs to believe it: what was kept out of the pools, and where each snapshot comes from.

Gives charts and rows; `tasks.report` puts them on the page.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import altair as alt

from storage.catalog import query
from storage.files import Snapshot
from storage.pools import read_lineage, read_rows
from storage.runs import Evaluation, Interval, Manifest
from tasks.selection import loss_per_token, mean_score, relative_to_teacher

STUDENT, INK = "#2f7ed8", "#7a828e"  # a blue; a grey that reads on white and on black
MOST = 10  # examples shown
MOST_FIGURES = 8  # beside the points of a chart
Described = tuple[str, str, alt.Chart | alt.LayerChart]  # title, how to read it, the chart

IMPROVED = f"""
select h.instruction, h.input, h.category, a.response as teacher, b.response as before, n.response as now,
       b.score as score_before, n.score as score_now, n.score - b.score as gained
from now as n
join before as b using (instruction_id)
join heldout as h using (instruction_id)
join answers as a using (instruction_id)
where n.score > b.score
order by gained desc, n.instruction_id
limit {MOST}
"""


def gain_charts(manifest: Manifest) -> list[Described]:
    """Loss and scores by iteration, gain over the student before, training loss; each where there are data for it."""
    return [*_figures(manifest), *_gain_of_each_iteration(manifest), *_training_loss(manifest)]


def _figures(manifest: Manifest) -> Iterator[Described]:
    evaluations = manifest.evaluations()
    judged = any(evaluation.is_judged for evaluation in evaluations.values())

    def relative(evaluation: Evaluation) -> Interval | None:
        # Earlier iterations of a chain may have had a metric for a referee: its scores are others than a model's.
        return relative_to_teacher(evaluation) if evaluation.is_judged == judged else None

    by = "the referee's, mean of both orders" if judged else "ROUGE-L"
    figures: list[tuple[str, str, str, Callable[[Evaluation], Interval | None], float]] = [
        ("Held-out loss", "Nats per token of the teacher's answers to instructions no pool holds. Lower is better",
         "nats per token", loss_per_token, 1),
        ("Held-out score", "Mean ROUGE-L score of the student's answers against the teacher's, 1 to 10. Higher is better",
         "score", mean_score, 1),
        ("Relative score", f"The student's summed held-out scores ({by}) in % of the teacher's",
         "% of the teacher", relative, 100),
    ]  # fmt: skip
    for title, note, unit, figure, scale in figures:
        points = [
            {"iteration": iteration, **_bounds(interval, scale)}
            for iteration, evaluation in evaluations.items()
            if (interval := figure(evaluation))
        ]
        if points:
            note += "; with 95 % intervals (bootstrap by question)."
            yield title, note, _with_bounds(points, unit, joined=True)


def _gain_of_each_iteration(manifest: Manifest) -> Iterator[Described]:
    gains = [
        {"iteration": record.iteration, **_bounds(record.comparison.loss_gain, 1)}
        for record in manifest.iterations
        if record.comparison and record.comparison.loss_gain
    ]
    if gains:
        note = "Nats per token that the held-out loss fell since the student before. An interval over 0 is a sure gain."
        zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=INK, strokeDash=[4, 3]).encode(y="zero:Q")
        yield "Gain of each iteration", note, zero + _with_bounds(gains, "nats per token")


def _training_loss(manifest: Manifest) -> Iterator[Described]:
    steps = [
        {"iteration": record.iteration, "step": step, "loss": loss}
        for record in manifest.iterations
        for step, loss in record.training.get("loss_by_step", [])
    ]
    if steps:
        lines = (
            alt.Chart(alt.Data(values=steps))
            .mark_line(strokeWidth=1.6)
            .encode(
                x=alt.X("step:Q", title="optimizer step"),
                y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
                color=alt.Color("iteration:N", title="iteration"),
            )
        )
        yield "Training loss", "Of each step's batch, on the teacher's answers.", lines


def most_improved(manifest: Manifest) -> list[dict[str, Any]]:
    """Held-out answers that gained most from before training to the student that goes on."""
    evaluations, best, made = manifest.evaluations(), manifest.best(), manifest.baseline.snapshots
    if 0 not in evaluations or not best or not best[0]:
        return []
    before, now = evaluations[0].details, evaluations[best[0]].details
    return query(IMPROVED, before=before, now=now, heldout=made["heldout"], answers=made["heldout_answers"])


def contaminated(manifest: Manifest) -> dict[str, int]:
    """How many instructions were kept out of the pools because they are near a held-out one, by where they came from."""
    heldout = manifest.baseline.snapshots.get("heldout")
    if heldout is None:
        return {}
    ids = {row["instruction_id"] for row in read_rows(heldout, ["instruction_id"])}
    found = Counter({"seeds": manifest.seeds.get("near_heldout", 0)})
    for record in manifest.iterations:
        if "candidates" in record.snapshots:
            rows = read_rows(record.snapshots["candidates"], ["near_id"])
            found["candidates"] += sum(row["near_id"] in ids for row in rows)
    return dict(found)


def lineage(manifest: Manifest) -> list[dict[str, Any]]:
    """Every snapshot of the run: what wrote it, and from what, by the names they have in the run."""
    named: dict[str, str] = {}
    places: list[tuple[str, str, Snapshot]] = [
        ("before", name, snapshot) for name, snapshot in manifest.baseline.snapshots.items()
    ]
    for record in manifest.iterations:
        places += [(str(record.iteration), name, snapshot) for name, snapshot in record.snapshots.items()]
    for where, name, snapshot in places:
        named.setdefault(snapshot.digest, f"{name} ({where})")
    rows = []
    for where, name, snapshot in places:
        if not snapshot.path.is_file():
            continue
        footer = read_lineage(snapshot)
        sources = [named.get(digest, digest[:8]) for digest in footer["inputs"]]
        rows.append(
            {"iteration": where, "name": name, "rows": snapshot.rows, "digest": snapshot.digest}
            | {"step": f"{footer['step']} v{footer['version']}", "inputs": ", ".join(sources)}
        )
    return rows


def _bounds(interval: Interval, scale: float) -> dict[str, float]:
    return {name: scale * getattr(interval, name) for name in ("value", "low", "high")}


def _with_bounds(points: list[dict[str, Any]], title: str, *, joined: bool = False) -> alt.LayerChart:
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("iteration:O", title="iteration (0: before training)", axis=alt.Axis(labelAngle=0))
    )
    bars = base.mark_rule(color=STUDENT, strokeWidth=2).encode(
        y=alt.Y("low:Q", title=title, scale=alt.Scale(zero=False, padding=14)), y2="high:Q"
    )
    dots = base.mark_point(color=STUDENT, filled=True, size=60).encode(y="value:Q")
    told = points if len(points) <= MOST_FIGURES else [points[0], points[-1]]  # more would lie upon each other
    figures = base.properties(data=alt.Data(values=told)).mark_text(dx=8, dy=-8, align="left", color=INK)
    text = figures.encode(y="value:Q", text=alt.Text("value:Q", format=".4~r"))
    line = base.mark_line(color=STUDENT, strokeWidth=1.6, opacity=0.6).encode(y="value:Q")
    return line + bars + dots + text if joined else bars + dots + text
