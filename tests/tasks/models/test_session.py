"""Talking to a local model: the words come in pieces, and one conversation does not run into the next."""

from pathlib import Path

import pytest

from storage.files import Checkpoint
from tasks.models.chat import Request, Sampling
from tasks.models.local import LocalModel, answer_locally
from tasks.models.session import ConversationTooLong, Session, SessionError

GREEDY = Sampling(temperature=0, max_tokens=24)
ASKED = [{"role": "user", "content": "Explain the water cycle."}]


def test_an_answer_comes_in_pieces_and_is_the_one_that_the_engine_gives(checkpoint: Checkpoint) -> None:
    settings = LocalModel(precision="fp32")
    request = Request(id="a", messages=tuple(ASKED))
    (reply,) = answer_locally(settings, checkpoint, [request], GREEDY, seed=0, on_progress=lambda *_: None)
    with Session(settings, checkpoint) as session:
        pieces = list(session.answer(ASKED, GREEDY))
        assert len(pieces) > 3
        assert "".join(pieces) == reply.text
        # Whoever stops listening does not leave the rest of the answer to the next one.
        next(session.answer(ASKED, GREEDY))
        assert "".join(session.answer(ASKED, GREEDY)) == reply.text
        with pytest.raises(ConversationTooLong, match="more than the model's context holds"):
            list(session.answer([{"role": "user", "content": "water " * 600}], GREEDY))
        assert "".join(session.answer(ASKED, GREEDY)) == reply.text


def test_a_process_that_ends_says_why(home: Path) -> None:
    gone = Checkpoint(digest="nothing", content="")
    with (
        Session(LocalModel(), gone) as session,
        pytest.raises(SessionError, match=r"process ended: OSError: .*nothing"),
    ):
        list(session.answer(ASKED, GREEDY))


def test_a_process_that_ended_before_it_was_asked_says_why(home: Path) -> None:
    gone = Checkpoint(digest="nothing", content="")
    with (
        pytest.raises(SessionError, match=r"process ended: OSError: .*nothing"),
        Session(LocalModel(), gone) as session,
    ):
        session._child.wait()
        list(session.answer(ASKED, GREEDY))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weights_in_few_bits_answer_as_in_the_engine(checkpoint: Checkpoint, bits: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install -e '.[gpu]')")
    settings = LocalModel(precision="fp32", quantization=bits)  # type: ignore[arg-type]
    request = Request(id="a", messages=tuple(ASKED))
    (reply,) = answer_locally(settings, checkpoint, [request], GREEDY, seed=0, on_progress=lambda *_: None)
    with Session(settings, checkpoint) as session:
        assert "".join(session.answer(ASKED, GREEDY)) == reply.text
