"""What a run shows in the Prefect UI."""

import pytest
from markdown_it import MarkdownIt

from flows.artifacts import cell


@pytest.mark.parametrize(
    "text",
    [
        "![](http://evil.example/x.png)",
        "![x][y]\n\n[y]: http://evil.example/x.png",
        "[click](javascript:alert(1)) [click](http://evil.example) <http://evil.example>",
        '<img src="http://evil.example/x.png">',
    ],
)
def test_a_strangers_text_in_a_table_fetches_no_picture_and_is_no_link(text: str) -> None:
    tags = ("<img", "<a ")
    read = MarkdownIt().render
    assert any(tag in read(text) for tag in tags)
    assert not any(tag in read(cell(text)) for tag in tags)
    assert cell(text).replace("\u2060", "") == text
