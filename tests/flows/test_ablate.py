"""The ablation on a tiny model: every arm is run, with as many teacher tokens, and found again."""

import json
from pathlib import Path

import pytest

from storage.pools import write_snapshot
from storage.runs import Evaluation
from tasks.seed import read_seeds
from tests.lion import arguments, lion
from tests.recorded import record_run

SETTINGS = (
    # The tiny model hardly ever ends a line.
    '--set=generate.sampling={temperature: 1.0, max_tokens: 24, stop: ["e"]}',
    "--set=generate.max_attempts=8",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_arm_has_its_figures_and_about_as_many_teacher_tokens(tmp_path: Path, tiny_model: Path) -> None:
    command = [
        "ablate",
        *arguments(tiny_model)[1:],
        *SETTINGS,
        "--seeds=1",
        "--arms=adversarial,imitation-only",
        "--set=iterations=1",
        "--json",
    ]
    rows = json.loads(lion(tmp_path, *command).stdout)
    assert [row["arm"] for row in rows] == ["adversarial", "imitation-only"]
    tokens = [row["teacher_tokens"] for row in rows]
    assert max(tokens) <= 1.2 * min(tokens)
    assert all(row["loss"]["low"] <= row["loss"]["value"] <= row["loss"]["high"] for row in rows)
    assert rows[0]["loss_over_adversarial"] is None
    for row in rows[1:]:
        difference = row["loss"]["value"] - rows[0]["loss"]["value"]
        assert row["loss_over_adversarial"]["value"] == pytest.approx(difference)


def test_a_mean_over_seeds_is_per_token_whatever_the_order_of_the_seeds(home: Path) -> None:
    from flows.ablate import _mean

    def evaluation(loss: float, tokens: int) -> Evaluation:
        rows = [{"instruction_id": "a", "status": "ok", "loss_sum": loss * tokens, "tokens": tokens, "score": 5.0}]
        details = write_snapshot("evaluations", rows, step="test", version=1)
        return Evaluation(loss=loss, score=5.0, rows=1, scored=1, details=details)

    short, long = evaluation(1.0, 10), evaluation(2.0, 30)  # the teacher samples: another answer with each seed
    means = [_mean([arm], "loss_sum") for arm in ([short, long], [long, short])]
    assert [mean and mean.value for mean in means] == [pytest.approx(70 / 40)] * 2
    worse = _mean([[evaluation(2.0, 10), evaluation(3.0, 30)], [long, short]], "loss_sum")
    assert worse and worse.value == pytest.approx(1.0)
    score = _mean([[short, long]], "score")
    assert score and score.value == pytest.approx(5.0)


def test_a_student_that_broke_has_no_mean_loss(home: Path) -> None:
    from flows.ablate import _mean

    rows = [
        {"instruction_id": key, "status": "ok", "loss_sum": loss, "tokens": 10, "score": 5.0}
        for key, loss in (("a", 20.0), ("b", float("nan")))
    ]
    broken = Evaluation(
        loss=None, score=5.0, rows=2, scored=2, details=write_snapshot("evaluations", rows, step="test", version=1)
    )
    assert _mean([[broken]], "loss_sum") is None
    assert _mean([[broken]], "score") is not None


def test_seeds_that_enter_no_pool_are_not_to_spare(home: Path, tmp_path: Path) -> None:
    from flows.ablate import _with_seeds_to_spare
    from flows.config import ConfigError, resolve

    near = [
        f"{row['instruction']} Please." for row in read_seeds("bundled", "heldout.jsonl").rows[:6]
    ]  # as many as smoke holds out
    texts = [row["instruction"] for row in read_seeds("bundled").rows[:20]] + near
    (tmp_path / "seeds.txt").write_text("".join(f"{text}\n" for text in texts))
    settings = [f"seeds.path={tmp_path / 'seeds.txt'}", "seeds.max_rows=null", "iterations=2"]
    config = resolve("smoke", [*settings, "generate.hard_rows=8", "generate.easy_rows=4"])
    assert _with_seeds_to_spare(config).seeds.max_rows == 20 - 12
    with pytest.raises(ConfigError, match="has 20 seeds that are near no held-out"):
        _with_seeds_to_spare(resolve("smoke", [*settings, "generate.hard_rows=20"]))


def test_seeds_are_counted_from_the_one_that_is_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import ablate
    from flows.config import resolve

    ran: list[tuple[str, int]] = []
    monkeypatch.setattr(ablate, "_ran", lambda config, arm, seed, *_: ran.append((arm, seed)))
    monkeypatch.setattr(ablate, "_row", lambda *_: {})
    ablate.ablate(resolve("smoke", ["seed=3"]), ["random-generation"], 2)
    assert ran == [(arm, seed) for seed in (3, 4) for arm in ("adversarial", "random-generation")]


def test_imitation_alone_has_seeds_for_as_many_tokens_though_some_answers_are_not_trained_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import ablate
    from flows.config import DistillConfig, resolve

    run, asked = record_run(), list[DistillConfig]()  # of three seeds two have an answer
    monkeypatch.setattr(ablate, "load_manifest", lambda _: run if asked else None)
    monkeypatch.setattr(ablate, "distill", asked.append)
    ablate._ran(resolve("smoke"), "imitation-only", 0, run)
    assert asked[0].seeds.max_rows == 3


@pytest.mark.parametrize("start", ["latest", "run:smoke-1"])
def test_arms_do_not_begin_where_another_run_ended(home: Path, start: str) -> None:
    from flows.ablate import ablate
    from flows.config import ConfigError, resolve

    with pytest.raises(ConfigError, match=f"not from {start}"):
        ablate(resolve("smoke", [f"start_from={start}"]), ["imitation-only"], 1)


def test_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    done = lion(tmp_path, "ablate", "--preset", "smoke", "--arms", "magic", code=2)
    assert "no arm 'magic'" in " ".join(done.stderr.split())
