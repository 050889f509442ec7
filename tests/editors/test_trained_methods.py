"""FT, FT-L, LoRA, KN and UltraEdit against their formulas, written out slowly in float64."""

import copy
import sys

import pytest
import torch
from tests import tiny
from tests.editors.test_pipeline import (
    CONTEXTS,
    REQUESTS,
    assert_untouched,
    log_likelihood,
    snapshot,
    write,
)
from tests.exact import exact
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.knowledge_neurons import KnowledgeNeurons, integrated_gradients
from nmke.editors.lora import adapters
from nmke.editors.method import Batch
from nmke.editors.pipeline import BatchResult
from nmke.editors.ultraedit import Running, shift
from nmke.errors import ConfigError
from nmke.models.load import EditableModel
from nmke.progress import quiet

NAMES = ("ft", "ft-l", "lora", "kn", "ultraedit")


@pytest.fixture
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=4)


def edit(model: EditableModel, name: str, requests=REQUESTS, side=None, **settings: object) -> BatchResult:
    method = methods.get(name)
    layers = (1, 2)[: method.max_layers]
    config = EditConfig.create(**{"layers": layers, **settings}).filled(dict(method.defaults))
    assert method.compute is not None
    return method.compute(Batch(model, requests, CONTEXTS, config, quiet, side))


def answer_loss(model: EditableModel, request: object) -> Tensor:
    prompt = model.encoder.encode(request.text)
    answer = model.encoder.encode_target(request.text, request.target_new)
    logits = model.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    return -torch.log_softmax(logits, 1).gather(1, torch.tensor(answer)[:, None]).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_opt])
def test_the_model_is_left_alone_and_the_answer_becomes_likelier(name, builder):
    model = exact(builder, **{"n_layer" if builder is tiny.tiny_gpt2 else "num_hidden_layers": 4})
    before, modules = snapshot(model), dict(model.model.named_modules())
    rates = {"ft": 0.01, "ft-l": 0.01, "lora": 0.02, "ultraedit": 1e-3}
    result = edit(model, name, REQUESTS[:1], **({"lr": rates[name]} if name in rates else {}))
    assert_untouched(model, before)
    assert dict(model.model.named_modules()) == modules
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    was = log_likelihood(model, REQUESTS[0])
    write(model, result.updates)
    if name != "kn":  # what a neuron's value is turned to need not be what a random model reads as the answer
        assert log_likelihood(model, REQUESTS[0]) > was


@pytest.mark.parametrize(("name", "largest"), [("ft", None), ("ft-l", 5e-4)])
def test_fine_tuning_is_adam_on_the_weights_within_its_box(name, largest, model):
    result = edit(model, name, steps=6, lr=3e-4, stop_loss=0.0)
    own = EditableModel.wrap(copy.deepcopy(model.model), model.tokenizer)
    weight = own.layout.layers[1].down_proj.weight
    start = weight.detach().clone()
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=3e-4)
    for _ in range(6):
        optimizer.zero_grad()
        torch.stack([answer_loss(own, request) for request in REQUESTS]).mean().backward()
        optimizer.step()
        if largest is not None:
            with torch.no_grad():
                weight.copy_(start + (weight - start).clamp(-largest, largest))
    (update,) = result.updates
    torch.testing.assert_close(update.delta.double(), weight.detach() - start, rtol=1e-4, atol=1e-8)
    assert largest is None or float(update.delta.abs().max()) == pytest.approx(largest)


def test_lora_writes_what_its_adapter_computes(model):
    result = edit(model, "lora", steps=5, lr=0.01, stop_loss=0.0)
    assert all(update.left.shape[1] == 8 for update in result.updates)
    with adapters(model, (1, 2), seed=0) as layers:
        parameters = [p for a in layers.values() for p in (a.lora_A["edit"].weight, a.lora_B["edit"].weight)]
        optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            torch.stack([answer_loss(model, request) for request in REQUESTS]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            adapted = answer_loss(model, REQUESTS[0])
    write(model, result.updates)
    with torch.no_grad():
        torch.testing.assert_close(answer_loss(model, REQUESTS[0]), adapted, rtol=1e-5, atol=0)


def test_lora_without_peft_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"'lora' needs PEFT.*nmke\[lora\]"):
        edit(model, "lora")


def test_integrated_gradients_are_the_sum_over_scaled_coefficients(model):
    prompt, token, layer, points = model.encoder.encode(REQUESTS[0].text), 7, 1, 4
    down = model.layout.layers[layer].down_proj
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model.model(torch.tensor([prompt]))
    handle.remove()
    full = seen[0][0, -1]

    def probability(coefficients: Tensor) -> Tensor:
        def replace(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (torch.cat([args[0][:, :-1], coefficients[None, None]], dim=1),)

        hook = down.register_forward_pre_hook(replace)
        logits = model.model(torch.tensor([prompt])).logits[0, -1]
        hook.remove()
        return torch.softmax(logits, 0)[token]

    expected = torch.zeros_like(full)
    for k in range(1, points + 1):
        point = (full * k / points).requires_grad_()
        expected += full / points * torch.autograd.grad(probability(point), point)[0]
    found = integrated_gradients(model, [prompt], [token], [layer], points)[layer]
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-12)


