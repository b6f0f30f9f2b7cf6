"""One student against a reference: both answer, the referee scores, and the relative score comes out.

lion evaluate --questions vicuna_80.jsonl
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.tasks import Task
from pydantic import BaseModel, ConfigDict, Field

from flows.config import DistillConfig
from flows.students import Student, find_student
from flows.terminal import note
from storage.files import Snapshot, digest_of, expanded, home, locked, write_atomic
from storage.pools import by_id, read_rows
from storage.studies import Study, load_study
from tasks import questions, referee
from tasks.models.budget import Account
from tasks.models.endpoint import OpenAIModel
from tasks.models.ready import ModelSettings, ReadyModel, check_access_to
from tasks.mtbench import answer_lines, question_lines, review_lines
from tasks.policies import identity, stage_key_of
from tasks.prepare import base_model
from tasks.questions import Questions, answer_questions, read_answers, read_questions, transcripts
from tasks.referee import LLMReferee, review_responses
from tasks.relative import TIE_MARGIN, relative_score
from tasks.report import report_study
from tasks.shards import shards_by

RowsById = dict[str, dict[str, Any]]


class EvaluateConfig(BaseModel):
    """What is asked of whom, and who judges it."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Evaluation of a student")

    student: str | None = Field(None, description="RUN, RUN/ITERATION, a folder, a Hub id. Null: the last run's best.")
    reference: str = Field(
        "teacher", description="`teacher` (of the settings), a file of answers, or a checkpoint, named as a student is."
    )
    questions: str = Field(
        "bundled", description="FastChat's question.jsonl, or any form of seeds. `bundled`: the held-out instructions."
    )
    max_questions: int | None = Field(None, ge=1, description="Only the first so many.")
    tie_margin: float = Field(TIE_MARGIN, ge=0, le=9, description="Points within which two scores are a tie.")
    distill: DistillConfig = Field(
        DistillConfig(), description="Teacher, referee, sampling and seed, as a run has them."
    )


@flow(name="evaluate", flow_run_name="{config.questions}")
def evaluate(config: EvaluateConfig) -> str:
    """Evaluate and return the study's id. The same question again is answered from what is there."""
    with shards_by(config.distill.task_runner):
        return _Evaluation(config, find_student(config.student)).run()


