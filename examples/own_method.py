"""Write your own editing method: one solver. Everything else (targets, keys, masks, undo, export) is there already.

python examples/own_method.py [MODEL]
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nmke import EditableModel, EditConfig, EditSession
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.editors.solve import solve_positive
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask


@dataclass(frozen=True)
class LeastSquares:
    """X = (K Kᵀ + λI)⁻¹ K with one row of K per edit: writes along the keys, protects nothing."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        part = keys if keep is None else keys * keep.to(keys)
        system = part @ part.T + config.l2 * torch.eye(len(part), dtype=part.dtype, device=part.device)
        return solve_positive(system, part, what="K Kᵀ + λI", cure="raise `l2`")


if "least-squares" not in methods:
    methods.register(
        "least-squares",
        Method(LeastSquares(), defaults={"l2": 1.0}, remembers=False),
        source="this file",
        summary="writes along the keys, protects nothing",
        needs=(STATISTICS,),  # key statistics are gathered first
    )


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    config = config or EditConfig.create(method="least-squares")
    with EditSession.open(model, folder / "run", config=config) as session:
        record = session.edit("The capital of {France} is", "Lyon")
        was, now = record.detail["probability_before"], record.detail["probability_after"]
        print(f"\n{session.config.method}: p(Lyon) {was:.4f} -> {now:.4f}")
        print(
            f"layers {list(session.config.layers or ())}, drift {max(session.log()[-1].body['drift'].values()):.3f}"
        )
        session.undo()
        print(f"undo, verify, export and the benchmarks know it too: {session.changed() == []}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
