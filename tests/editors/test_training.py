"""What trained methods share: losses, hooks, and that the model is left alone."""

import pytest
import torch
from tests import tiny
from tests.editors.test_pipeline import REQUESTS, assert_untouched, snapshot
from tests.exact import exact
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.training import (
    added_to_output,
    answer_log_probabilities,
    answer_rows,
    at_answers,
    edit_losses,
    fit,
    only_at_answers,
)
from nmke.errors import NumericsError, RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest


@pytest.fixture
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=4)


def literal_loss(model: EditableModel, request: EditRequest) -> float:
    prompt = model.encoder.encode(request.text)
    answer = model.encoder.encode_target(request.text, request.target_new)
    total = 0.0
    for count in range(len(answer)):
        with torch.no_grad():
            logits = model.model(torch.tensor([[*prompt, *answer[:count]]])).logits[0, -1]
        total -= float(torch.log_softmax(logits, 0)[answer[count]])
    return total / len(answer)


@pytest.mark.parametrize("budget", [8, 4096])
def test_losses_are_those_of_the_answers_token_by_token(budget, model):
    losses = {}
    for group in answer_rows(model, REQUESTS, budget):
        losses |= dict(zip(group.edits, edit_losses(model, group).tolist(), strict=True))
    assert losses == {i: pytest.approx(literal_loss(model, r), rel=1e-9) for i, r in enumerate(REQUESTS)}


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(RequestError, match=r"prompt and answer have \d+ tokens, the model reads 256"):
        answer_rows(model, [EditRequest("{} " + "is " * 300, "France", "Rome")])


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_opt])
def test_what_is_added_at_answers_reaches_these_tokens_only(builder):
    model = exact(builder, num_hidden_layers=4)
    down = model.layout.layers[1].down_proj
    (group,) = answer_rows(model, REQUESTS, 4096)
    values = torch.randn(len(group.tokens), 32, dtype=torch.float64)
    seen: list[Tensor] = []
    down.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    plain = answer_log_probabilities(model, group)
    with added_to_output({down: lambda x: only_at_answers(group, values, x)}):
        changed = answer_log_probabilities(model, group)
    assert not torch.allclose(plain, changed)
    before, after = seen[0], seen[0] + only_at_answers(group, values, seen[0])
    torch.testing.assert_close(at_answers(group, after) - at_answers(group, before), values)
    assert int((after != before).any(dim=-1).sum()) == len(values)


def test_fit_minimises_stops_early_and_leaves_the_model_alone(model):
    before, down = snapshot(model), model.layout.layers[1].down_proj
    delta = torch.zeros(32, 64, dtype=torch.float64, requires_grad=True)
    groups, names = answer_rows(model, REQUESTS), ["a", "b", "c"]
    steps: list[int] = []
    with added_to_output({down: lambda x: x @ delta.T}):
        ended = fit(
            model,
            groups,
            torch.optim.Adam([delta], lr=0.05),
            EditConfig.create(steps=60, stop_loss=2.5),
            names,
            after_step=lambda: steps.append(1),
        )
    assert_untouched(model, before)
    assert max(ended.losses) < 2.5 and ended.steps == len(steps) + 1 < 60
    targets = ended.as_targets()
    assert targets.losses == tuple(ended.losses) and targets.steps == (ended.steps,) * 3
    assert targets.probabilities[0] == pytest.approx(torch.tensor(-ended.losses[0]).exp().item())


def test_a_loss_that_is_not_finite_names_the_edit(model):
    delta = torch.full((32, 64), 1e308, dtype=torch.float64, requires_grad=True)
    with (
        added_to_output({model.layout.layers[1].down_proj: lambda x: x @ delta.T}),
        pytest.raises(NumericsError, match=r"edit 'a': the loss is nan at step 1; lower `lr`"),
    ):
        fit(
            model,
            answer_rows(model, REQUESTS),
            torch.optim.Adam([delta]),
            EditConfig.create(),
            ["a", "b", "c"],
        )
