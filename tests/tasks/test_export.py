"""Exports hold what the run holds, in each form's own words, with lineage and licence."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from storage.pools import instruction_id, read_rows, write_snapshot
from storage.runs import Manifest
from tasks.export import NothingToExport, export
from tasks.finetune import examples_of
from tests.recorded import IDS, SEEDS, checkpoint, instructions, record_run, snapshot


@pytest.fixture
def run(home: Path) -> Manifest:
    return record_run()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["instruction_id"]: row for row in rows}


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_training_set_has_what_was_answered_and_a_pool_has_all(run: Manifest, tmp_path: Path) -> None:
    assert export(run, "messages", tmp_path / "a.jsonl") == 2
    row = by_id(lines(tmp_path / "a.jsonl"))[IDS[0]]
    assert row["messages"] == [
        {"role": "user", "content": SEEDS[0]},
        {"role": "assistant", "content": "Rayleigh scattering."},
    ]
    assert (row["origin"], row["iteration"], row["run_id"]) == ("seed", 1, "recorded-1")
    assert (row["teacher"], row["teacher_license"]) == ("t", "apache-2.0")
    assert export(run, "messages", tmp_path / "b.jsonl", "cache_pool") == 3
    assert len(by_id(lines(tmp_path / "b.jsonl"))[IDS[2]]["messages"]) == 1, "no answer was made up"


def test_alpaca_and_sharegpt_have_their_own_names(run: Manifest, tmp_path: Path) -> None:
    export(run, "alpaca", tmp_path / "a.json")
    alpaca = by_id(json.loads((tmp_path / "a.json").read_text()))[IDS[1]]
    assert [alpaca[key] for key in ("instruction", "input", "output")] == [SEEDS[1], "", "2, 3 and 5."]
    export(run, "sharegpt", tmp_path / "s.json")
    talk = by_id(json.loads((tmp_path / "s.json").read_text()))[IDS[1]]["conversations"]
    assert talk == [{"from": "human", "value": SEEDS[1]}, {"from": "gpt", "value": "2, 3 and 5."}]


def test_the_systems_words_are_those_of_training(home: Path, tmp_path: Path) -> None:
    export(record_run("other", None, "student.system_prompt=Be brief."), "messages", tmp_path / "a.jsonl")
    assert lines(tmp_path / "a.jsonl")[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_preference_needs_reviews_that_agree_in_both_orders(run: Manifest, tmp_path: Path) -> None:
    export(run, "dpo", tmp_path / "d.jsonl")
    (pair,) = lines(tmp_path / "d.jsonl")  # the second row's reviews disagree, the third lacks one
    assert pair["prompt"] == [{"role": "user", "content": SEEDS[0]}]
    assert pair["chosen"] == [{"role": "assistant", "content": "Rayleigh scattering."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "It is blue."}]
    assert (pair["teacher_score"], pair["student_score"]) == (8.5, 4.5)


def test_parquet_has_a_row_an_instruction(run: Manifest, tmp_path: Path) -> None:
    export(run, "parquet", tmp_path / "p.parquet", "train_pool")
    rows = by_id(pq.read_table(tmp_path / "p.parquet").to_pylist())
    assert (rows[IDS[0]]["output"], rows[IDS[2]]["output"]) == ("Rayleigh scattering.", None)


def test_what_is_not_there_is_refused(run: Manifest, tmp_path: Path) -> None:
    with pytest.raises(NothingToExport, match="has no row for training of iteration 7"):
        export(run, "messages", tmp_path / "a.jsonl", iteration=7)
    assert not (tmp_path / "a.jsonl").exists()


def test_exports_load_with_datasets_unchanged(run: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export(run, "hf", tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert by_id(list(loaded))[IDS[0]]["messages"][1]["content"] == "Rayleigh scattering."
    card = (tmp_path / "set" / "README.md").read_text()
    assert head_of(card)["license"] == "apache-2.0" and "| `teacher`" in card
    for form, name in (("messages", "m.jsonl"), ("dpo", "d.jsonl"), ("alpaca", "a.json"), ("sharegpt", "s.json")):
        rows = export(run, form, tmp_path / name)  # type: ignore[arg-type]
        files = str(tmp_path / name)
        loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == rows


def test_an_answer_of_a_pool_that_was_cut_or_refused_is_marked_so(run: Manifest, tmp_path: Path) -> None:
    answers = run.iterations[0].snapshots["teacher_responses"]
    cut = [row | {"status": status} for row, status in zip(read_rows(answers), ("truncated", "refused", "failed"))]
    run.iterations[0].snapshots["teacher_responses"] = write_snapshot("responses", cut, step="teacher", version=1)
    assert export(run, "messages", tmp_path / "before.jsonl", "cache_pool") == 3
    run.save()
    export(run, "messages", tmp_path / "a.jsonl", "cache_pool")
    assert [row["whole"] for row in lines(tmp_path / "a.jsonl")] == [False] * 3
    assert by_id(lines(tmp_path / "before.jsonl"))[IDS[0]]["whole"]
    asked = [(str(number), row) for number, row in enumerate(lines(tmp_path / "a.jsonl")) if len(row["messages"]) > 1]
    assert [row["whole"] for row in examples_of(asked, None)] == [False, False], "lion finetune teaches no end of these"


@pytest.mark.parametrize("terms", ["CC BY-NC 4.0: ask first", "see #3", "'quoted'", "no", "null"])
def test_a_card_has_whatever_terms_are_stated(home: Path, tmp_path: Path, terms: str) -> None:
    run = record_run("other", None, f"teacher.license={json.dumps(terms)}")
    export(run, "hf", tmp_path / "set")
    assert head_of((tmp_path / "set" / "README.md").read_text())["license"] == terms.lower()


def test_a_row_names_any_teacher_of_this_machine_by_what_it_was_prepared_from(run: Manifest, tmp_path: Path) -> None:
    job = checkpoint("d1").path / "job.json"
    job.write_text('{"source": "Qwen/Qwen2.5-1.5B-Instruct"}')
    rows = [row | {"model": "d1"} for row in read_rows(run.iterations[0].snapshots["teacher_responses"])]
    run.iterations[0].snapshots["teacher_responses"] = write_snapshot("responses", rows, step="teacher", version=1)
    run.save()
    export(run, "messages", tmp_path / "rows.jsonl")
    assert {row["teacher"] for row in lines(tmp_path / "rows.jsonl")} == {"Qwen/Qwen2.5-1.5B-Instruct"}


def test_a_card_names_every_teacher(run: Manifest, tmp_path: Path) -> None:
    answers = run.iterations[0].snapshots["teacher_responses"]
    rows = [row | {"model": model} for row, model in zip(read_rows(answers), "tuv")]
    run.iterations[0].snapshots["teacher_responses"] = write_snapshot("responses", rows, step="teacher", version=1)
    run.save()
    export(run, "hf", tmp_path / "set", "cache_pool")
    assert set(re.findall(r"Teacher: (\w), (\w), (\w)\.", (tmp_path / "set" / "README.md").read_text())[0]) == set(
        "tuv"
    )


@pytest.mark.slow
def test_exports_train_with_trl_unchanged(run: Manifest, tmp_path: Path, tiny_model: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    trl = pytest.importorskip("trl", reason="needs trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(run, "hf", tmp_path / "set")
    export(run, "dpo", tmp_path / "pairs.jsonl")
    cache = str(tmp_path / "cache")
    sets = {
        "SFT": datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=cache),
        "DPO": datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=cache),
    }
    for kind, data in sets.items():
        options = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / kind), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(tiny_model), args=options, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )  # fmt: skip
        assert trainer.train().global_step == 1


def test_an_instruction_of_several_iterations_counts_for_the_first_and_has_its_latest_answer(
    run: Manifest, tmp_path: Path
) -> None:
    first = run.iterations[0]
    later = [row | {"response": f"Later: {row['response']}"} for row in read_rows(first.snapshots["teacher_responses"])]
    answers = write_snapshot("responses", later, step="teacher", version=1)
    again = {"iteration": 2, "snapshots": first.snapshots | {"teacher_responses": answers}}
    run.iterations.append(first.model_copy(update=again))
    run.save()
    export(run, "messages", tmp_path / "a.jsonl", "cache_pool")
    row = by_id(lines(tmp_path / "a.jsonl"))[IDS[0]]
    assert (row["iteration"], row["messages"][-1]["content"]) == (1, "Later: Rayleigh scattering.")
    export(run, "dpo", tmp_path / "d.jsonl")
    (pair,) = lines(tmp_path / "d.jsonl")
    assert (pair["iteration"], pair["chosen"][0]["content"]) == (2, "Later: Rayleigh scattering.")


def test_what_was_trained_on_has_the_answer_that_was_learned_though_another_teacher_answered_all_again(
    run: Manifest, tmp_path: Path
) -> None:
    first = run.iterations[0]
    answers = read_rows(first.snapshots["teacher_responses"])
    again = [row | {"model": "another", "response": "Another's.", "status": "truncated"} for row in answers]
    grown = instruction_id("Why is the sea blue?", None)
    pool = [*read_rows(first.snapshots["cache_pool"]), *instructions(["Why is the sea blue?"], "hard")]
    made = {
        "train_pool": snapshot("instructions", pool[-1:], "refresh"),
        "cache_pool": snapshot("instructions", pool, "refresh"),
        "teacher_responses": snapshot("responses", [*again, again[0] | {"instruction_id": grown}], "teacher"),
        "examples": snapshot("examples", [read_rows(first.snapshots["examples"])[0] | {"instruction_id": grown}], "ft"),
    }
    run.iterations.append(first.model_copy(update={"iteration": 2, "snapshots": first.snapshots | made}))
    run.save()
    assert export(run, "messages", tmp_path / "a.jsonl") == 3
    rows = by_id(lines(tmp_path / "a.jsonl"))
    seed = rows[IDS[0]]
    assert (seed["messages"][-1]["content"], seed["teacher"], seed["whole"]) == ("Rayleigh scattering.", "t", True)
    assert (rows[grown]["messages"][-1]["content"], rows[grown]["teacher"]) == ("Another's.", "another")
    export(run, "messages", tmp_path / "b.jsonl", iteration=1)
    assert by_id(lines(tmp_path / "b.jsonl"))[IDS[0]] == seed


@pytest.mark.parametrize("changed", [{"status": "truncated"}, {"status": "refused"}, {"response": "It is blue."}])
def test_nothing_is_preferred_that_was_cut_or_refused_or_is_what_the_student_said(
    run: Manifest, tmp_path: Path, changed: dict[str, str]
) -> None:
    run.config["finetune"]["train_on_truncated"] = False
    assert export(run, "dpo", tmp_path / "d.jsonl") == 1
    rows = [row | changed for row in read_rows(run.iterations[0].snapshots["teacher_responses"])]
    run.iterations[0].snapshots["teacher_responses"] = write_snapshot("responses", rows, step="teacher", version=1)
    run.save()
    with pytest.raises(NothingToExport):
        export(run, "dpo", tmp_path / "d.jsonl")


@pytest.mark.parametrize("form", ["messages", "dpo"])
def test_another_run_of_the_same_seeds_is_not_in_it(run: Manifest, tmp_path: Path, form: Any) -> None:
    export(run, form, tmp_path / "alone.jsonl")
    other = record_run("other-1")
    for iteration in (0, 1, 2):
        other.iterations[0].iteration = iteration
        other.save()
        export(run, form, tmp_path / "beside.jsonl")
        assert lines(tmp_path / "beside.jsonl") == lines(tmp_path / "alone.jsonl")


def test_what_the_trainer_left_out_was_not_trained_on(run: Manifest, tmp_path: Path) -> None:
    run.iterations[0].training["left_out"] = {"no_label": [IDS[0]], "empty": []}
    assert export(run, "messages", tmp_path / "a.jsonl") == 1
    assert by_id(lines(tmp_path / "a.jsonl")).keys() == {IDS[1]}


def test_an_iteration_that_was_rolled_back_is_exported_only_by_its_number(run: Manifest, tmp_path: Path) -> None:
    run.iterations[0].rolled_back = True  # the student before any training stands
    with pytest.raises(NothingToExport):
        export(run, "messages", tmp_path / "a.jsonl")
    assert export(run, "messages", tmp_path / "a.jsonl", iteration=1) == 2