def test_knowledge_neurons_pass_the_threshold_in_enough_prompts():
    scores = {
        1: torch.tensor([[1.0, 0.3, 0.1, -2.0], [2.0, 0.3, 0.5, 0.1]]),
        2: torch.tensor([[0.25, 0.1, 0.0, 0.0], [0.1, 0.1, 0.0, 0.0]]),
    }
    chosen = KnowledgeNeurons(threshold=0.2, agreement=1.0).chosen(scores)
    assert {i: m.tolist() for i, m in chosen.items()} == {1: [True, False, False, False], 2: [False] * 4}
    half = KnowledgeNeurons(threshold=0.2, agreement=0.5).chosen(scores)
    assert {i: m.tolist() for i, m in half.items()} == {1: [True, True, True, False], 2: [True] + [False] * 3}
    none_agrees = {1: torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    assert KnowledgeNeurons(agreement=1.0).chosen(none_agrees)[1].tolist() == [True, True]


def test_knowledge_neurons_values_lose_the_old_answer_and_gain_the_new(model):
    request = REQUESTS[0]
    result = edit(model, "kn", [request])
    embedding = model.layout.unembedding.weight.double()
    prompt = torch.tensor([model.encoder.encode(request.text)])
    old = int(model.model(prompt).logits[0, -1].argmax())
    new = model.encoder.encode_target(request.text, request.target_new)[0]
    touched = 0
    for update in result.updates:
        columns = update.delta.double()[:, update.columns]
        expected = (8 * embedding[new] - embedding[old])[:, None].expand_as(columns)
        torch.testing.assert_close(columns, expected, rtol=1e-5, atol=1e-6)
        touched += int(update.columns.sum())
    assert 0 < touched < 64


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_knowledge_neurons_of_a_fact_do_not_depend_on_what_is_edited_with_it(builder):
    model = exact(builder, **{"n_layer" if builder is tiny.tiny_gpt2 else "num_hidden_layers": 4})
    together = edit(model, "kn").updates
    alone = [edit(model, "kn", [request]).updates for request in REQUESTS]
    for at, update in enumerate(together):
        assert torch.equal(update.right, torch.cat([updates[at].right for updates in alone]))
        assert torch.equal(update.left, torch.cat([updates[at].left for updates in alone], dim=1))
    assert len({tuple(update.right.flatten().tolist()) for update in together}) > 1


def test_running_statistics_are_those_of_all_rows_together():
    rows = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)).double() * 3 + 2
    zero = torch.zeros(5, dtype=torch.float64)
    running = Running(0, zero, zero).add(rows[:1])
    assert torch.equal(running.normalise(rows[:1]), rows[:1]), "one row has no deviation"
    running = running.add(rows[1:4]).add(rows[4:])
    expected = (rows - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(running.normalise(rows), expected, rtol=1e-6, atol=1e-9)


def test_the_shift_is_the_ridge_solution_for_normalised_values():
    generator = torch.Generator().manual_seed(1)
    hidden, gradients = (torch.randn(4, width, generator=generator).double() for width in (9, 5))
    both = torch.cat([hidden, gradients], dim=1)
    zero = torch.zeros(14, dtype=torch.float64)
    left, right = shift(hidden, gradients, Running(0, zero, zero).add(both), rate=0.3)
    normal = (both - both.mean(0)) / both.std(0)
    values = -0.3 * normal[:, :9].square().sum(1, keepdim=True) * normal[:, 9:]
    system = hidden.T @ hidden + torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.inv(system) @ hidden.T @ values
    torch.testing.assert_close((left @ right).T, expected, rtol=1e-6, atol=1e-9)


def test_ultraedit_reads_inputs_and_output_gradients_where_answers_are_predicted(model):
    requests, rate = REQUESTS[:2], 0.01
    result = edit(model, "ultraedit", requests, lr=rate)
    hidden, gradients = [], []
    for request in requests:
        seen: list[Tensor] = []

        def hook(_module: object, args: tuple[Tensor, ...], out: Tensor, seen: list[Tensor] = seen) -> Tensor:
            probe = torch.zeros_like(out, requires_grad=True)
            seen[:] = [args[0].detach(), probe]
            return out + probe

        handle = model.layout.layers[1].down_proj.register_forward_hook(hook)
        loss = answer_loss(model, request)
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, seen[1])
        start = len(model.encoder.encode(request.text)) - 1
        hidden.append(seen[0][0, start:])
        gradients.append(gradient[0, start:])
    h, g = torch.cat(hidden), torch.cat(gradients)
    zero = torch.zeros(96, dtype=torch.float64)
    left, right = shift(h, g, Running(0, zero, zero).add(torch.cat([h, g], dim=1)), rate)
    torch.testing.assert_close(result.updates[0].delta.double(), left @ right, rtol=1e-4, atol=1e-7)
    assert result.side is not None and int(result.side.tensors["1/count"]) == len(h)


def test_ultraedit_carries_its_statistics_to_the_next_batch(model):
    first = edit(model, "ultraedit", REQUESTS[:2])
    alone = edit(model, "ultraedit", REQUESTS[2:])
    later = edit(model, "ultraedit", REQUESTS[2:], side=first.side)
    counts = [int(result.side.tensors["1/count"]) for result in (first, alone, later)]
    assert counts[2] == counts[0] + counts[1]
    assert not torch.equal(alone.updates[0].left, later.updates[0].left)
