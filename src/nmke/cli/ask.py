"""`nmke ask` and `nmke chat`: talk to the edited model, with the unedited one beside it if wanted."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, say
from nmke.cli.opening import open_run, run_folder
from nmke.errors import RequestError

if TYPE_CHECKING:
    from nmke.models.load import EditableModel
    from nmke.session import EditSession

Messages = list[dict[str, str]]
LEAVE = ("/quit", "/exit", "/q")
FORGET = "/new"
# An instruct model's own settings may sample or hold penalties; those are switched off by name.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


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
    if raw or not has_template(model):
        return model.generate([turns[-1]["content"]], tokens)[0].strip()
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    width = given["input_ids"].shape[1]
    if model.context_length is not None and width + tokens > model.context_length:
        raise RequestError(
            f"the conversation has {width} tokens and {tokens} new ones were asked for, {model.name} reads "
            f"{model.context_length}; begin anew or ask for fewer"
        )
    output = model.model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        pad_token_id=model.encoder.pad_id,
        max_new_tokens=tokens,
        **GREEDY,
    )
    return str(model.tokenizer.decode(output[0, width:], skip_special_tokens=True)).strip()


def base_reply(session: EditSession, turns: Messages, tokens: int, *, raw: bool = False) -> str:
    """The unedited model's answer."""
    with session.base():
        return reply(session.model, turns, tokens, raw=raw)


def has_template(model: EditableModel) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


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
