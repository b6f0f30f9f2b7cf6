"""Discrimination: which instructions are hard for the student. One SQL statement over the reviews."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.catalog import query
from storage.files import Snapshot
from storage.pools import write_snapshot
from tasks.policies import stage

VERSION = 1
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


class TooManyUndecided(ValueError):
    """Too few reviews are valid to split the pool on them."""


# A row counts only with a valid review in every order that its reviews have; votes are averaged within an order
# first, so that an order with more valid votes does not weigh more.
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
    case when score_gap is null or weak then 'undecided' when score_gap >= threshold then 'hard' else 'easy' end
        as difficulty,
    case when score_gap is null then 'missing_review' when weak then 'weak_teacher' end as reason
from gaps cross join cut
order by instruction_id
"""


@stage("discriminate", version=VERSION, prompts=[SPLIT])
def discriminate(config: DiscriminateConfig, reviews: Snapshot) -> Split:
    """Split reviewed instructions into hard, easy and undecided by their score gap.

    Raises:
        TooManyUndecided: more than `max_undecided_share` of the rows lack a valid review in some order.
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
    verdicts = write_snapshot("verdicts", rows, step="discriminate", version=VERSION, inputs=[reviews])
    threshold = rows[0]["threshold"] if rows else None
    return Split(verdicts=verdicts, threshold=threshold, **found)
