"""The prompts, one a file. `load` reads one; `render` names what is missing instead of leaving a hole."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

_environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's text, with `{{ names }}` to fill in."""

    name: str
    text: str

    def render(self, **values: str | None) -> str:
        """The text with its names filled in.

        Raises:
            jinja2.UndefinedError: the text uses a name that is not given.
        """
        return _environment.from_string(self.text).render(**values)


def load(name: str) -> Prompt:
    """The prompt in the file `name` beside this module."""
    return Prompt(name, (Path(__file__).parent / name).read_text(encoding="utf-8"))
