"""Adversarial distillation (Lion, EMNLP 2023, arXiv 2305.12870), the whole algorithm on one page.

    lion run --preset offline          # the same flow that a Prefect deployment runs

A student learns from a teacher's answers. A referee finds the instructions where it still falls behind. A
generator writes new instructions like those, and rarer ones like the others. Then the loop turns again.

Every line below that calls `step(...)` is one stage: cached by content, retried, found again after a crash.
"""

from prefect import flow

from flows.approval import Approval
from flows.artifacts import publish_artifacts
from flows.chain import Start, start_of
from flows.config import DistillConfig
from flows.steps import Steps, publish_catalog, recorded, warn
from storage.files import Checkpoint, Snapshot
from storage.pools import read_rows
from storage.runs import Baseline, Evaluation, IterationRecord, Manifest
from tasks.discriminate import discriminate
from tasks.evaluate import evaluate_student
from tasks.finetune import finetune_student
from tasks.generate import generate_instructions
from tasks.models.budget import Account
from tasks.models.endpoint import OpenAIModel
from tasks.models.ready import ModelSettings, ReadyModel, check_access_to
from tasks.prepare import prepare_model, prune_student, source_digest
from tasks.referee import LLMReferee, review_responses
from tasks.refresh import Pools, refresh_pools
from tasks.report import write_report
from tasks.seed import SeedPools, load_seeds
from tasks.selection import compare, gain_in, is_stalled, is_worse, same_reference, told
from tasks.shards import shards_by
from tasks.student import answer_with_student
from tasks.teacher import answer_with_teacher


@flow(name="distill", flow_run_name="{config.name}")
def distill(config: DistillConfig) -> str:
    """Run N iterations and return the run's id. The same configuration goes on where it was interrupted."""
    approval = Approval(config)
    with shards_by(config.task_runner), recorded(config) as manifest:
        run = Run(config, manifest)
        start = start_of(config)
        pools, student = run.baseline(start)
        if start:
            pools, student = run.go_on_from(start)
        first = len(manifest.iterations) + 1
        for iteration in range(first, first + config.iterations):
            if not pools.train.rows:
                warn(
                    manifest,
                    f"Iteration {iteration} has nothing to learn from: the one before accepted no new instruction. Its "
                    "notes say why. Start again with more seeds, another generator, or a higher generate.max_similarity.",
                )
                break
            manifest.next_pools = pools.by_view  # also if nobody approves
            run.config = approval.before(config, manifest, iteration, pools, run.unanswered_in(pools))
            if approval.is_over:
                break
            manifest.next_pools = {}  # of this iteration, once it is done
            pools, student = run.iterate(iteration, pools, student)
            write_report(manifest)
            publish_catalog()
            publish_artifacts(manifest)
            if run.is_stalled(last=iteration == first + config.iterations - 1):
                break  # nothing is gained; the manifest's notes say so
        manifest.next_pools = pools.by_view
    write_report(manifest)
    publish_catalog()
    return manifest.run_id


