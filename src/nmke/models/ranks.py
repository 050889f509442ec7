"""Several processes share the work on one model; the result is that of one process, bit for bit.

Rank 0 runs the program: it alone holds the run, writes files and prints. The other ranks follow it: they load
the same model, take over each changed column of it, and do their part of a list of *units*. What a unit is (a
group of edits, a stretch of text, a layer) never depends on how many ranks there are, and results are used in
the order of the units, so that floating-point sums come out alike. Messages go through gloo, over host memory.

Nothing here is state of ours: the process group is torch's, what a follower was sent is kept on the model.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nmke.errors import NmkeError, RankError
from nmke.models.load import EditableModel, load_model
from nmke.models.updates import put_back
from nmke.types import Columns, MatrixPlace

TIMEOUT = "NMKE_RANK_TIMEOUT"  # seconds that a rank may leave another one waiting
DEFAULT_TIMEOUT = 1800.0
PIECE = 1 << 30  # bytes of one message
CURE = "what was saved stays; run the same command with --resume"

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Work = Callable[..., Iterator[Result]]


@dataclass(frozen=True)
class Order:
    """What a follower is to do.

    Args:
        source: The model, as `load_model` takes it.
        device: "cpu" or "cuda": each rank uses its own.
        dtype: As `load_model` takes it.
        revision: Of a hub model.
        fingerprint: Of the unedited weights.
        fresh: Whether followers hold another model, or none.
        changes: By matrix, what was written since the last order; since the model was loaded for a fresh one.
        work: A function of a module: the model, units and `given` to one result after another.
        units: All of them; a follower takes every `size`-th.
        given: What every unit needs.
    """

    source: str
    device: str
    dtype: str
    revision: str | None
    fingerprint: str
    fresh: bool
    changes: Mapping[MatrixPlace, Columns]
    work: Work[Any]
    units: Sequence[Any]
    given: tuple[Any, ...]


@dataclass(frozen=True)
class Failure:
    """An error in place of a unit's result; the rank sends nothing after it."""

    error: BaseException


def world_size() -> int:
    """How many ranks work together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined(rank: int, size: int) -> Iterator[None]:
    """Join the other ranks, as the environment of `torchrun` says; rank 0 sends them home at the end.

    Raises:
        RankError: If the ranks do not find each other, or are not as many as asked.
    """
    seconds = float(os.environ.get(TIMEOUT, DEFAULT_TIMEOUT))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {size} found no process group ({error}); start the ranks with torchrun"
        ) from error
    if world_size() != size:
        raise RankError(f"{size} ranks were asked for, {world_size()} came; start them with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    orders = _Orders()
    try:
        yield
    finally:
        if rank == 0:
            orders.send_home()
        dist.destroy_process_group()


def follow() -> None:
    """Do what rank 0 orders until it sends the others home.

    Raises:
        RankError: If rank 0 is gone, or the model cannot be had.
    """
    orders = _Orders()
    model: EditableModel | None = None
    try:
        while (payload := orders.receive()) is not None:
            model = _obey(payload, model)
    except RuntimeError as error:
        rank, size = dist.get_rank(), dist.get_world_size()
        raise RankError(f"rank {rank} of {size} lost rank 0 ({_first(error)}); {CURE}") from error


def shared_out(
    model: EditableModel, work: Work[Result], units: Sequence[Unit], *given: Any, **local: Any
) -> Iterator[Result]:
    """What `work(model, units, *given)` gives, one result per unit and in their order, made by all ranks.

    Args:
        model: The model as it is now; ranks that follow are brought to the same weights first.
        work: A generator function of a module (not a closure): it is named to the other ranks, not sent.
        units: Pieces of work that do not depend on each other; the same whatever the number of ranks.
        given: Further arguments of `work`, the same for every unit.
        local: Further arguments that it gets in this process only, such as progress to report to.

    Raises:
        RankError: If a rank is gone or does not answer in time.
    """
    if not _leads() or len(units) < 2 or not _can_follow(model):
        yield from work(model, units, *given, **local)
        return
    size = world_size()
    orders = _Orders()
    fresh = not orders.already(model.mirror.name)
    orders.send(_packed(_order(model, work, units, given, fresh)))
    own = work(model, units[::size], *given, **local)
    waiting = {rank: len(units[rank::size]) for rank in range(1, size)}
    try:
        for index in range(len(units)):
            rank = index % size
            yield next(own) if rank == 0 else _result(rank, waiting, model.device)
    finally:  # an error or an early end: what the others still send must not be taken for later results
        for rank in list(waiting):
            while waiting[rank]:
                _take(rank, waiting, model.device)


def _leads() -> bool:
    """Whether this is rank 0 of several; what a follower does, it does alone."""
    return world_size() > 1 and dist.get_rank() == 0


def _can_follow(model: EditableModel) -> bool:
    """Whether another process can load this model and write what was written here.

    Hooks (side memories, adapters, prompts) change what it says beside its weights.
    """
    plain = not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    return plain and model.loadable


def _order(
    model: EditableModel, work: Work[Any], units: Sequence[Any], given: tuple[Any, ...], fresh: bool
) -> Order:
    if fresh:
        model.mirror.sent.clear()
    changes = model.mirror.changes(model.layout.layers, model.unedited)
    dtype = str(model.dtype).removeprefix("torch.")
    place = (model.source, model.device.type, dtype, model.revision, model.fingerprint)
    return Order(*place, fresh, changes, work, units, given)


def _obey(payload: bytes, model: EditableModel | None) -> EditableModel:
    """Do one follower's part of an order; the model it now holds.

    Raises:
        RankError: If the model cannot be had; rank 0 is told, and what is left of this rank is of no use.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    order: Order = _unpacked(payload, "cpu")
    left = len(order.units[rank::size])
    try:
        model = _brought_to(order, model)
    except Exception as error:
        if left:
            _send(_packed(Failure(_portable(error))))
        raise
    try:
        given = order.given if model.device.type == "cpu" else _unpacked(payload, str(model.device)).given
        for result in order.work(model, order.units[rank::size], *given):
            _send(_packed(result))
            left -= 1
    except RankError:
        raise
    except Exception as error:  # whatever it is, rank 0 must hear of it and go on or not
        if left:
            _send(_packed(Failure(_portable(error))))
    return model


