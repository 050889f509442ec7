"""Two and three processes against one: the same bits of statistics, edits and scores; one that dies ends the run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests import ranks, runs, tiny
from tests.tiers import sampled

from nmke.cli import main
from nmke.editors import targets
from nmke.evaluation import target_scores
from nmke.models import ranks as ranks_module
from nmke.models.load import load_model
from nmke.session import EditSession
from nmke.types import EditRequest

SETTINGS = {
    "layers": "1,2", "batch-size": "4", "steps": "3", "lr": "2", "clamp": "8", "context-tokens": "3",
    "corpus": "corpus.txt", "corpus-tokens": "7000", "token-budget": "12", "health-every": "1",
    "method": "nmke-linear", "mask-scope": "batch", "attribution": "lps", "covariance-weight": "0.1", "l2": "0.1",
    "on-collapse": "continue", "temperature": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, facts and a corpus."""
    root = tmp_path_factory.mktemp("ranks")
    tiny.save_tiny(root / "model", runs.loud_llama)
    (root / "corpus.txt").write_text("\n".join(tiny.SENTENCES * 30), encoding="utf-8")
    lines = [json.dumps(as_line(request)) for request in runs.facts(8)]
    (root / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def as_line(request: EditRequest) -> dict[str, object]:
    return {
        "id": request.id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "paraphrases": [f"Therefore {request.text}"],
        "neighborhood": [{"prompt": f"The capital of {request.subject} is", "answer": "Rome"}],
    }


@dataclass(frozen=True)
class Done:
    """What the ranks of one run left."""

    codes: list[int | None]
    root: Path
    seconds: float

    def out(self, rank: int, kind: str = "out") -> str:
        return (self.root / f"{rank}.{kind}").read_text(encoding="utf-8")

    @property
    def result(self) -> dict[str, object]:
        """What rank 0 printed."""
        return json.loads(self.out(0))

    @property
    def statistics(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.root / "cache" / "stats").glob("*.safetensors"))]


def edit(
    place: Path, name: str, size: int, before: Callable[[int], None] = lambda rank: None, *more: str
) -> Done:
    """`nmke edit` as `torchrun --nproc_per_node SIZE -m nmke edit` runs it."""
    root = place / name
    root.mkdir(exist_ok=True)

    def work(rank: int) -> int:
        torch.set_num_threads(1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(place)
        os.environ["NMKE_CACHE"] = str(root / "cache")
        target_scores.MAX_LOGITS = 1 << 14  # so that scoring takes several batches
        if size == 1:
            del os.environ["WORLD_SIZE"]
        before(rank)
        flags = [part for key, value in SETTINGS.items() for part in (f"--{key}", value)]
        code = main.run(["edit", "model", "-f", "facts.jsonl", "-o", f"{name}/run", "--json", *flags, *more])
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    begun = time.monotonic()
    codes = ranks.launch(size, work, root)
    return Done(codes, root, time.monotonic() - begun)


@pytest.fixture(scope="module")
def alone(place: Path) -> Done:
    done = edit(place, "alone", 1)
    assert done.codes == [0], done.out(0, "err")
    return done


def counted(root: Path) -> Callable[[int], None]:
    """Each follower notes the world's size and, for every kind of work, how many results it sent."""

    def before(rank: int) -> None:
        plain = ranks_module._obey

        def obey(payload: bytes, model: object) -> object:
            order = ranks_module._unpacked(payload, "cpu")
            own = len(order.units[rank :: dist.get_world_size()])
            with (root / f"{rank}.work").open("a", encoding="utf-8") as file:
                file.write(f"{dist.get_world_size()} {order.work.__name__} {own}\n")
            return plain(payload, model)

        ranks_module._obey = obey

    return before


def comparable(result: dict[str, object]) -> dict[str, object]:
    """The printed result without times, ids and paths."""
    kept = ("scores", "probes", "content_hash")
    return {key: result[key] for key in kept if key in result}


@pytest.mark.parametrize("size", sampled([2, 3], (2).__eq__))
def test_ranks_give_the_bits_of_one_process(place, alone, size):
    name = f"ranks{size}"
    done = edit(place, name, size, counted(place / name))
    assert done.codes == [0] * size, done.out(0, "err")
    assert done.result["content_hash"] == alone.result["content_hash"]
    assert comparable(done.result) == comparable(alone.result)
    assert done.statistics == alone.statistics and len(alone.statistics) == 2
    for rank in range(1, size):
        assert done.out(rank) == "" and done.out(rank, "err") == ""  # rank 0 alone speaks
        work = [line.split() for line in (done.root / f"{rank}.work").read_text().splitlines()]
        assert {count for count, _, _ in work} == {str(size)}
        did = {name for _, name, own in work if int(own)}
        wanted = {"_gather_stretches", "_optimise_groups", "_score_buckets"}
        assert did >= wanted | ({"_choose_in_layers"} if rank < 2 else set())  # there are two layers
    assert not list(done.root.glob("run/edits/*.tmp"))


@pytest.mark.model
def test_torchrun_itself_gives_the_bits_of_one_process(place, alone):
    flags = [part for key, value in SETTINGS.items() for part in (f"--{key}", value)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "nmke",
    ]
    done = subprocess.run(
        [*command, "edit", "model", "-f", "facts.jsonl", "-o", "torchrun", "--json", *flags],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NMKE_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["content_hash"] == alone.result["content_hash"]


def die(rank: int) -> None:
    if rank == 1:
        at_second_batch(lambda: os._exit(9))


def hang(rank: int) -> None:
    os.environ["NMKE_RANK_TIMEOUT"] = "2"
    if rank == 1:
        at_second_batch(lambda: time.sleep(600))


def at_second_batch(act: Callable[[], None]) -> None:
    plain, calls = targets._optimise_groups, []

    def struck(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            act()
        return plain(*arguments)

    struck.__name__ = plain.__name__
    targets._optimise_groups = struck


@pytest.mark.parametrize("fate", [die, hang])
def test_a_rank_that_is_lost_ends_the_run_with_the_last_batch_safe(place, alone, fate):
    name = fate.__name__
    done = edit(place, name, 2, fate, "--no-eval")
    assert done.codes[0] == 1 and done.seconds < 60
    lost = r"rank 1 of 2 is gone or does not answer"
    assert lost in done.out(0, "err") and "--resume" in done.out(0, "err")
    with EditSession.open(load_model(str(place / "model")), done.root / "run") as session:
        assert session.verify()["events"] == 1
    again = edit(place, name, 1, lambda rank: None, "--resume", "--no-eval")
    assert again.codes == [0], again.out(0, "err")
    assert again.result["content_hash"] == alone.result["content_hash"]
