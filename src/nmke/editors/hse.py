"""HSE's history weight: earlier edits bind the solve with a weight that does not depend on how few they are.

Source: Fang et al. 2025, "Hippocampal-like Sequential Editing", NeurIPS 2025: the i-th edit solves
δ Kᵀ (C0 + αᵢ Σ_{j<i} kⱼ kⱼᵀ + K Kᵀ)⁻¹ with αᵢ = n/(i − 1).
Differs: n, the length of the stream, is not known while it runs: 1000, as in the paper's experiments, and αᵢ never
falls below 1. Its other two parts, the unlikelihood loss of the old answer and the Fisher penalty, are left out.
"""

from __future__ import annotations

from nmke.editors.stabilisers import Stabiliser, stabilisers

STREAM = 1000

stabilisers.register(
    "hse",
    Stabiliser(history=STREAM),
    source="NeurIPS 2025, Hippocampal-like Sequential Editing",
    summary="the keys of earlier edits weigh as much as 1000 of them",
    doc=__doc__,
)
