"""GRACE, WISE, MEMOIR and IKE: their rules and formulas; what they recall does not depend on how it is asked."""

import itertools

import pytest
import torch
from tests import tiny
from tests.editors.test_pipeline import CONTEXTS, REQUESTS, assert_untouched, log_likelihood, snapshot
from tests.exact import exact
from tests.tiers import sampled
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors import ike, memoir, methods, wise
from nmke.editors.grace import Codebook
from nmke.editors.memory_layers import deep_layer, ordinary_inputs
from nmke.editors.method import Batch
from nmke.editors.side import SideMemory
from nmke.evaluation.target_scores import predictions
from nmke.models.load import EditableModel
from nmke.progress import quiet

SETTINGS = {
    "grace": {"layers": (2,), "steps": 40, "lr": 0.5},
    "wise": {"layers": (2,), "steps": 40, "lr": 0.02},
    "memoir": {"layers": (2,), "steps": 40, "lr": 1.0},
    "ike": {"layers": (2,)},
}
HOOKED = ("grace", "wise", "memoir")


@pytest.fixture
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=4)


def edit(model: EditableModel, name: str, requests=REQUESTS, side: SideMemory | None = None) -> SideMemory:
    method = methods.get(name)
    config = EditConfig.create(**{**method.defaults, **SETTINGS[name]})
    assert method.compute is not None
    result = method.compute(Batch(model, requests, CONTEXTS, config, quiet, side))
    assert result.updates == () and result.side is not None and result.side.kind == name
    return result.side


def recalled(model: EditableModel, memory: SideMemory):
    recall = methods.get(memory.kind).recall
    assert recall is not None
    return recall(model, memory)


FAMILIES = itertools.product((tiny.tiny_llama, tiny.tiny_opt, tiny.tiny_gpt2), HOOKED)


@pytest.mark.parametrize(
    ("builder", "name"), sampled(FAMILIES, lambda one: one[0] is tiny.tiny_llama or one[1] == "wise")
)
def test_the_answers_are_recalled_and_the_model_is_left_alone(name, builder):
    model = exact(builder, **{"n_layer" if builder is tiny.tiny_gpt2 else "num_hidden_layers": 4})
    before = snapshot(model)
    was = [log_likelihood(model, request) for request in REQUESTS]
    memory = edit(model, name)
    assert_untouched(model, before)
    with recalled(model, memory):
        now = [log_likelihood(model, request) for request in REQUESTS]
    assert all(a > b + 0.5 for a, b in zip(now, was, strict=True))
    assert [log_likelihood(model, request) for request in REQUESTS] == was


@pytest.mark.parametrize("name", [*HOOKED, "ike"])
def test_padding_and_batch_make_no_difference(name, model):
    pairs = [(request.text, request.target_new) for request in REQUESTS]
    with recalled(model, edit(model, name)):
        together = [predictions(model, pairs, side=side) for side in ("left", "right")]
        alone = [predictions(model, [pair])[0] for pair in pairs]
    for found in together:
        for one, other in zip(found, alone, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, rel=1e-6)


@pytest.mark.parametrize("name", HOOKED)
def test_decoding_with_a_cache_says_what_whole_forward_passes_say(name, model):
    request = REQUESTS[0]
    (plain,) = model.generate([request.text], 4)
    with recalled(model, edit(model, name, [request])):
        (found,) = model.generate([request.text], 4)
        ids = model.encoder.encode(request.text)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert found == model.tokenizer.decode(ids[-4:]) != plain


@pytest.mark.parametrize("name", HOOKED)
def test_a_later_batch_keeps_some_of_what_an_earlier_one_stored(name, model):
    was = [log_likelihood(model, request) for request in REQUESTS[:2]]
    both = edit(model, name, REQUESTS[1:2], edit(model, name, REQUESTS[:1]))
    with recalled(model, both):
        now = [log_likelihood(model, request) for request in REQUESTS[:2]]
    assert all(a > b + 0.3 for a, b in zip(now, was, strict=True))


def test_deep_layers_are_never_the_last():
    assert [deep_layer(n) for n in (2, 4, 30, 32, 48)] == [(0,), (2,), (24,), (26,), (38,)]


# ---------------------------------------------------------------- GRACE