def _brought_to(order: Order, model: EditableModel | None) -> EditableModel:
    """The model of the order with everything written that rank 0 has written."""
    if model is None or order.fresh:
        model = load_model(order.source, dtype=order.dtype, device=order.device, revision=order.revision)
        if model.fingerprint != order.fingerprint:
            raise RankError(
                f"{order.source!r} has weights {model.fingerprint[:12]} on rank {dist.get_rank()}, "
                f"{order.fingerprint[:12]} on rank 0; give every rank the same files"
            )
    put_back(model.layout, order.changes)
    return model


def _result(rank: int, waiting: dict[int, int], device: torch.device) -> Any:
    found = _take(rank, waiting, device)
    if isinstance(found, Failure):
        raise found.error
    return found


def _take(rank: int, waiting: dict[int, int], device: torch.device) -> Any:
    """One message of a follower."""
    try:
        payload = _receive(rank)
    except RuntimeError as error:
        waiting.update(dict.fromkeys(waiting, 0))
        size = dist.get_world_size()
        raise RankError(
            f"rank {rank} of {size} is gone or does not answer ({_first(error)}); {CURE}"
        ) from error
    found = _unpacked(payload, str(device))
    waiting[rank] = 0 if isinstance(found, Failure) else waiting[rank] - 1
    return found


class _Orders:
    """Announced in the store, where a follower may wait for hours, then broadcast."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store()

    def already(self, name: str) -> bool:
        """Whether the followers hold the model of this name; from the next order on they do."""
        before = self._store.compare_set("nmke/model", "", "")
        self._store.set("nmke/model", name)
        return before == name.encode()

    def send(self, payload: bytes) -> None:
        """To every follower."""
        self._announce(str(len(payload)))
        try:
            for piece in _as_tensor(payload).split(PIECE):
                dist.broadcast(piece, 0)
        except RuntimeError as error:
            raise RankError(f"a rank is gone or does not answer ({_first(error)}); {CURE}") from error

    def send_home(self) -> None:
        """Tell every follower that there is nothing left to do; those that are gone are gone."""
        with suppress(RuntimeError):
            self._announce("0")

    def _announce(self, size: str) -> None:
        self._store.set(f"nmke/order/{self._store.add('nmke/orders', 1)}", size)

    def receive(self) -> bytes | None:
        """The next order, waiting for as long as it takes; None when there will be none."""
        key = f"nmke/order/{self._store.add(f'nmke/seen/{dist.get_rank()}', 1)}"
        while not self._store.check([key]):
            with suppress(dist.DistStoreError):  # rank 0 is busy with something of its own
                self._store.wait([key], timedelta(seconds=60))
        data = torch.empty(int(self._store.get(key)), dtype=torch.uint8)
        for piece in data.split(PIECE) if len(data) else ():
            dist.broadcast(piece, 0)
        return data.numpy().tobytes() or None


def _as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _send(payload: bytes) -> None:
    """To rank 0."""
    data = _as_tensor(payload)
    dist.send(torch.tensor([len(data)]), 0)
    for piece in data.split(PIECE):
        dist.send(piece, 0)


def _receive(rank: int) -> bytes:
    length = torch.zeros(1, dtype=torch.long)
    dist.recv(length, rank)
    data = torch.empty(int(length), dtype=torch.uint8)
    for piece in data.split(PIECE):
        dist.recv(piece, rank)
    return data.numpy().tobytes()


def _packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpacked(payload: bytes, device: str) -> Any:
    # Between processes of one job, started by one user on one program; files are never read this way.
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=False)


def _portable(error: Exception) -> Exception:
    """One of our own errors itself, if it can be sent; else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        known = isinstance(error, NmkeError)
    except (pickle.PickleError, TypeError, AttributeError):
        known = False
    return error if known else RankError(f"rank {dist.get_rank()}: {type(error).__name__}: {_first(error)}")


def _first(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0][:200]
