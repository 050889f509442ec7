"""ENCORE's stop: an edit is optimised no further than until its answer is the most probable one.

Source: Gupta et al. 2025, arXiv:2502.01636: the optimisation of a target value ends once every token of the answer
is the argmax in every context, on two steps in a row.
Differs: its other part, a penalty on the norm of the update, is the setting `l2` of every method here and is left to
the user. The other stops (`stop_loss`, `steps`) hold as well.
"""

from __future__ import annotations

from nmke.editors.stabilisers import Stabiliser, stabilisers

stabilisers.register(
    "encore",
    Stabiliser(defaults={"stop_argmax": 2}),
    source="arXiv:2502.01636",
    summary="stop the optimisation once the answer is the argmax in every context on two steps",
    doc=__doc__,
)
