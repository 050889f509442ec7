"""From what the user named, a model or a run folder, to an open session; nothing is made before it can work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke.cli.console import note, working
from nmke.errors import ConfigError

if TYPE_CHECKING:
    from nmke.config import EditConfig
    from nmke.models.load import EditableModel
    from nmke.session import EditSession
    from nmke.types import EditCase, EditRequest


@dataclass(frozen=True)
class Place:
    """Where a run is or will be.

    Args:
        root: The run folder; None: named after the model once that is loaded.
        model: The model to begin it on, None for a run that exists.
        force: Delete what stands at `root` first.
    """

    root: Path | None
    model: str | None
    force: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that the run was begun with, {} for a new one."""
        from nmke.run_folder import RunFolder

        return {} if self.root is None or self.force else RunFolder(self.root).recipe


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: str = "float32"
    device: str = "auto"
    revision: str | None = None


def is_run(source: str) -> bool:
    """Whether the user named a run folder."""
    return (Path(source) / "nmke.json").is_file()


def run_folder(source: str) -> Path:
    """The run folder that the user named.

    Raises:
        RequestError: If it is none.
    """
    from nmke.run_folder import RunFolder

    return RunFolder.open(Path(source)).root


def find_place(source: str, output: Path | None, *, resume: bool, force: bool) -> Place:
    """Decide where edits go, before anything is loaded.

    Raises:
        ConfigError: If the output exists and neither `resume` nor `force` is given, or they contradict.
    """
    if resume and force:
        raise ConfigError("--resume and --force contradict each other; give one")
    if is_run(source):
        if force or (output is not None and output.resolve() != Path(source).resolve()):
            raise ConfigError(
                f"{source!r} is a run: edits are added to it; leave out --output and --force, "
                "or name the base model to begin another run"
            )
        return Place(Path(source), None)
    if output is None:
        return Place(None, source)
    from nmke.run_folder import is_leftover

    if output.exists() and (not output.is_dir() or any(not is_leftover(path) for path in output.iterdir())):
        _check_existing(source, output, resume=resume, force=force)
        return Place(output, source, force=True) if force else Place(output, None)
    return Place(output, source)


def _check_existing(source: str, output: Path, *, resume: bool, force: bool) -> None:
    if not resume and not force:
        raise ConfigError(
            f"output {str(output)!r} exists; continue it with --resume, replace it with --force, "
            "or choose another folder"
        )
    if not is_run(str(output)):
        raise ConfigError(
            f"output {str(output)!r} exists and is not a run folder, so it is neither continued nor deleted; "
            "choose another folder"
        )
    if resume:
        from nmke.run_folder import RunFolder
        from nmke.run_start import check_source

        check_source(RunFolder.open(output), source)


@contextmanager
def editing(
    place: Place, settings: Mapping[str, Any], loading: Loading, requests: Sequence[EditRequest]
) -> Iterator[EditSession]:
    """The session that edits go to; a run folder begun here is removed again if nothing came of it.

    Args:
        place: Where.
        settings: As `settings.merge` gives them.
        loading: How the model is loaded.
        requests: What will be edited; checked against the model before the folder is made.

    Raises:
        NmkeError: Whatever is wrong with place, settings, model or requests.
    """
    from nmke.attribution import neuron_scores
    from nmke.config import EditConfig
    from nmke.editors import methods
    from nmke.readable import check_editable
    from nmke.session import EditSession, resolve

    config = EditConfig.create(**settings)
    methods.entry(config.method)
    neuron_scores.entry(config.attribution)
    if place.model is None:
        assert place.root is not None
        session, began = open_run(place.root, loading.device, config), False
        check_editable(session.model, requests)
    else:
        model = load(place.model, loading)
        resolve(config, model)
        check_editable(model, requests)
        root = place.root or default_output(model.name)
        with working("preparing the run"):
            session = EditSession.open(
                model, root, config=config, force=place.force, revision=loading.revision
            )
        began = True
    try:
        yield session
    except BaseException:
        if began and session.ledger.last() is None:
            session.close()
            shutil.rmtree(session.folder.root, ignore_errors=True)
        raise
    finally:
        session.close()


def load(source: str, loading: Loading) -> EditableModel:
    """The model, with a word on stderr while it loads."""
    with working(f"loading {source}"):
        from nmke.models.load import load_model

        return load_model(source, dtype=loading.dtype, device=loading.device, revision=loading.revision)


def open_run(root: Path, device: str = "auto", config: EditConfig | None = None) -> EditSession:
    """The session of an existing run; settings are the run's own unless given."""
    from nmke.run_folder import RunFolder

    folder = RunFolder.open(root)
    with working(f"loading {folder.base.name} with the edits of {root}"):
        from nmke.session import EditSession

        return EditSession.resume(folder, config, device=device)


def default_output(name: str) -> Path:
    """A run folder in the current folder, named after model and time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"nmke-run-{name}-{stamp}")


def read_requests(
    prompt: str | None, target: str | None, subject: str | None, facts: Path | None, limit: int | None
) -> list[EditRequest]:
    """The facts that the command line names.

    Raises:
        ConfigError: If it names none, or both ways at once.
        RequestError: If they are malformed.
    """
    if facts is not None:
        if prompt is not None or target is not None:
            raise ConfigError("--facts and --prompt/--target were both given; give one of them")
        return read_file(facts, limit)
    if prompt is None or target is None:
        raise ConfigError(
            "no fact was given; give --prompt 'The capital of {France} is' with --target Lyon, or --facts FILE"
        )
    from nmke.facts import parse_prompt
    from nmke.types import EditRequest

    template, found = parse_prompt(prompt, subject)
    return [EditRequest(template, found, target)]


def read_file(facts: Path, limit: int | None = None) -> list[EditRequest]:
    """The facts of a file or benchmark; says what was guessed and skipped.

    Raises:
        RequestError: If it is missing or malformed; names line and field.
    """
    return [request for case in read_cases(facts, limit) for request in case.requests]


def read_cases(facts: Path, limit: int | None = None) -> list[EditCase]:
    """The cases of a file, or of the benchmark of that name; says what was guessed and skipped.

    Raises:
        RequestError: If it is missing or malformed; names line and field.
    """
    from nmke.evaluation.benchmarks import benchmarks, read_benchmark
    from nmke.facts import read_facts

    if not facts.exists() and str(facts) in benchmarks:
        read = read_benchmark(str(facts), limit=limit)
    else:
        read = read_facts(facts, limit=limit)
    note(f"{read.path}: {len(read.requests)} facts, read as {read.shape!r} ({read.format})")
    for remark in read.notes:
        note(f"note: {remark}")
    return list(read.cases)