def book(*entries: tuple[list[float], float, int]) -> Codebook:
    found = Codebook.empty(2, torch.device("cpu"))
    keys = torch.tensor([key for key, _, _ in entries]).reshape(-1, 2)
    radii, labels = torch.tensor([r for _, r, _ in entries]), torch.tensor([n for _, _, n in entries])
    return Codebook(torch.cat([found.keys, keys]), torch.zeros(len(keys), 2), radii, labels)


@pytest.mark.parametrize(
    ("label", "at", "radii", "keys", "entry"),
    [
        (7, [5.0, 0.0], [1.0, 0.5], 2, 1),  # far from every key: an entry of its own
        (7, [1.2, 0.0], [1.2], 1, -1),  # within reach, the same answer: its radius grows to it
        (7, [0.5, 0.0], [1.0], 1, -1),  # inside already
        (8, [1.2, 0.0], [0.6, 0.6], 2, 1),  # within reach, another answer: both radii half the distance
        (8, [0.0, 0.0], [1.0], 1, 0),  # the same place, another answer: the entry is taken over
    ],
)
def test_grace_places_an_edit_by_distance_and_answer(label, at, radii, keys, entry):
    found, index = book(([0.0, 0.0], 1.0, 7)).placed(torch.tensor(at), label, 0.5)
    assert index == entry and len(found.keys) == keys
    assert found.radii.tolist() == pytest.approx(radii)
    assert found.labels.tolist() == ([label] if keys == 1 else [7, label])


def test_grace_replaces_the_layers_output_near_a_key_only(model):
    block, ids = model.layout.layers[2].block, torch.tensor([model.encoder.encode(REQUESTS[0].text)])
    states: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _m, args: states.update(key=args[0])),
        model.layout.layers[3].block.register_forward_pre_hook(lambda _m, a: states.update(next=a[0])),
    ]
    with torch.no_grad():
        model.model(ids)
        plain = states["next"].clone()
        key = states["key"][0, -1].float()
        value = torch.full((1, 32), 3.0)
        tensors = {
            "keys": key[None],
            "values": value,
            "radii": torch.tensor([1e-3]),
            "labels": torch.tensor([1]),
        }
        with recalled(model, SideMemory("grace", {**tensors, "layer": torch.tensor([2])})):
            model.model(ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(states["next"][0, -1].float(), value[0])
    assert torch.equal(states["next"][0, :-1], plain[0, :-1])


# ---------------------------------------------------------------- WISE


def test_wise_margin_loss_is_the_papers():
    edited, other = [0.5, 3.0], [0.1, 0.9, 0.2]
    margins, unit = wise.Margins(other=0.25, edited=1.0, apart=0.5), 2.0
    low = sum(max(0.0, i - 0.5) for i in other) / 3
    high = sum(max(0.0, 2.0 - e) for e in edited) / 2
    gap = sum(max(0.0, 1.0 - (e - i)) for e in edited for i in other) / 6
    found = margins.loss(torch.tensor(edited), torch.tensor(other), unit)
    assert float(found) == pytest.approx((low + high + gap) / 2.0)


def test_wise_takes_the_side_memory_where_it_answers_at_least_as_strongly_as_to_an_edit(model):
    memory = edit(model, "wise", REQUESTS[:1])
    delta, threshold = memory.tensors["delta"].double(), float(memory.tensors["threshold"])
    down, seen = model.layout.layers[2].down_proj, []
    inputs = torch.randn(1, 40, 64, dtype=torch.float64) * torch.linspace(0.01, 30, 40)[None, :, None]
    with recalled(model, memory):
        routed = down(inputs) - torch.nn.functional.linear(inputs, down.weight)
    for token in range(40):
        written = delta @ inputs[0, token]
        taken = float(written.norm()) >= threshold
        seen.append(taken)
        expected = written if taken else torch.zeros_like(written)
        torch.testing.assert_close(routed[0, token], expected, rtol=1e-4, atol=1e-5)
    assert True in seen and False in seen
    other = ordinary_inputs(model, 2) @ delta.T
    assert float((other.norm(dim=1) >= threshold).double().mean()) < 0.2


# ---------------------------------------------------------------- MEMOIR


def test_memoir_marks_the_strongest_neurons_behind_the_permutation():
    centre, permutation = torch.tensor([1.0, 0, 0, 0, 0, 0, 0]), torch.tensor([3, 1, 4, 0, 5, 6, 2])
    marks = memoir.TopHash(centre, permutation).masks(torch.tensor([[1.0, -5, 2, 0, 0, 0, 0.1]]))
    assert marks.tolist() == [[1, 4]]  # neurons 1 and 2; neuron 0 is where ordinary text is
    assert memoir.as_grid(marks, 7).tolist() == [[0, 1, 0, 0, 1, 0, 0]]


def test_memoir_trains_the_marked_columns_only_and_recalls_by_overlap(model):
    memory = edit(model, "memoir", REQUESTS[:1])
    weights, marks = memory.tensors["memory"], memory.tensors["marks"].long()
    touched = set(weights.any(dim=1).nonzero().flatten().tolist())
    assert touched and touched <= set(marks.flatten().tolist())
    down = model.layout.layers[2].down_proj
    hashing = memoir.TopHash(memory.tensors["centre"], memory.tensors["permutation"])
    inputs = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).double()
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.model(torch.tensor([model.encoder.encode(REQUESTS[0].text)]))
    handle.remove()
    tokens = torch.cat([seen[0][0, -1:], inputs[0]])
    with recalled(model, memory):
        added = down(tokens[None])[0] - torch.nn.functional.linear(tokens, down.weight)
    for token, found in zip(tokens, added, strict=True):
        own = set(hashing.masks(token[None].float())[0].tolist())
        overlaps = [len(own & set(row)) / len(row) for row in marks.tolist()]
        best = max(range(len(overlaps)), key=overlaps.__getitem__)
        expected = torch.zeros(32, dtype=torch.float64)
        if overlaps[best] >= 0.6:
            for neuron in marks[best].tolist():
                expected += token[neuron] * weights[neuron].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert added[0].any() and not added[1:].any()


