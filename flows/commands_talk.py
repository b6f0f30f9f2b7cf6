"""Commands to talk to a student: chat, serve."""

import sys
from typing import Annotated

import typer

from flows.terminal import CheckpointName, Home, escaped, note, out, use_home

commands = typer.Typer()


@commands.command()
def chat(
    student: CheckpointName = None,
    system: Annotated[str | None, typer.Option("--system", help="Said before the conversation.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=32768, help="Of an answer, at most.")] = 512,
    home: Home = None,
) -> None:
    """Talk to a student in the terminal; its words come as it finds them. /new starts over, /quit ends."""
    use_home(home)
    from flows.students import find_student
    from tasks.models.chat import Sampling
    from tasks.models.local import LocalModel
    from tasks.models.session import Session

    found = find_student(student)
    settings = LocalModel.model_validate(found.config["student"]["model"]) if found.config else LocalModel()
    system = system or (found.config["student"]["system_prompt"] if found.config else None)
    opening = [{"role": "system", "content": system}] if system else []
    said = list(opening)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    note.print(f"{escaped(found.name)}. /new starts over, /quit ends.", soft_wrap=True)
    with Session(settings, found.checkpoint) as session:
        while (line := _asked()) not in {None, "/quit"}:
            if line == "/new":
                said = list(opening)
            elif line:
                said.append({"role": "user", "content": line})
                answer = ""
                for piece in session.answer(said, sampling):
                    answer += piece
                    out.print(piece, end="", markup=False, soft_wrap=True)
                    out.file.flush()
                out.print()
                said.append({"role": "assistant", "content": answer})


def _asked() -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@commands.command()
def serve(student: CheckpointName = None, home: Home = None) -> None:
    """Print the lines that serve a checkpoint behind an OpenAI-compatible API, with vLLM and with transformers."""
    use_home(home)
    from flows.students import find_student

    for line in serve_lines(str(find_student(student).checkpoint.path)):
        print(line)


def serve_lines(path: str) -> list[str]:
    """The command of each server, to type as it is."""
    return [f"vllm serve {path} --served-model-name student", f"transformers serve --force-model {path}"]
