"""The `nmke` command: verbs, errors and exit codes. torch is imported inside commands, never here."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

import nmke
from nmke.cli import (
    apply,
    ask,
    bench,
    cache,
    data,
    demo,
    diff,
    doctor,
    edit,
    evaluate,
    export,
    history,
    inspect,
    neurons,
    prepare,
    report,
    reproduce,
    retry,
    studio,
    undo,
    verify,
)
from nmke.cli.console import note, printable, stderr
from nmke.cli.ranks import among_ranks
from nmke.errors import NmkeError, is_out_of_memory

INTERRUPTED = 130
OUT_OF_MEMORY = 5
USAGE = 2
SMALLER_PLAN = "try --dtype bfloat16, --batch-size 1, --token-budget 512, fewer --layers; or another --device"
# typer brings its own copy of click, or uses the installed one, depending on its version.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="nmke",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First steps: nmke demo; nmke doctor MODEL; nmke edit MODEL -p 'The capital of {France} is' -t Lyon",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nmke {nmke.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="With any verb: show where an error comes from.")
    ] = False,
) -> None:
    """Edit facts in open-weights language models: lifelong, measured, reversible."""


VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "doctor": doctor.doctor,
    "prepare": prepare.prepare,
    "edit": edit.edit,
    "eval": evaluate.evaluate,
    "log": history.log,
    "show": history.show,
    "undo": undo.undo,
    "revert": undo.revert,
    "retry": retry.retry,
    "diff": diff.diff,
    "neurons": neurons.neurons,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "reproduce": reproduce.reproduce,
    "ask": ask.ask,
    "chat": ask.chat,
    "report": report.report,
    "studio": studio.studio,
    "export": export.export,
    "apply": apply.apply,
}
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows `nmke` on the command line; None takes it from there.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 bad input, 4 model not supported, 5 out of memory,
        6 edit did not take (strict), 7 verify mismatch, 130 interrupted after a saved checkpoint.
    """
    # Threads that spin while they wait make two slower than one on a busy machine, threads that sleep at once
    # lose a tenth on a quiet one: so they spin for some microseconds. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    trace = "--traceback" in given[:end]
    words = [word for word in given[:end] if word != "--traceback"] + given[end:]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _quiet_third_parties():
        try:
            with among_ranks() as follows:
                code = 0 if follows else app(words, prog_name="nmke", standalone_mode=False)
        except BaseException as error:
            if trace:
                traceback.print_exc()
            return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Print one line about an error; its exit code."""
    if isinstance(error, NmkeError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, ClickError):
        return _usage(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        note("interrupted; what was saved stays")
        return INTERRUPTED
    if is_out_of_memory(error):
        return _fail(f"out of memory: {error or type(error).__name__}; {SMALLER_PLAN}", OUT_OF_MEMORY)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - nobody reads any more
        return 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _fail(f"the disk is full ({error}); nothing half-written is kept, free space and run again", 1)
    if isinstance(error, OSError):
        return _fail(f"{error}; check that the path exists and can be read and written", 1)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    kind = type(error).__name__
    return _fail(f"unexpected {kind}: {error}; run again with --traceback and report what it shows", 1)


def _usage(error: Exception) -> int:
    """One line about a wrong command line; bare `nmke VERB` shows the verb's help instead."""
    message = str(getattr(error, "format_message", error.__str__)())
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "nmke"
    if type(error).__name__ == "NoArgsIsHelpError" or not message:
        return USAGE
    return _fail(f"{message.rstrip('.')}; `{where} --help` lists what there is", USAGE)


def _fail(message: str, code: int) -> int:
    line = printable(" ".join(message.split()))
    stderr().print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


@contextmanager
def _quiet_third_parties() -> Iterator[None]:
    """Our own messages on stderr, other libraries' warnings nowhere, unless Python was started with -W."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ours, others, nowhere = logging.getLogger("nmke"), logging.getLogger(), logging.NullHandler()
    level = ours.level
    ours.setLevel(logging.INFO)
    ours.addHandler(handler := _Messages())
    others.addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(handler)
        others.removeHandler(nowhere)
        ours.setLevel(level)


class _Messages(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        serious = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if serious else ""
        note(prefix + record.getMessage(), "yellow" if serious else "dim")
