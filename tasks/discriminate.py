"""Discrimination: which instructions are hard for the student. One SQL statement over the reviews."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.catalog import query
from storage.files import Snapshot
from storage.pools import write_snapshot
from storage.runs import JudgeHealth
from tasks.policies import stage

VERSION = 2
ENOUGH_PAIRS = 10  # fewer say nothing about a referee
DIFFICULTIES = ("hard", "easy", "undecided")


class DiscriminateConfig(BaseModel):
    """Where hard begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold_kind: Literal["absolute", "quantile"] = Field(
        "absolute",
        description="absolute: a gap in points (the paper). quantile: a share of this iteration's own gaps.",
    )
    threshold: float = Field(
        1.0,
        ge=0,
        le=9,
        description="A row is hard from this gap on, teacher's score minus student's: points for absolute (the "
        "paper: 1.0), a share from 0 to 1 for quantile (0.5: the wider half is hard).",
    )
    min_teacher_score: float = Field(
        1.0, ge=1, le=10, description="Below this the teacher's own answer is not worth learning: undecided."
    )
    max_undecided_share: float = Field(
        0.2, ge=0, le=1, description="Above this share of rows without a valid review in every order the stage fails."
    )

    max_flip_share: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Above this share of pairs whose winner changes with the order of the answers the stage fails: "
        f"the referee judges the place. A coin toss flips about 0.4. Looked at from {ENOUGH_PAIRS} pairs on.",
    )

    @model_validator(mode="after")
    def _quantile_is_a_share(self) -> "DiscriminateConfig":
        if self.threshold_kind == "quantile" and self.threshold > 1:
            raise ValueError(f"a quantile is a share from 0 to 1, not {self.threshold}")
        return self


class Split(BaseModel):
    """The outcome of a discrimination stage."""

    verdicts: Snapshot
    hard: int
    easy: int
    undecided: int
    threshold: float | None  # in points; null where no row has a gap
    judge: JudgeHealth | None = None  # null where no model is the referee


class TooManyUndecided(ValueError):
    """Too few reviews are valid to split the pool on them."""


class UntrustworthyReferee(ValueError):
    """The referee's verdicts follow the order of the answers."""


# A row counts only with a valid review in every order that its reviews have; votes are averaged within an order
# first, so that an order with more valid votes does not weigh more. Means of thirds are off in their last digits, in which
# no row is hard or easy.
SPLIT = """
with in_order as (
    select instruction_id, "order", avg(teacher_score) as teacher, avg(student_score) as student
    from reviews
    group by all
), scored as (
    select
        instruction_id,
        case when bool_and(teacher is not null and student is not null) then avg(teacher) end as teacher_score,
        case when bool_and(teacher is not null and student is not null) then avg(student) end as student_score
    from in_order
    group by all
), gaps as (
    select *, teacher_score - student_score as score_gap, teacher_score < $min_teacher_score as weak from scored
), cut as (
    select case when $kind = 'quantile' then quantile_cont(score_gap, $threshold) else $threshold end as threshold
    from gaps
    where score_gap is not null and not weak
)
select
    instruction_id,
    teacher_score,
    student_score,
    score_gap,
    threshold,
    case when score_gap is null or weak then 'undecided' when round(score_gap, 9) >= round(threshold, 9) then 'hard'
        else 'easy' end
        as difficulty,
    case when score_gap is null then 'missing_review' when weak then 'weak_teacher' end as reason
from gaps cross join cut
order by instruction_id
"""


# The gap as each order sees it, votes averaged, and rounded: the difference of scores such as 8.1 is off in its last digits.
# `unordered` reviews are a metric's, and have no health.
HEALTH = """
with asked as (
    select *, round(teacher_score - student_score, 9) as gap from reviews where "order" <> 'unordered' and outcome <> 'missing'
), in_order as (
    select instruction_id, "order", round(avg(gap), 9) as gap, count(gap) as votes, count(distinct sign(gap)) as winners
    from asked group by all
), pairs as (
    select
        max(gap) filter ("order" = 'teacher_first') as teacher_first,
        max(gap) filter ("order" = 'student_first') as student_first
    from in_order group by instruction_id
    having teacher_first is not null and student_first is not null
), votes as (
    select winners from in_order where votes > 1
)
select
    (select count(*) from asked) as reviews,
    (select avg((gap is null)::int) from asked) as unusable_share,
    count(*) as pairs,
    avg((teacher_first * student_first < 0)::int) as flip_share,
    avg((teacher_first + student_first = 0)::int) as tie_share,
    avg(teacher_first - student_first) / 2 as position_bias,
    (select avg((winners = 1)::int) from votes) as vote_agreement
from pairs
"""


@stage("discriminate", version=VERSION, prompts=[SPLIT, HEALTH])
def discriminate(config: DiscriminateConfig, reviews: Snapshot) -> Split:
    """Split reviewed instructions into hard, easy and undecided by their score gap.

    Raises:
        TooManyUndecided: more than `max_undecided_share` of the rows lack a valid review in some order.
        UntrustworthyReferee: more than `max_flip_share` of the pairs change their winner with the order.
    """
    settings = {
        "kind": config.threshold_kind,
        "threshold": config.threshold,
        "min_teacher_score": config.min_teacher_score,
    }
    rows = query(SPLIT, settings, reviews=reviews)
    found = {difficulty: sum(row["difficulty"] == difficulty for row in rows) for difficulty in DIFFICULTIES}
    missing = sum(row["reason"] == "missing_review" for row in rows)
    if missing > config.max_undecided_share * len(rows):
        outcomes = query("select outcome, count(*) as n from reviews group by all order by all", reviews=reviews)
        raise TooManyUndecided(
            f"{missing} of {len(rows)} rows have no valid review in every order, more than the share of "
            f"{config.max_undecided_share} that discriminate.max_undecided_share allows. Reviews by outcome: "
            + ", ".join(f"{row['n']} {row['outcome']}" for row in outcomes)
        )
    judge = _health(reviews)
    if judge and judge.pairs >= ENOUGH_PAIRS and (judge.flip_share or 0) > config.max_flip_share:
        raise UntrustworthyReferee(
            f"the referee changes the winner with the order of the answers in {judge.flip_share:.0%} of {judge.pairs} "
            f"pairs, more than discriminate.max_flip_share = {config.max_flip_share:g} allows (first place: "
            f"{judge.position_bias:+.1f} points). Take another referee, or more of its votes (referee.votes)."
        )
    verdicts = write_snapshot("verdicts", rows, step="discriminate", version=VERSION, inputs=[reviews])
    threshold = rows[0]["threshold"] if rows else None
    return Split(verdicts=verdicts, threshold=threshold, judge=judge, **found)


def _health(reviews: Snapshot) -> JudgeHealth | None:
    """How the model that wrote these reviews judges; null where a metric did."""
    (figures,) = query(HEALTH, reviews=reviews)
    if not figures["reviews"]:
        return None
    unusable = """
    select outcome, count(*) as n from reviews where outcome not in ('ok', 'missing') group by all order by all
    """
    return JudgeHealth(**figures, unusable={row["outcome"]: row["n"] for row in query(unusable, reviews=reviews)})
