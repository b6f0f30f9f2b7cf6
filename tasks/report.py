"""The report of a run: one HTML file that needs no network, with charts as inline SVG.

Read it top to bottom: did it help, what happened in each iteration, where is the student still weak.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from storage.catalog import query
from storage.files import StorageError, write_atomic
from storage.journal import spend_of
from storage.runs import Baseline, Interval, IterationRecord, Manifest, load_manifest
from storage.studies import studies_of
from tasks.gains import INK, STUDENT, contaminated, gain_charts, lineage, most_improved
from tasks.selection import compare, gain_in, judged_by_referee, told

TEMPLATE = "report.html.jinja"
GRID, HARD = "#8888884d", "#d9480f"
ITERATIONS = [STUDENT, HARD, "#2b8a3e", "#9c36b5"]  # colours of a few
LONGEST = 10_000  # characters shown of a text: a page of 300 MB opens nowhere
WIDEST = 10  # score gaps shown side by side
MOST_CATEGORIES = 15  # a chart has room for
MOST_GAPS = 4  # charts of them, of the last iterations

WIDEST_GAPS = """
select v.score_gap, v.teacher_score, v.student_score, p.instruction, p.input, p.category,
       t.response as teacher, t.status as teacher_status, s.response as student, s.status as student_status
from verdicts as v
join pool as p using (instruction_id)
join teacher as t using (instruction_id)
join student as s using (instruction_id)
where v.score_gap is not null
order by v.score_gap desc, v.instruction_id
limit $limit
"""

# A weak teacher's rows are undecided, and have gaps, too. Counted by the hundredth of a point: a chart takes half a minute to
# draw 70,000 rows.
GAPS = """
select floor(score_gap * 100 + 1e-6) / 100 as score_gap, count(*) as instructions
from verdicts
where difficulty <> 'undecided'
group by 1
order by 1
"""

HARD_SHARE = """
with decided as (
    select coalesce(p.category, 'none') as named, difficulty = 'hard' as is_hard
    from verdicts join pool as p using (instruction_id)
    where difficulty <> 'undecided'
),
counted as (
    select named, count_if(is_hard) as hard, count(*) as rows,
           row_number() over (order by count(*) desc, named) as place, count(*) over () as categories
    from decided group by named
)
select if(place < $most or categories <= $most, named, (categories - $most + 1) || ' smaller ones') as category,
       sum(hard) / sum(rows) as share, sum(hard)::bigint as hard, sum(rows)::bigint as rows
from counted
group by 1
order by share desc, category
"""


def write_report(manifest: Manifest) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["share"] = lambda share: "" if share is None else f"{share:.0%}"
    environment.filters["figure"] = lambda figure, digits: "no figure" if figure is None else f"{figure:.{digits}f}"
    environment.filters["cut"] = _cut
    try:
        studies, unreadable = studies_of(manifest), ""
    except StorageError as error:  # it may be another run's, and this one shall end
        studies, unreadable = [], str(error)
    page = environment.get_template(TEMPLATE).render(
        manifest=manifest,
        rows=progress_rows(manifest),
        verdict=verdict(manifest),
        charts=charts(manifest),
        widest=widest(manifest, WIDEST),
        improved=most_improved(manifest),
        contaminated=contaminated(manifest),
        lineage=lineage(manifest),
        best=manifest.best(),
        studies=studies,
        unreadable=unreadable,
        spend=spend_of(manifest.run_id),
    )
    path = manifest.folder / "report.html"
    write_atomic(path, page)
    return path


def report_study(run_id: str | None) -> None:
    """Put a study into the report of the run whose student was named, where one of this home made it."""
    if run_id and (manifest := load_manifest(run_id)):
        write_report(manifest)


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … ({len(text) - LONGEST:,} characters more)"


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """A line of a run's table: the student of an iteration, and what that one did."""

    iteration: int  # 0: before any training
    loss: float | None  # nats per token
    score: float | None  # 1 to 10
    heldout: int  # instructions held out
    measured: int  # of these: those with an answer of the teacher's whose loss was had
    scored: int  # of these: those with a score
    relative: Interval | None  # the relative score; null where the referee is no model
    judged: int  # answers that the relative score is of
    seconds: dict[str, float]  # by stage
    cached: dict[str, bool]
    record: IterationRecord | None  # null before the first


def progress_rows(manifest: Manifest) -> list[ProgressRow]:
    """The table of a run, for the terminal, for the report and for Prefect."""
    found = []
    places: list[Baseline | IterationRecord] = [manifest.baseline, *manifest.iterations]
    for iteration, place in enumerate(places):
        evaluation = place.evaluation
        judged = judged_by_referee(evaluation) if evaluation else None
        found.append(
            ProgressRow(
                iteration=iteration,
                loss=evaluation.loss if evaluation else None,
                score=evaluation.score if evaluation else None,
                heldout=evaluation.rows if evaluation else 0,
                measured=evaluation.measured if evaluation else 0,
                scored=evaluation.scored if evaluation else 0,
                relative=judged.mean if judged else None,
                judged=judged.questions if judged else 0,
                seconds=place.seconds,
                cached=place.cached,
                record=place if isinstance(place, IterationRecord) else None,
            )
        )
    return found


