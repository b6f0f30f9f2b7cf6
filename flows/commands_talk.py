"""Commands to talk to a student: chat, demo, serve, and to have it answer a file."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flows.terminal import A_CHECKPOINT, ALONE, USE, CheckpointName, Home, Refusal, check_is_new, note, out, use_home
from storage.files import write_json_lines, write_json_list

if TYPE_CHECKING:
    from flows.web import Answer

commands = typer.Typer()

Temperature = Annotated[float, typer.Option("--temperature", min=0, max=2, help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, max=32768, help="Of an answer, at most.")]

WRITERS = {".jsonl": write_json_lines, ".json": write_json_list}


@commands.command(rich_help_panel=USE)
def chat(
    student: CheckpointName = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="Said before the conversation, in place of the student's own; empty: nothing."),
    ] = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 512,
    home: Home = None,
) -> None:
    """Talk to a student in the terminal; its words come as it finds them. /new starts over, /quit ends."""
    use_home(home)
    from flows.students import find_student
    from tasks.models.chat import Sampling, opening
    from tasks.models.session import ConversationTooLong, Session

    found = find_student(student)
    said = begun = opening(found.system_prompt if system is None else system)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    note.print(f"{found.name}. /new starts over, /quit ends.", soft_wrap=True)
    with Session(found.model, found.checkpoint) as session:
        while (line := _asked()) not in {None, "/quit"}:
            if line == "/new":
                said = begun
            elif line:
                asked = [*said, {"role": "user", "content": line}]
                answer = ""
                try:
                    for piece in session.answer(asked, sampling):
                        answer += piece
                        out.print(piece, end="", soft_wrap=True)
                        out.file.flush()
                except ConversationTooLong as error:
                    note.print(f"{error}: /new")
                    continue
                out.print()
                said = [*asked, {"role": "assistant", "content": answer}]


@commands.command(rich_help_panel=USE)
def demo(
    student: CheckpointName = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="A checkpoint, named as a student is; by default the teacher of its run."),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8766,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 256,
    home: Home = None,
) -> None:
    """Open a page on which student and teacher answer side by side."""
    use_home(home)
    from contextlib import ExitStack

    from flows.students import Student, find_student
    from flows.web import demo_app
    from flows.web import serve as serve_page
    from tasks.models.chat import Sampling, opening
    from tasks.models.local import LocalModel
    from tasks.models.session import Session

    found = find_student(student)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    config = found.config.get("teacher", {}) if teacher is None else {}
    model = config.get("model", {"kind": "local"})
    if model["kind"] != "local":
        raise Refusal("The teacher is behind an API, and a demo would spend money unseen: name one with --teacher.")
    settings = LocalModel.model_validate(model)
    other = find_student(teacher or settings.model_name_or_path)
    with ExitStack() as open_sessions:

        def answers_of(one: Student, settings: LocalModel, system_prompt: str | None) -> "Answer":
            session = open_sessions.enter_context(Session(settings, one.checkpoint))
            return lambda said: session.answer([*opening(system_prompt), *said], sampling)

        answers = {"student": answers_of(found, found.model, found.system_prompt)}
        if config:  # the run's teacher, as it was asked
            answers["teacher"] = answers_of(other, settings, config["system_prompt"])
        else:
            answers["teacher"] = answers_of(other, other.model, other.system_prompt)
        note.print(f"http://127.0.0.1:{port}  (Ctrl-C ends)")
        serve_page(demo_app(answers, {"student": found.name, "teacher": other.name}), port)


def _asked() -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@commands.command(rich_help_panel=USE)
def serve(student: CheckpointName = None, home: Home = None) -> None:
    """Print the lines that serve a checkpoint behind an OpenAI-compatible API, with vLLM and with transformers."""
    use_home(home)
    from flows.students import find_student

    for line in serve_lines(str(find_student(student).checkpoint.path)):
        print(line)


def serve_lines(path: str) -> list[str]:
    """The command of each server, to type as it is."""
    model = shlex.quote(path)
    return [f"vllm serve {model} --served-model-name student", f"transformers serve {model}"]


@commands.command(rich_help_panel=ALONE)
def answer(
    data: Annotated[
        str, typer.Option("--data", help="Instructions: Alpaca, messages or plain lines; .json, .jsonl, .csv, .txt, …")
    ],
    to: Annotated[Path, typer.Option("--out", help="The rows with their answers: a new .jsonl or .json.")],
    model: Annotated[str | None, typer.Option("--model", help=A_CHECKPOINT)] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="Said before every instruction, in place of the model's own; empty: nothing."),
    ] = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the model: engine=vllm, shards=2, precision=fp32."
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Have a model answer every row of a file. Interrupted, the same command goes on."""
    if to.suffix not in WRITERS:
        raise Refusal(f"--out {to}: name a file that ends in {', '.join(WRITERS)}.")
    check_is_new(to)
    use_home(home)
    from flows.answer import answer_rows, read_asked
    from flows.config import changed
    from flows.students import find_student
    from tasks.models.chat import Sampling

    asked = read_asked(data)  # a file that cannot be used is refused before a model is fetched
    if longer := sum(len(row.get("turns") or []) > 1 for row, _ in asked):  # FastChat's question.jsonl
        note.print(
            Text("note:", "yellow"),
            f"Rows with several `turns`: {longer:,}. The first is asked alone; lion evaluate --questions {data} asks them all.",
            soft_wrap=True,
        )
    found = find_student(model)
    settings = changed(found.model, overrides or [])
    rows = answer_rows(
        settings,
        found.checkpoint,
        asked,
        Sampling(temperature=temperature, max_tokens=max_tokens),
        found.system_prompt if system is None else system,
        seed,
    )
    WRITERS[to.suffix](to, rows)
    counts = Counter(row["status"] for row in rows)
    note.print(f"{found.name}: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    out.print(str(to), soft_wrap=True)