class _Evaluation:
    """One study while it is made."""

    def __init__(self, config: EvaluateConfig, student: Student):
        self.config, self.student, self.distill = config, student, config.distill
        self.questions: Questions = read_questions(config.questions, config.max_questions)
        self.reference, self.missing = self._reference()
        settings = {
            "referee": identity(self.distill.referee),
            "student_model": identity(self.distill.student.model),  # in 4 bit it is another student
            "student_sampling": identity(self.distill.evaluation.sampling),
            "system_prompt": self.distill.student.system_prompt,
            "tie_margin": config.tie_margin,
            "seed": self.distill.seed,
        }
        asked = [student.checkpoint, self.reference, self.questions.turns]
        teacher = identity(self.distill.teacher) if isinstance(self.reference, ReadyModel) else None
        # As the stages are keyed that ask and review: another prompt or version of theirs makes another study.
        prompt = referee.PROMPT.text if isinstance(self.distill.referee, LLMReferee) else None
        told = [questions.VERSION, referee.VERSION, prompt]
        self.study = Study(
            study_id=f"{Path(config.questions).stem}-{digest_of([settings, teacher, told, *map(identity, asked)])[:8]}",
            student=student.name,
            checkpoint=student.checkpoint,
            run_id=student.run_id,
            iteration=student.iteration,
            reference=config.reference,
            questions=config.questions,
            rows=len(self.questions.source_ids),
            settings=settings,
        )

    def run(self) -> str:
        study = self.study
        with locked(f"study-{study.study_id}"):
            known = load_study(study.study_id)
            if known and known.is_whole():
                note.print(f"{study.study_id} is there: nothing to do.")
            else:
                self._judge()
        report_study(study.run_id)  # also where another run's student, the same one, was named before
        return study.study_id

    def _judge(self) -> None:
        study, distill, questions = self.study, self.distill, self.questions.turns
        judge = distill.referee
        model = self._ready(judge.model) if isinstance(judge, LLMReferee) else None
        check_access_to(asked.settings for asked in (self.reference, model) if isinstance(asked, ReadyModel))
        own = self._step(
            answer_questions, "student", ReadyModel(settings=distill.student.model, checkpoint=self.student.checkpoint),
            questions, distill.evaluation.sampling, distill.student.system_prompt, distill.seed, self._account("student"),
        )  # fmt: skip
        if isinstance(self.reference, ReadyModel):
            by_teacher = self.config.reference == "teacher"
            answers = self._step(
                answer_questions, "teacher", self.reference, questions,
                distill.teacher.sampling if by_teacher else distill.evaluation.sampling,
                distill.teacher.system_prompt if by_teacher else distill.student.system_prompt,
                distill.seed, self._account("teacher"),
            )  # fmt: skip
        else:
            answers = self.reference
            if self.missing:
                study.notes.append(f"{self.missing} turns have no answer in {self.config.reference}: left out")
        read = transcripts(questions, answers, own) if model else [questions, answers, own]
        reviews = self._step(review_responses, judge, model, *read, distill.seed, self._account("referee"))
        study.snapshots = {"questions": questions, "reference": answers, "student": own, "reviews": reviews}
        turns = by_id(questions)
        study.relative = relative_score(
            read_rows(reviews),
            {key: row["category"] for key, row in turns.items()},
            questions={turn: keys[0] for keys in self.questions.conversations for turn in keys},
            tie_margin=self.config.tie_margin,
            seed=distill.seed,
        )
        if self.questions.left_out:
            study.notes.append(f"{self.questions.left_out} questions begin as an earlier one does: left out")
        if study.relative.left_out:
            study.notes.append(f"{study.relative.left_out} turns without a valid review in every order: left out")
        if self.config.reference == "teacher":
            study.notes += distill.warnings()
            if others := len(distill.teacher.further):
                study.notes.append(f"the reference is the first teacher alone: {others} more taught a part each")
        self._write_files(turns, by_id(own), by_id(answers), read_rows(reviews))
        study.save()

    def _write_files(self, turns: RowsById, own: RowsById, answers: RowsById, reviews: list[dict[str, Any]]) -> None:
        ids, conversations = self.questions.source_ids, self.questions.conversations
        student, reference = self.study.student, self.study.reference
        kind = self.distill.referee.kind
        files = {
            "question.jsonl": question_lines(ids, conversations, turns),
            "student.jsonl": answer_lines(student, ids, conversations, own),
            "reference.jsonl": answer_lines(reference, ids, conversations, answers),
            "reviews.jsonl": review_lines(student, reference, kind, ids, conversations, reviews),
        }
        for name, lines in files.items():
            write_atomic(self.study.folder / name, "".join(lines))

    def _reference(self) -> tuple[ReadyModel | Snapshot, int]:
        """Who the student is compared with: a model to ask, or a file's answers; and how many turns that file lacks."""
        name = self.config.reference
        if name == "teacher":
            return self._ready(self.distill.teacher.model), 0
        if (file := expanded(name)).is_file():
            return read_answers(file, self.questions)
        return ReadyModel(settings=self.distill.student.model, checkpoint=find_student(name).checkpoint), 0

    def _ready(self, settings: ModelSettings) -> ReadyModel:
        if isinstance(settings, OpenAIModel):
            return ReadyModel(settings=settings)
        return ReadyModel(settings=settings, checkpoint=base_model(settings))

    def _step(self, stage: Task[..., Any], *inputs: Any) -> Any:
        self.study.stage_keys.append(stage_key_of(stage, inputs))
        named = stage.with_options(task_run_name=f"{stage.name} · evaluation", result_storage=home() / "results")
        return named(*inputs)

    def _account(self, role: str) -> Account:
        return Account(run_id=self.study.study_id, role=role, budget=self.distill.budget)
