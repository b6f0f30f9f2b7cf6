"""Does the method help? The loop beside two simpler ways to spend the same teacher tokens.

    adversarial         the loop as it is
    random-generation   new instructions are grown from parents drawn by lot, whatever the referee found
    imitation-only      no new instructions: so many more seeds are answered and trained on instead

Every arm of a seed starts from the same student and is looked at on the same held-out instructions.
"""

import math
from collections import defaultdict
from typing import Any

from flows.config import ConfigError, DistillConfig
from flows.distill import distill
from storage.pools import by_id
from storage.runs import Evaluation, Interval, IterationRecord, Manifest, load_manifest
from tasks.relative import paired
from tasks.seed import usable_seeds

ARMS = ("adversarial", "random-generation", "imitation-only")


def ablate(config: DistillConfig, arms: list[str], seeds: int) -> list[dict[str, Any]]:
    """Run every arm with every seed from the settings' own on; a row an arm, the adversarial one first. What has been run
    before is found again.

    Raises:
        ConfigError: an arm is unknown, there are too few seed instructions for the arm that uses nothing else, or its
            rows would be those that an earlier run left.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"no arm {unknown[0]!r}. There are: {', '.join(ARMS)}.")
    if config.start_from != "base":
        raise ConfigError(
            f"start_from: arms that spend as much on other seeds begin from them, not from {config.start_from}. Leave it at base."
        )
    config = _with_seeds_to_spare(config)
    found: dict[str, list[Manifest]] = defaultdict(list)
    for seed in range(config.seed, config.seed + seeds):
        adversarial = _ran(config, "adversarial", seed)  # always: it says how many tokens the others may have
        for arm in dict.fromkeys(["adversarial", *arms]):
            found[arm].append(adversarial if arm == "adversarial" else _ran(config, arm, seed, adversarial))
    return [_row(arm, manifests, found["adversarial"]) for arm, manifests in found.items()]


def teacher_tokens(manifest: Manifest) -> int:
    """Tokens of the teacher's answers that a run trained on."""
    return sum(tokens for record in manifest.iterations for tokens in _answer_tokens(record))


def _answer_tokens(record: IterationRecord) -> list[int]:
    answers = by_id(record.snapshots["teacher_responses"], ["completion_tokens"])
    trained = by_id(record.snapshots["examples"], [])
    return [answers[key]["completion_tokens"] for key in trained]


def _with_seeds_to_spare(config: DistillConfig) -> DistillConfig:
    """The settings with so few seeds that as many as the loop generates are left for imitation alone."""
    available = len(usable_seeds(config.seeds.model_copy(update={"max_rows": None})).rows)
    generated = (config.generate.hard_rows + config.generate.easy_rows) * (config.iterations - 1)
    rows = min(config.seeds.max_rows or available, available - generated)
    if rows < 1:
        raise ConfigError(
            f"{config.seeds.path} has {available} seeds that are near no held-out instruction, and imitation alone needs more than the {generated} that the "
            "loop generates. Give more seeds, or lower generate.hard_rows and generate.easy_rows."
        )
    return config.model_copy(update={"seeds": config.seeds.model_copy(update={"max_rows": rows})})


def _ran(config: DistillConfig, arm: str, seed: int, adversarial: Manifest | None = None) -> Manifest:
    """The finished run of one arm."""
    changes: dict[str, Any] = {"name": f"{config.name[:20]}-{arm}", "seed": seed}
    if arm == "random-generation":
        changes["generate"] = config.generate.model_copy(update={"parents": "random"})
    if arm == "imitation-only":
        assert adversarial is not None
        first = adversarial.iterations[0]  # of whose seeds some may have had no answer worth training on
        rows = round(teacher_tokens(adversarial) / (sum(_answer_tokens(first)) / first.train_rows))
        changes |= {
            "iterations": 1,
            "seeds": config.seeds.model_copy(update={"max_rows": rows}),
            "generate": config.generate.model_copy(update={"hard_rows": 0, "easy_rows": 0}),
        }
    wanted = config.model_copy(update=changes)
    manifest = load_manifest(wanted.run_id)
    if manifest is None or manifest.state != "completed" or not manifest.is_whole():
        distill(wanted)
        manifest = load_manifest(wanted.run_id)
    assert manifest is not None
    return manifest


def _row(arm: str, manifests: list[Manifest], adversarial: list[Manifest]) -> dict[str, Any]:
    mine, other = [_best(manifest) for manifest in manifests], [_best(manifest) for manifest in adversarial]
    losses = [evaluation.loss for evaluation in mine if evaluation.loss is not None]
    return {
        "arm": arm,
        "seeds": len(manifests),
        "teacher_tokens": round(sum(map(teacher_tokens, manifests)) / len(manifests)),
        "loss": _mean([mine], "loss_sum"),
        "loss_by_seed": [round(loss, 4) for loss in losses],
        "score": _mean([mine], "score"),
        "loss_over_adversarial": None if arm == "adversarial" else _mean([mine, other], "loss_sum"),
        "score_over_adversarial": None if arm == "adversarial" else _mean([mine, other], "score"),
    }


def _best(manifest: Manifest) -> Evaluation:
    best = manifest.best()
    assert best, "a finished run has students"
    return manifest.evaluations()[best[0]]


def _mean(arms: list[list[Evaluation]], column: str) -> Interval | None:
    """The mean of a figure over seeds and questions, or the difference of two arms; resampled by question.

    A question counts with its mean over the seeds, so that the interval is that of another set of questions; how
    far the seeds lie apart stands beside it.
    """
    sums = [_sums(evaluations, column) for evaluations in arms]
    keys = sorted(set.intersection(*map(set, sums)))
    figures = [{key: value / weight for key, (value, weight) in some.items()} for some in sums]
    # A token's loss, weighted by how many tokens the first arm's answer has; the other arm's are as many, but for
    # answers that a sampling teacher gave otherwise with another seed, and one seed lacks.
    weights = [sums[0][key][1] / len(arms[0]) for key in keys]
    differences = [figures[0][key] - (figures[1][key] if len(arms) > 1 else 0) for key in keys]
    if not all(map(math.isfinite, differences)):
        return None  # a student that broke
    return paired([weight * each for weight, each in zip(weights, differences, strict=True)], weights)


def _sums(evaluations: list[Evaluation], column: str) -> dict[str, tuple[float, float]]:
    """A figure by question, summed over the seeds, and what it is to be divided by."""
    found: dict[str, tuple[float, float]] = {}
    for evaluation in evaluations:
        for key, row in by_id(evaluation.details, ["tokens", column]).items():
            weight = row["tokens"] if column == "loss_sum" else 1
            if row[column] is not None and weight:
                value, before = found.get(key, (0.0, 0))
                found[key] = value + row[column], before + weight
    return found
