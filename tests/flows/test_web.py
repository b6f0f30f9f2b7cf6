"""The pages in a real browser: voted with keys alone, streamed side by side, and no request leaves the machine."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from flows.cli import app
from flows.web import demo_app, human_app
from tasks.human import HumanStudy, Item, new_study, results, votes_of
from tasks.models.session import ConversationTooLong
from tasks.report import write_report
from tests.browser import by_itself, needs_chromium, picture, served
from tests.recorded import record_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium


@pytest.fixture
def study(home: Path) -> HumanStudy:
    texts = {"q1": "Explain <b>tides</b> & moons.", "q2": "Name a prime number."}
    items = [
        Item(item=key, instruction=text, input=None, a=f"alpha {key}", b=f"beta {key}") for key, text in texts.items()
    ]
    return new_study("student", "gpt", items, seed=1)


def begin(page: "Page", address: str, name: str) -> None:
    """Open the page of a study as a voter."""
    page.goto(address)
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.locator("#vote").wait_for()


def says(page: "Page", place: str, text: str) -> None:
    """Wait until a place of the page says this."""
    page.locator(place).get_by_text(text).wait_for()


def press(page: "Page", key: str, votes: int) -> None:
    """Vote with a key, and wait until the page has so many votes."""
    page.keyboard.press(key)
    page.wait_for_function("votes => items.flatMap(item => Object.keys(item.votes)).length === votes", arg=votes)


def test_a_person_votes_with_the_keyboard_and_can_go_back(study: HumanStudy, page: "Page", tmp_path: Path) -> None:
    with served(human_app(study)) as address, by_itself(page, address):
        begin(page, address, "ann")
        assert page.locator("#ask").text_content() == study.items[0].instruction, "text, not markup"
        picture(page, "human-eval", tmp_path)
        for number, key in enumerate(("1", "ArrowDown", "ArrowRight"), 1):
            press(page, key, number)
            assert len(votes_of(study)) == number, "a vote that the page shows is on disk"
        says(page, "#count", "2 of 2, 1 done")
        page.keyboard.press("Backspace")
        says(page, "#count", "1 of 2")
        page.keyboard.press("3")  # another mind about the first aspect
        says(page, "#count", "2 of 2")
        assert {vote.choice for vote in votes_of(study).values() if vote.aspect == "helpful"} == {"second"}
        # Another voter on the same study; the first one's votes are their own.
        begin(page, address, "bob")
        says(page, "#count", "1 of 2, 0 done")
    assert results(study)["helpful"].votes == 1


def test_the_next_answers_are_read_from_their_beginning_and_a_key_held_down_is_one_vote(
    home: Path, page: "Page"
) -> None:
    long = "line\n" * 200
    study = new_study("a", "b", [Item(item=f"q{n}", instruction="?", input=None, a=long, b=long) for n in range(9)], 0)
    scrolled = "[...document.querySelectorAll('.pair section')].map(text => text.scrollTop)"
    with served(human_app(study)) as address:
        begin(page, address, "ann")
        page.evaluate("document.querySelectorAll('.pair section').forEach(text => text.scrollTop = 700)")
        press(page, "1", 1)
        assert page.evaluate(scrolled) == [700, 700], "on the same item the reader stays where they are"
        press(page, "1", 2)
        press(page, "1", 3)
        assert page.evaluate(scrolled) == [0, 0]
        for _ in range(9):  # the keyboard repeats a key that is held down
            page.keyboard.down("2")
            page.wait_for_function("() => !busy")
        page.keyboard.up("2")
        press(page, "3", 5)
    assert [vote.choice for vote in votes_of(study).values()] == ["first"] * 3 + ["tie", "second"]


@pytest.mark.parametrize(("name", "code"), [("127.0.0.1:8765", 200), ("localhost:8765", 200), ("evil.example", 400)])
def test_a_page_answers_to_no_other_name_than_this_machines(study: HumanStudy, name: str, code: int) -> None:
    page = TestClient(human_app(study), base_url=f"http://{name}")
    assert page.get("/api/items", params={"voter": "ann"}).status_code == code


def test_the_votes_of_the_page_are_in_the_report(study: HumanStudy, page: "Page") -> None:
    with served(human_app(study)) as address:
        begin(page, address, "ann")
        for number in range(1, 7):
            press(page, "2", number)
        page.locator("#done").wait_for()
    done = CliRunner().invoke(app, ["human-eval", "report", "--json"])
    assert json.loads(done.stdout)["aspects"]["harmless"]["ties"] == 2


def test_the_demo_streams_student_and_teacher_side_by_side(page: "Page", tmp_path: Path) -> None:
    seen = threading.Event()  # the first word is on the page

    def answer(words: str, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        if len(messages) > 3:
            raise ConversationTooLong("it is too long")
        first, *others = f"{words} to turn {len(messages)}".split()
        yield first + " "
        seen.wait(60)
        yield " ".join(others)

    def of(words: str) -> object:
        return lambda messages: answer(words, messages)

    app = demo_app(
        {"student": of("Small answer"), "teacher": of("Large answer")}, {"student": "mine/2", "teacher": "big"}
    )  # type: ignore[dict-item]
    with served(app) as address, by_itself(page, address):
        page.goto(address)
        page.keyboard.type("Hello?")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('student').lastChild?.textContent === 'Small '")
        seen.set()
        says(page, "#teacher", "Large answer to turn 1")
        page.wait_for_function("() => busy === 0")
        page.keyboard.type("And more?")
        page.keyboard.press("Enter")
        says(page, "#student", "Small answer to turn 3")
        page.wait_for_function("() => busy === 0")
        page.keyboard.type("And then?")
        page.keyboard.press("Enter")
        says(page, "#teacher", "No answer: it is too long")
        picture(page, "demo", tmp_path)
        assert page.locator("#name-student").text_content() == "mine/2"


def test_the_report_opens_without_network_in_light_and_in_dark(home: Path, page: "Page", tmp_path: Path) -> None:
    address = write_report(record_run()).as_uri()
    with by_itself(page, "file:"):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(address)
            picture(page, f"report-{scheme}", tmp_path)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(21, 24, 28)") == (scheme == "dark")
            assert page.locator("svg").count() >= 6
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