class Run:
    """One run of the loop: its models, and what one iteration hands to the next beside pools and student."""

    def __init__(self, config: DistillConfig, manifest: Manifest):
        self.config, self.manifest = config, manifest

    def baseline(self, start: Start | None) -> tuple[Pools, Checkpoint]:
        """Before the first iteration: models, pools, and how good the student is without any training."""
        config, record = self.config, self.manifest.baseline
        step = Steps(self.manifest, record)

        seeds = step(load_seeds, config.seeds, *config.seeds.digests())
        self.manifest.seeds = {
            "path": config.seeds.path,
            "rows": seeds.pool.rows,
            "duplicates": seeds.duplicates,
            "near_heldout": seeds.near_heldout,
            "beyond_max_rows": seeds.beyond_max_rows,
        }
        self._remark_on(seeds)
        self.heldout: Snapshot = seeds.heldout
        if start:
            start.check_holds_out(self.heldout)

        check_access_to(config.models().values())
        self.teachers = [
            self._ready(step, model, f"prepare {name}")
            for name, model in config.models().items()
            if name.startswith("teacher")
        ]
        self.generator = self._ready(step, config.generate.model, "prepare generator")
        referee = config.referee
        self.referee = self._ready(step, referee.model, "prepare referee") if isinstance(referee, LLMReferee) else None

        ready = [*self.teachers, self.generator, *filter(None, [self.referee])]
        record.models = list(dict.fromkeys(model.checkpoint for model in ready if model.checkpoint))

        self.heldout_answers = step(
            answer_with_teacher, config.teacher, self.teachers, self.heldout, [], config.seed,
            self._account("teacher", 0),
        )  # fmt: skip
        base = self._ready(step, config.student.model, "prepare student").checkpoint
        assert base is not None, "a student is a model of this machine"
        pruned = config.student.start.init == "pruned"
        self.base: Checkpoint = step(prune_student, config.student.start, base, seeds.pool) if pruned else base

        record.student, record.teacher = self.base, self.teachers[0].checkpoint
        record.snapshots = {"seeds": seeds.pool, "heldout": self.heldout, "heldout_answers": self.heldout_answers}
        record.evaluation = self._evaluate(step, self.base, 0)
        self.standing: Baseline | IterationRecord = record  # whose student goes on
        self.answers: list[Snapshot] = []  # one table: the teacher's to all that was asked so far; at first none
        return Pools(train=seeds.pool, cache=seeds.pool), self.base

    def go_on_from(self, start: Start) -> tuple[Pools, Checkpoint]:
        """The pools and the student that an earlier run ended with, its iterations being part of this run's."""
        self.manifest.iterations = list(start.records)
        measured = self.manifest.baseline.evaluation
        assert measured, "the baseline comes first"
        others = [each for each in start.records if each.evaluation and not same_reference(each.evaluation, measured)]
        for record in others:  # two yardsticks do not go into one row or line
            record.evaluation = None
        if start.same_teacher:
            self.answers = [start.records[-1].snapshots["teacher_responses"]]
        kept = [record for record in start.records if not record.rolled_back]
        if kept:
            # Measured as this run measures, or the next student would be compared by another yardstick.
            self.standing = record = kept[-1]
            assert record.student, "a finished iteration has a student"
            record.evaluation = self._evaluate(Steps(self.manifest, record), record.student, record.iteration)
        if unlike := [record.iteration for record in others if not record.evaluation]:
            warn(
                self.manifest,
                f"Loss and score of iteration {', '.join(map(str, unlike))} are of other answers than this run's, and not shown "
                "here: they are in the run that it goes on from. Earlier gains are of those answers, too.",
            )
        assert self.standing.student
        return start.pools, self.standing.student

    def unanswered_in(self, pools: Pools) -> int:
        """How many rows the teacher is still to be asked. What earlier iterations asked is all but the train pool."""
        return (pools.train if self.answers else pools.cache).rows

    def iterate(self, iteration: int, pools: Pools, student: Checkpoint) -> tuple[Pools, Checkpoint]:
        """One iteration; the next one's pools and student."""
        config, seed = self.config, self.config.seed
        record = IterationRecord(iteration=iteration, train_rows=pools.train.rows, cache_rows=pools.cache.rows)
        self.manifest.iterations.append(record)
        step = Steps(self.manifest, record)
        made = record.snapshots
        made |= pools.by_view

        # IMITATION: the teacher answers, the student learns the answers. The train pool is part of the cache
        # pool, so one call answers both; what earlier iterations asked is not asked again.
        answers = step(
            answer_with_teacher, config.teacher, self.teachers, pools.cache, self.answers, seed,
            self._account("teacher", iteration),
        )  # fmt: skip
        made["teacher_responses"], self.answers = answers, [answers]
        start = student if config.student.init_from == "previous" else self.base
        trained = step(
            finetune_student, config.finetune, start, pools.train, answers, config.student.system_prompt, seed
        )
        made["examples"], record.student = trained.examples, trained.checkpoint
        record.trained_rows, record.left_out, record.training = trained.rows, trained.left_out, trained.figures

        # Did it help? A student that is worse than the one before is not built upon: that one goes on.
        record.evaluation = self._evaluate(step, trained.checkpoint, iteration)
        student = self._standing_student(record)

        # DISCRIMINATION: where does the student still fall behind?
        own = step(answer_with_student, config.student, self._student(student), pools.cache, seed)
        made["student_responses"] = own
        made["reviews"] = step(
            review_responses, config.referee, self.referee, pools.cache, answers, own, seed,
            self._account("referee", iteration),
        )  # fmt: skip
        split = step(discriminate, config.discriminate, made["reviews"])
        made["verdicts"], record.threshold, record.judge = split.verdicts, split.threshold, split.judge
        record.hard, record.easy, record.undecided = split.hard, split.easy, split.undecided

        # GENERATION: more like the hard ones, rarer ones like the easy ones. They are what is learned next.
        generation = step(
            generate_instructions, config.generate, self.generator, pools.cache, split.verdicts, self.heldout,
            seed + iteration, self._account("generator", iteration),
        )  # fmt: skip
        made["candidates"], record.generated = generation.candidates, generation.generated
        following = step(refresh_pools, pools.cache, generation.candidates)
        return following, student

    def is_stalled(self, *, last: bool) -> bool:
        """Whether the last iterations gained nothing, so that the loop ends; unless it ends anyway, the manifest says so."""
        records, stop = self.manifest.iterations, self.config.stop
        stalled = is_stalled(stop, [record.comparison for record in records if record.comparison])
        if stalled and not last:
            records[-1].notes.append(f"stopped: no gain above {stop.min_gain:g} in the last {stop.patience} iterations")
        return stalled

    def _standing_student(self, record: IterationRecord) -> Checkpoint:
        """The student that goes on after this iteration: the new one, or the one before where the new one is worse."""
        before, measure = self.standing, self.config.stop.measure
        assert record.evaluation and before.evaluation, "students are evaluated before they are compared"
        against = before.iteration if isinstance(before, IterationRecord) else 0
        record.comparison = compare(record.evaluation, before.evaluation, against, self.config.seed)
        gain = gain_in(record.comparison, measure)
        if self.config.keep == "best" and is_worse(record.evaluation, before.evaluation, measure, gain):
            record.rolled_back = True
            record.notes.append(
                f"rolled back: this student is worse than that of iteration {against} ({told(gain, measure)}), "
                "which goes on in its place"
            )
        else:
            self.standing = record
        assert self.standing.student
        return self.standing.student

    def _evaluate(self, step: Steps, checkpoint: Checkpoint, iteration: int) -> Evaluation:
        config = self.config
        evaluation: Evaluation = step(
            evaluate_student, config.evaluation, self._student(checkpoint), self.heldout, self.heldout_answers,
            config.student.system_prompt, config.seed,
        )  # fmt: skip
        if self.referee is None or not config.evaluation.by_referee:
            return evaluation
        reviews = step(
            review_responses, config.referee, self.referee, self.heldout, self.heldout_answers, evaluation.details,
            config.seed, self._account("referee", iteration), label="referee, held out",
        )  # fmt: skip
        return evaluation.model_copy(update={"reviews": reviews})

    def _student(self, checkpoint: Checkpoint) -> ReadyModel:
        return ReadyModel(settings=self.config.student.model, checkpoint=checkpoint)

    def _remark_on(self, seeds: SeedPools) -> None:
        """Say what of the seeds may not be as it was meant, while nothing is paid yet."""
        if seeds.passed_over:
            more = ", ".join(f"{what} ({rows:,})" for what, rows in seeds.passed_over.items())
            warn(self.manifest, f"Seeds and held-out instructions hold more than is read, in so many rows: {more}.")
        there = {row["category"] for row in read_rows(seeds.pool, ["category"])}
        wanted = [each.category for each in self.config.teacher.further if each.category]
        if idle := [category for category in wanted if category not in there]:
            warn(self.manifest, f"No seed is of the category {', '.join(idle)}, so that its teacher is asked for none.")

    def _ready(self, step: Steps, settings: ModelSettings, label: str) -> ReadyModel:
        if isinstance(settings, OpenAIModel):
            return ReadyModel(settings=settings)
        checkpoint = step(prepare_model, settings, source_digest(settings), label=label)
        return ReadyModel(settings=settings, checkpoint=checkpoint)

    def _account(self, role: str, iteration: int) -> Account:
        return Account(run_id=self.manifest.run_id, role=role, iteration=iteration, budget=self.config.budget)
