"""R-ROME: ROME with one key throughout.

Source: Gupta et al. 2024, arXiv:2403.07175: in ΔW = (v* − W k) (C⁻¹k)ᵀ / (kᵀ C⁻¹ k) every k is the mean key over
contexts; ROME's own code takes the bare prompt's key in some places, which makes rare edits explode.
Differs: `rome` here takes the bare prompt's key only for the old value W k, so that it lies between the two.
"""

from __future__ import annotations

from nmke.editors.method import STATISTICS, Method, methods
from nmke.editors.rome import Rome

methods.register(
    "r-rome",
    Method(
        Rome(),
        defaults={"l2": 0.0, "batch_size": 1},
        max_batch=1,
        max_layers=1,
        remembers=False,
        value_at="mean",
    ),
    source="arXiv:2403.07175",
    summary="ROME with the mean key throughout",
    needs=(STATISTICS,),
    doc=__doc__,
)
