"""Scores through the rest of the network against literal float64 versions: one plain forward per prompt and neuron."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests import tiny
from tests.exact import exact
from torch import Tensor

from nmke.attribution import ablation, gradient, neuron_scores, read_out
from nmke.attribution.base import Readout
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch
from nmke.models.weights import written_matrix

PROMPTS = ("The capital of France is", "Because I was late, Tim Cook", "Emma lives in")
LAST, SUBJECT = "last", "subject"
COLUMNS = {LAST: None, SUBJECT: (2, 4, 0)}  # index of the scored token; 0 has no prefix to keep
FAMILIES = {
    "llama": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "gemma2": tiny.tiny_gemma2,
    "granite": tiny.tiny_granite,
}
LAYER = 0
D_MLP = 10


@dataclass
class Case:
    """A model, its prompts and where they are scored."""

    model: EditableModel
    ids: list[list[int]]
    at: list[int]
    readout: Readout
    answers: list[int]

    def log_p(self, prompt: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Log-probability of the answer when the coefficients at the scored token go through `change`."""
        down = self.model.layout.layers[LAYER].down_proj

        def hook(_module, args):
            given = args[0].clone()
            given[0, self.at[prompt]] = change(given[0, self.at[prompt]])
            return (given, *args[1:])

        handle = down.register_forward_pre_hook(hook)
        logits = self.model.model(torch.tensor([self.ids[prompt]]), use_cache=False).logits[0, -1]
        handle.remove()
        return torch.log_softmax(logits, 0)[self.answers[prompt]]

    def coefficients(self, prompt: int) -> Tensor:
        seen: list[Tensor] = []
        with torch.no_grad():
            self.log_p(prompt, lambda c: seen.append(c.clone()) or c)
        return seen[0]


CASES = [  # every family in every run, with one of the two tokens
    pytest.param((family, token), marks=() if number % 2 == (token == LAST) else pytest.mark.slow)
    for number, family in enumerate(FAMILIES)
    for token in COLUMNS
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    family, token = request.param
    caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None} if family == "gemma2" else {}
    sizes = {"num_hidden_layers": 3, "intermediate_size": D_MLP}
    if family == "gpt2":
        sizes = {"n_layer": 3, "n_inner": D_MLP}
    model = exact(FAMILIES[family], **sizes, **caps)
    ids = [model.encoder.encode(prompt) for prompt in PROMPTS]
    batch = pad_batch(ids, model.encoder.pad_id, "left" if family == "llama" else "right")
    chosen = COLUMNS[token]
    at = [len(row) - 1 for row in ids] if chosen is None else list(chosen)
    columns = None if chosen is None else torch.tensor([batch.column(r, i) for r, i in enumerate(at)])
    answers = [int(model.model(torch.tensor([row])).logits[0, -1].argmax()) for row in ids]
    return Case(model, ids, at, read_out(model, batch, [0, 1], columns), answers)


def scores(case: Case, name: str) -> Tensor:
    return neuron_scores.get(name)(case.readout, LAYER, 30.0)


def without(neuron: int) -> Callable[[Tensor], Tensor]:
    def change(c: Tensor) -> Tensor:
        return torch.cat([c[:neuron], torch.zeros_like(c[:1]), c[neuron + 1 :]])

    return change


def test_ablation_is_what_is_lost_when_a_neuron_is_silent(case):
    with torch.no_grad():
        expected = torch.stack(
            [
                torch.stack([case.log_p(b, lambda c: c) - case.log_p(b, without(i)) for i in range(D_MLP)])
                for b in range(len(PROMPTS))
            ]
        )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(scores(case, "ablation"), expected, rtol=1e-7, atol=1e-9)


def test_chosen_neurons_and_small_chunks_give_the_same(case, monkeypatch):
    whole = scores(case, "ablation")
    monkeypatch.setattr(ablation, "TOKENS_AT_ONCE", 7)
    chosen = torch.tensor([5, 0, D_MLP - 1, 7, 2])
    torch.testing.assert_close(
        ablation.ablate(case.readout, LAYER, chosen), whole[:, chosen], rtol=1e-9, atol=1e-11
    )


def test_gradient_times_activation_is_the_differential_quotient(case):
    step = 1e-4
    rows = []
    with torch.no_grad():
        for b in range(len(PROMPTS)):
            c, row = case.coefficients(b), []
            for i in range(D_MLP):
                move = torch.zeros_like(c)
                move[i] = step
                slope = (case.log_p(b, lambda c, m=move: c + m) - case.log_p(b, lambda c, m=move: c - m)) / (
                    2 * step
                )
                row.append(c[i] * slope)
            rows.append(torch.stack(row))
    torch.testing.assert_close(scores(case, "gradient"), torch.stack(rows), rtol=1e-4, atol=1e-7)


