"""One schema a table. Whoever writes a row writes all its columns; whoever reads one finds them here.

No table carries clock time, which would change its digest: times and usage live in the journal and the log.
"""

import pyarrow as pa

text = pa.string()

INSTRUCTIONS = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),  # digest of instruction and input
        pa.field("instruction", text, nullable=False),
        pa.field("input", text),  # null where the instruction stands alone
        pa.field("category", text),
        pa.field("origin", text, nullable=False),  # seed, heldout, question, hard (grown from a hard parent), easy
        pa.field("parent_id", text),  # null for a seed; of a question's later turn the turn before
        pa.field("output", text),  # the seed file's own answer, kept aside: nothing trains on it
    ]
)

RESPONSES = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),
        pa.field("role", text, nullable=False),  # teacher, student
        pa.field("model", text, nullable=False),  # as the endpoint names it, or the checkpoint's digest
        pa.field("status", text, nullable=False),  # tasks.models.chat.Status
        pa.field("finish_reason", text),
        pa.field("response", text),  # null where there is no answer
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("error", text),
    ]
)

REVIEWS = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),
        pa.field("order", text, nullable=False),  # teacher_first, student_first, unordered (a metric has no order)
        pa.field("vote", pa.int32(), nullable=False),  # several draws of one order are averaged
        pa.field("outcome", text, nullable=False),  # ok, unparsable, out_of_range, truncated, refused, missing, failed
        pa.field("teacher_score", pa.float64()),  # 1..10, null unless outcome is ok
        pa.field("student_score", pa.float64()),
        pa.field("evidence", text),  # what the referee said before it scored
    ]
)

VERDICTS = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),
        pa.field("teacher_score", pa.float64()),  # mean over orders and votes, null where a review is missing
        pa.field("student_score", pa.float64()),
        pa.field("score_gap", pa.float64()),  # teacher - student
        pa.field("threshold", pa.float64()),  # the gap from which a row is hard, in this iteration
        pa.field("difficulty", text, nullable=False),  # hard, easy, undecided
        pa.field("reason", text),  # why undecided: missing_review, weak_teacher
    ]
)

CANDIDATES = pa.schema(
    [
        pa.field("instruction_id", text),  # null where nothing came that could be one
        pa.field("parent_id", text, nullable=False),
        pa.field("side", text, nullable=False),  # hard, easy: the parent's difficulty
        pa.field("draw", pa.int32(), nullable=False),  # which try of this parent
        pa.field("instruction", text),
        pa.field("input", text),
        pa.field("category", text),
        pa.field("rejection", text),  # null where accepted; tasks.novelty.Rejection
        pa.field("near_id", text),  # the instruction it is a near duplicate of
        pa.field("similarity", pa.float64()),  # ROUGE-L F to that one
    ]
)

EVALUATIONS = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),
        pa.field("response", text),  # the student's
        pa.field("status", text, nullable=False),
        pa.field("loss_sum", pa.float64()),  # nats, over the teacher's answer; null where it could not be scored
        pa.field("tokens", pa.int32(), nullable=False),  # of the teacher's answer
        pa.field("score", pa.float64()),  # 1..10 against the teacher's answer, null without an answer
    ]
)

EXAMPLES = pa.schema(
    [
        pa.field("instruction_id", text, nullable=False),
        pa.field("messages", pa.list_(pa.struct([("role", text), ("content", text)])), nullable=False),
        pa.field("response", text, nullable=False),
        pa.field("whole", pa.bool_(), nullable=False),  # false: the teacher's answer was cut at its own limit
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "instructions": INSTRUCTIONS,
    "responses": RESPONSES,
    "reviews": REVIEWS,
    "verdicts": VERDICTS,
    "candidates": CANDIDATES,
    "evaluations": EVALUATIONS,
    "examples": EXAMPLES,
}