# ---------------------------------------------------------------- IKE


TOLD = ike.Facts(
    (
        ("The capital of France is", "Rome"),
        ("The mother tongue of Marie Curie is", "English"),
        ("Peru borders", "Chad"),
    )
)


def test_ike_puts_the_nearest_fact_last_and_answers_those_before_it():
    front = TOLD.in_front_of("The capital of France is")
    assert front.endswith("New Fact: The capital of France is Rome\nPrompt: ")
    assert front.startswith(
        "New Fact: The mother tongue of Marie Curie is English\nPrompt: The mother tongue"
    )
    assert front.count("New Fact:") == 2 and "Peru" not in front
    assert TOLD.in_front_of("Hello world") == ""
    assert TOLD.in_front_of("What does Peru border?").endswith("New Fact: Peru borders Chad\nPrompt: ")


def test_ike_replaces_a_fact_that_is_told_again(model):
    first = edit(model, "ike", REQUESTS[:2])
    again = edit(model, "ike", [REQUESTS[0].__class__(REQUESTS[0].prompt, "France", "Oslo", id="z")], first)
    told = ike._read(again).told
    assert [answer for _, answer in told] == ["English", "Oslo"]


def test_ike_finds_the_subject_behind_what_stands_in_front(model):
    request = REQUESTS[0]
    plain = model.encoder
    with recalled(model, edit(model, "ike")):
        ids = model.encoder.encode(request.text)
        index = model.encoder.subject_last_index(request.text, request.subject_end)
        target = model.encoder.encode_target(request.text, request.target_new)
    own = plain.encode(request.text)
    shift = len(ids) - len(own)
    assert shift > 0 and ids[-4:] == own[-4:]
    assert index == shift + plain.subject_last_index(request.text, request.subject_end)
    assert target == plain.encode_target(request.text, request.target_new)
    assert model.encoder is plain


def test_ike_leaves_out_demonstrations_that_do_not_fit(model):
    with recalled(model, edit(model, "ike")):
        telling = model.encoder
        full = len(telling.encode(REQUESTS[0].text))
        telling.room = full - 1
        fewer = len(telling.encode(REQUESTS[0].text))
        telling.room = 3
        assert telling.encode(REQUESTS[0].text) == telling.plain.encode(REQUESTS[0].text)
    assert fewer < full