def test_integrated_gradients_follow_the_path_from_silence(case):
    rows = []
    for b in range(len(PROMPTS)):
        c, total = case.coefficients(b), torch.zeros(D_MLP, dtype=torch.float64)
        for step in range(gradient.STEPS):
            leaf = ((step + 0.5) / gradient.STEPS * c).requires_grad_()
            total += torch.autograd.grad(case.log_p(b, lambda _, leaf=leaf: leaf), leaf)[0]
        rows.append(c * total / gradient.STEPS)
    torch.testing.assert_close(scores(case, "integrated"), torch.stack(rows), rtol=1e-7, atol=1e-9)


def test_integrated_gradients_add_up_to_the_layers_effect(case, monkeypatch):
    if not case.model.layout.layers[LAYER].direct_write:
        pytest.skip("a norm behind the MLP makes the path's first step too steep for midpoints")
    monkeypatch.setattr(gradient, "STEPS", 100)
    with torch.no_grad():
        effect = torch.stack(
            [case.log_p(b, lambda c: c) - case.log_p(b, torch.zeros_like) for b in range(len(PROMPTS))]
        )
    torch.testing.assert_close(scores(case, "integrated").sum(dim=1), effect, rtol=1e-3, atol=1e-4)


def test_contribution_is_what_the_logit_gains_through_the_frozen_norm(case):
    model, layout = case.model, case.model.layout
    down, norm = layout.layers[LAYER].down_proj, layout.final_norm
    found = scores(case, "contribution")
    for b, ids in enumerate(case.ids):
        y, at = int(case.readout.targets[b]), case.at[b]
        final = case.readout.finals[b]
        weight = getattr(norm, "offset", 0.0) + norm.weight
        centred = getattr(norm, "bias", None) is not None
        eps = getattr(norm, "eps", None)
        spread = final - final.mean() if centred else final
        statistic = (spread.square().mean() + eps).rsqrt()
        unembedding = written_matrix(layout.unembedding)
        for i in (0, 3, D_MLP - 1):
            c = case.readout.coefficients[LAYER][b, i]
            write = case.readout.writes[LAYER]
            x = c * written_matrix(down)[:, i] * write.weight * write.factors[b]
            x = weight * (x - x.mean() if centred else x) * statistic
            logits = layout.logit_map.scale * (unembedding @ x)
            expected = logits[y] - logits.mean()
            torch.testing.assert_close(found[b, i], expected, rtol=1e-4, atol=1e-7)
        assert model.encoder.encode(PROMPTS[b]) == ids and at < len(ids)


def test_contributions_of_the_last_layer_add_up_to_its_logit(case):
    """Without a norm behind the MLP the neurons' shares are the whole MLP's, exactly."""
    if case.model.layout.layers[2].direct_write is False or case.at != [len(i) - 1 for i in case.ids]:
        pytest.skip("only for a plain write read at the last token")
    readout = read_out(case.model, pad_batch(case.ids, case.model.encoder.pad_id), [2])
    share = neuron_scores.get("contribution")(readout, 2, 30.0).sum(dim=1)
    down, norm = case.model.layout.layers[2].down_proj, case.model.layout.final_norm
    written = readout.coefficients[2] @ written_matrix(down).T
    unembedding = written_matrix(case.model.layout.unembedding)

    def answer(hidden: Tensor) -> Tensor:  # the norm is not linear: compare at the same statistic
        centred = hidden - hidden.mean(1, keepdim=True) if norm.__class__.__name__ == "LayerNorm" else hidden
        spread = readout.finals
        spread = spread - spread.mean(1, keepdim=True) if norm.__class__.__name__ == "LayerNorm" else spread
        weight = getattr(norm, "offset", 0.0) + norm.weight
        normed = weight * centred * (spread.square().mean(1, keepdim=True) + norm.eps).rsqrt()
        logits = case.model.layout.logit_map.scale * normed @ unembedding.T
        return logits.gather(1, readout.targets[:, None])[:, 0] - logits.mean(1)

    torch.testing.assert_close(
        share, answer(readout.finals) - answer(readout.finals - written), rtol=1e-4, atol=1e-6
    )


def test_another_answer_can_be_asked_for(case):
    wanted = [5, 70, 11]
    batch = pad_batch(case.ids, case.model.encoder.pad_id)
    readout = read_out(case.model, batch, [LAYER], torch.tensor(case.at), torch.tensor(wanted))
    other = Case(case.model, case.ids, case.at, readout, wanted)
    with torch.no_grad():
        expected = [
            [other.log_p(b, lambda c: c) - other.log_p(b, without(i)) for i in (0, 4)] for b in range(3)
        ]
    found = ablation.ablate(readout, LAYER, torch.tensor([0, 4]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(found, scores(case, "ablation")[:, [0, 4]], rtol=1e-2)


def test_model_is_left_as_it_was(case):
    before = {name: value.clone() for name, value in case.model.model.state_dict().items()}
    for name in ("ablation", "gradient", "integrated", "contribution"):
        scores(case, name)
    after = case.model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in case.model.model.parameters())
