"""How far a long stage is, told in lines."""

import pytest

from tasks import progress


def test_the_time_that_is_left_is_reckoned_from_what_was_done_since_the_first_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    clock = iter([0, 100, 110, 120])
    monkeypatch.setattr(progress, "tell", said.append)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress._lines("rows") as show:
        show(80, 100, {})  # a hundred seconds of start-up, and eighty rows of an earlier attempt
        show(82, 100, {})  # a moment after a line: nothing is said
        show(90, 100, {})
    assert [line.strip() for line in said] == ["rows 80/100", "rows 90/100, about 20 s left"]
