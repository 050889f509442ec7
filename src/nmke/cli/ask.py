"""`nmke ask` and `nmke chat`: talk to the edited model, with the unedited one beside it if wanted."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, say
from nmke.cli.opening import open_run, run_folder

if TYPE_CHECKING:
    from nmke.models.load import EditableModel
    from nmke.session import EditSession

Messages = list[dict[str, str]]
LEAVE = ("/quit", "/exit", "/q")
FORGET = "/new"


def ask(
    run: options.Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say to the model.")],
    compare: Annotated[bool, typer.Option("--compare", help="Show the unedited model's answer too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer.")] = 64,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Ask the edited model one thing; greedy."""
    with closing(open_run(run_folder(run), device)) as session:
        turns: Messages = [{"role": "user", "content": prompt}]
        edited = reply(session.model, turns, tokens, raw=raw)
        base = base_reply(session, turns, tokens, raw=raw) if compare else None
        if as_json:
            print_json(
                {"schema": "nmke.ask/1", "run": run, "prompt": prompt, "answer": edited, "base_answer": base}
            )
        elif base is None:
            say(edited)
        else:
            fact("base", base)
            fact("edited", edited)


def chat(
    run: options.Run,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the unedited model's answers too.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer.")] = 128,
    device: options.Device = "auto",
) -> None:
    """Chat with the edited model; greedy. Without a chat template it continues each line on its own."""
    from nmke.models.chat import has_template

    with closing(open_run(run_folder(run), device)) as session:
        if not has_template(session.model):
            note(f"{session.model.name} has no chat template: every line is continued as plain text")
        note(f"type a message; {FORGET} begins anew, {LEAVE[0]} or Ctrl-D leaves")
        turns: Messages = []
        base_turns: Messages = []
        while (line := _read_line()) is not None:
            if line == FORGET:
                turns, base_turns = [], []
                continue
            if compare:
                base_turns.append({"role": "user", "content": line})
                answer = base_reply(session, base_turns, tokens)
                base_turns.append({"role": "assistant", "content": answer})
                fact("base", answer)
            turns.append({"role": "user", "content": line})
            answer = reply(session.model, turns, tokens)
            turns.append({"role": "assistant", "content": answer})
            fact("edited", answer)


def reply(model: EditableModel, turns: Messages, tokens: int, *, raw: bool = False) -> str:
    """The model's greedy answer to the last turn."""
    from nmke.models.chat import reply as answer
    from nmke.models.generate import Decoding

    return answer(model, turns, Decoding(tokens), raw=raw).text


def base_reply(session: EditSession, turns: Messages, tokens: int, *, raw: bool = False) -> str:
    """The unedited model's answer."""
    with session.base():
        return reply(session.model, turns, tokens, raw=raw)


def _read_line() -> str | None:
    """The next line that says something, None at the end."""
    import sys

    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() in LEAVE:
            return None
        if line.strip():
            return line.strip()
