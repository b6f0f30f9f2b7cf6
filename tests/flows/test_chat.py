"""`lion chat`: a conversation in the terminal."""

from pathlib import Path

from tests.lion import lion


def test_what_is_too_long_is_said_and_the_conversation_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    command = ["chat", str(tiny_model), "--temperature=0", "--max-tokens=8"]
    words = lion(tmp_path, *command, typed="Name a bird.\nAnd a tree.\n").stdout
    talk = "Name a bird.\n" + "water " * 600 + "\nAnd a tree.\n/new\nName a bird.\n/quit\nnot read\n"
    done = lion(tmp_path, *command, typed=talk)
    assert "more than the model's context holds" in done.stderr
    assert done.stdout.startswith(words)  # as if it had not been said
    first, _ = words.split("\n", 1)
    assert done.stdout == f"{words}{first}\n"
