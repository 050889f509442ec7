"""What trained methods share: losses, hooks, and that the model is left alone."""

from functools import partial

import pytest
import torch
from tests import tiny
from tests.editors.test_pipeline import REQUESTS, assert_untouched, snapshot
from tests.exact import exact
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.training import AnswerTails, added_to_output, answer_rows, edit_losses, fit
from nmke.errors import NumericsError, RequestError
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows
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


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_opt, tiny.tiny_gpt2, tiny.tiny_gemma3])
@pytest.mark.parametrize("whole", [False, True])
def test_tails_give_the_losses_and_gradients_of_whole_forward_passes(builder, whole):
    model = exact(builder, **{"n_layer" if builder is tiny.tiny_gpt2 else "num_hidden_layers": 4})
    down = model.layout.layers[1].down_proj
    if whole:
        model.replayable = False
    seen: list[Tensor] = []
    drawn = torch.Generator().manual_seed(0)
    for group in answer_rows(model, REQUESTS, 24):
        tails = AnswerTails(model, group, 1)
        values = (
            5 * torch.randn(len(group.tokens), 32, dtype=torch.float64, generator=drawn)
        ).requires_grad_()

        def more(_module: object, args: tuple[Tensor], out: Tensor, group=group, values=values) -> Tensor:
            seen[:] = [in_rows(args[0], len(group.edits))]
            added = torch.zeros_like(in_rows(out, len(group.edits)))
            return out + added.index_put((group.rows, group.columns), values).reshape(out.shape)

        handle = down.register_forward_hook(more)
        expected = edit_losses(model, group)
        handle.remove()
        found = tails.losses(values)
        assert tails.edits == group.edits
        torch.testing.assert_close(tails.inputs, seen[0][group.rows, group.columns])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(
            found, edit_losses(model, group), rtol=1e-5
        )  # a norm behind the MLP leaves little
        weights = torch.arange(1.0, len(found) + 1).double()
        one, other = (torch.autograd.grad((weights * each).sum(), values)[0] for each in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_fit_minimises_stops_early_and_leaves_the_model_alone(model):
    before, down = snapshot(model), model.layout.layers[1].down_proj
    delta = torch.zeros(32, 64, dtype=torch.float64, requires_grad=True)
    groups, names = answer_rows(model, REQUESTS), ["a", "b", "c"]
    steps: list[int] = []
    with added_to_output({down: lambda x: x @ delta.T}):
        ended = fit(
            groups,
            partial(edit_losses, model),
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
            answer_rows(model, REQUESTS),
            partial(edit_losses, model),
            torch.optim.Adam([delta]),
            EditConfig.create(),
            ["a", "b", "c"],
        )
