"""The training stage alone, on a file of answers: without a teacher, without the loop."""

from flows.config import DistillConfig
from storage.pools import write_snapshot
from tasks.finetune import VERSION, NothingToTrainOn, TrainedStudent, examples_of, train_student
from tasks.policies import within_limits
from tasks.prepare import SAMPLE_PROMPTS, base_model, prune_by_prompts
from tasks.seed import read_records


def finetune_on_file(settings: DistillConfig, data: str) -> TrainedStudent:
    """Fine-tune the settings' student on the rows of a file. Interrupted, the same call goes on.

    Args:
        data: rows with answers, Alpaca or messages, in any form that seeds have.

    Raises:
        SeedError, NothingToTrainOn: the file cannot be used.
        JobError: the trainer ended without a result.
    """
    student = settings.student
    place, records = read_records(data)
    rows = examples_of(((f"{place}, {where}", record) for where, record in records), student.system_prompt)
    if not rows:
        raise NothingToTrainOn(f"{place}: no row in it, so nothing to train on.")
    examples = write_snapshot("examples", rows, step="finetune", version=VERSION)
    base = base_model(student.model)
    if student.start.init == "pruned":
        base = prune_by_prompts(student.start, base, [row["messages"] for row in rows[:SAMPLE_PROMPTS]])
    return within_limits(train_student)(settings.finetune.training, base, examples, settings.seed)