def counts(record: IterationRecord | None) -> dict[str, str]:
    """What became of the rows of an iteration, by heading; empty for what comes before the first."""
    generated = record.generated if record else None
    return {
        "trained on": f"{record.trained_rows:,} of {record.train_rows:,}" if record else "",
        "hard / easy / undecided": f"{record.hard:,} / {record.easy:,} / {record.undecided:,}" if record else "",
        "new / rejected": f"{generated.accepted:,} / {sum(generated.rejected.values()):,}" if generated else "",
    }


def verdict(manifest: Manifest) -> str:
    """Whether the student to use is better than the one before training, by the measure that the run goes by; and which
    it is, where it is not the last."""
    evaluations, best = manifest.evaluations(), manifest.best()
    place = best[0] if best else 0
    start, now = evaluations.get(0), evaluations.get(place)
    if start is None or now is None or not manifest.iterations:
        return ""
    measure = manifest.config["stop"]["measure"]
    gain = gain_in(compare(now, start, 0, manifest.config["seed"]), measure)
    if gain is None or gain.value <= 0:
        said = "The student did not get better"
    elif gain.low <= 0 or now.measured == 1:  # one instruction says nothing of others, and its interval has no width
        said = "That the student got better is not sure"
    else:
        said = "The student got better"
    said = f"{said} ({told(gain, measure)})."
    if place == len(manifest.iterations):
        return said
    return f"{said} The student to use is {f'that of iteration {place}' if place else 'the one before any training'}."


def charts(manifest: Manifest) -> list[dict[str, str]]:
    """Title, one line of reading help, and SVG of each chart that there are data for."""
    made = [_chart(*described) for described in gain_charts(manifest)]
    judged = [record for record in manifest.iterations if "verdicts" in record.snapshots]
    earlier = " Earlier iterations: in the view `verdicts`." if len(judged) > MOST_GAPS else ""
    for record in judged[-MOST_GAPS:]:
        made.append(
            _chart(
                f"Score gaps, iteration {record.iteration}",
                "Teacher's score minus student's, a row of the cache pool each. Right of the line is hard." + earlier,
                _gaps(record),
            )
        )
    if judged:
        last = judged[-1]
        made.append(
            _chart(
                f"Hard share by category, iteration {last.iteration}",
                "Where the student still falls behind.",
                _hard_share(last),
            )
        )
    rejected = [
        {"iteration": record.iteration, "outcome": outcome, "candidates": count}
        for record in manifest.iterations
        for outcome, count in {"accepted": record.generated.accepted, **record.generated.rejected}.items()
        if count
    ]
    if rejected:
        made.append(_chart("What became of the candidates", "New instructions by outcome.", _candidates(rejected)))
    return made


def _chart(title: str, note: str, chart: alt.Chart | alt.LayerChart) -> dict[str, str]:
    styled = (
        chart.properties(width=330, height=190, background="transparent")
        .configure_axis(labelColor=INK, titleColor=INK, gridColor=GRID, domainColor=INK, tickColor=INK, titleFontWeight="normal")
        .configure_legend(labelColor=INK, titleColor=INK, titleFontWeight="normal")
        .configure_view(stroke=None)
    )  # fmt: skip
    return {"title": title, "note": note, "svg": vl_convert.vegalite_to_svg(styled.to_json())}


def _gaps(record: IterationRecord) -> alt.LayerChart:
    rows = query(GAPS, verdicts=record.snapshots["verdicts"])
    bars = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=STUDENT, opacity=0.75)
        .encode(
            x=alt.X("score_gap:Q", bin=alt.Bin(maxbins=24), title="score gap"),
            y=alt.Y("sum(instructions):Q", title="instructions"),
        )
    )
    threshold = alt.Data(values=[{"threshold": record.threshold}])
    return bars + alt.Chart(threshold).mark_rule(color=HARD, strokeWidth=2).encode(x="threshold:Q")


def _hard_share(record: IterationRecord) -> alt.LayerChart:
    made = record.snapshots
    rows = query(HARD_SHARE, {"most": MOST_CATEGORIES}, verdicts=made["verdicts"], pool=made["cache_pool"])
    data = alt.Data(values=[row | {"label": f"{row['hard']} of {row['rows']}"} for row in rows])
    base = alt.Chart(data).encode(
        y=alt.Y("category:N", sort="-x", title=None),
        x=alt.X("share:Q", title="share that is hard", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
    )
    return base.mark_bar(color=HARD, opacity=0.8) + base.mark_text(align="left", dx=4, color=INK).encode(text="label:N")


def _candidates(rows: list[dict[str, Any]]) -> alt.Chart:
    several = len({row["iteration"] for row in rows}) > len(ITERATIONS)
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(opacity=0.85)
        .encode(
            y=alt.Y("outcome:N", sort="-x", title=None),
            x=alt.X("candidates:Q", title="candidates"),
            color=alt.Color(
                "iteration:O",
                title="iteration",
                scale=alt.Scale(scheme="turbo") if several else alt.Scale(range=ITERATIONS),
            ),
        )
    )


def widest(manifest: Manifest, limit: int) -> list[dict[str, Any]]:
    """The rows of the widest gaps in the last iteration, with both answers."""
    for record in reversed(manifest.iterations):
        made = record.snapshots
        if "verdicts" in made:
            return query(
                WIDEST_GAPS,
                {"limit": limit},
                verdicts=made["verdicts"],
                pool=made["cache_pool"],
                teacher=made["teacher_responses"],
                student=made["student_responses"],
            )
    return []
