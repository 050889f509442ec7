"""Targets that were found before are the same bits, and everything they depend on is asked for."""

from typing import Any

import pytest
import torch
from tests import tiny
from tests.exact import exact

from nmke.config import EditConfig
from nmke.editors import known_targets
from nmke.editors.known_targets import KEPT, KnownTargets
from nmke.editors.rows import BareRequest
from nmke.editors.targets import SETTINGS, optimise_targets
from nmke.models.load import EditableModel
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("The mother tongue of {} is", "Marie Curie", "English"),
)
CONFIG = EditConfig.create(steps=2, lr=0.5)
ASKED = {"contexts": CONTEXTS, "layers": (0, 1), "site": "down_proj", "config": CONFIG}
CHANGES: dict[str, dict[str, Any]] = {
    "facts": {"requests": REQUESTS[:1]},
    "order of facts": {"requests": REQUESTS[::-1]},
    "bare prompt only": {"requests": (BareRequest(*vars(REQUESTS[0]).values()), REQUESTS[1])},
    "contexts": {"contexts": CONTEXTS[:1]},
    "layers": {"layers": (0,)},
    "site": {"layers": (1,), "site": "block"},
    "held facts": {"held": (EditRequest("The language of {} is", "France", "Latin"),)},
    "settings": {"config": EditConfig.create(steps=3, lr=0.5)},
}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=3)


def find(known: KnownTargets, model: EditableModel, **changes: Any) -> Any:
    return known(model, **{"requests": REQUESTS, **ASKED, **changes})


def test_what_was_found_before_has_the_same_bits(model: EditableModel) -> None:
    known = KnownTargets()
    first, again = find(known, model), find(known, model)
    fresh = optimise_targets(model, requests=REQUESTS, **ASKED)
    assert known.reused == 1 and again is first
    assert first.seconds > 0
    for layer in fresh.layers:
        assert torch.equal(first.deltas[layer], fresh.deltas[layer])
        assert torch.equal(first.values[layer], fresh.values[layer])
    assert first.losses == fresh.losses


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_sought_anew(model: EditableModel, change: str) -> None:
    known = KnownTargets()
    find(known, model)
    find(known, model, **CHANGES[change])
    assert known.reused == 0


def test_another_model_is_asked_anew(model: EditableModel) -> None:
    known = KnownTargets()
    find(known, model)
    find(known, exact(tiny.tiny_llama, num_hidden_layers=4))
    assert known.reused == 0


def test_settings_of_the_write_do_not_matter(model: EditableModel) -> None:
    known = KnownTargets()
    find(known, model)
    find(known, model, config=EditConfig.create(steps=2, lr=0.5, method="memit", l2=3.0, seed=4))
    assert known.reused == 1


def test_the_optimisation_reads_no_other_setting(model: EditableModel) -> None:
    read = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(CONFIG, name)

    optimise_targets(model, requests=REQUESTS, **{**ASKED, "config": Watched()})
    assert read and read <= set(SETTINGS)


def test_only_the_newest_batches_are_kept(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_targets, "optimise_targets", lambda *args, **more: object())
    known = KnownTargets()
    for number in range(KEPT + 1):
        find(known, model, contexts=("", str(number)))
    find(known, model, contexts=("", "0"))
    find(known, model, contexts=("", str(KEPT)))
    assert known.reused == 1
