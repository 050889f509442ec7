"""The batched, replayed target optimisation against a plain one: one edit, one row, one full forward at a time."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from tests import tiny
from tests.exact import exact
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors import targets as targets_module
from nmke.editors.targets import Targets, optimise_targets
from nmke.errors import NumericsError, RequestError
from nmke.models.load import EditableModel
from nmke.models.replay import Site
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ", "The train had left. ")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("The mother tongue of {} is", "Marie Curie", "English", id="curie"),
    EditRequest("{} was born in the old city of", "Ada Lovelace", "Tokyo"),
    EditRequest("{} was late, therefore", "I", "in Paris", id="first token"),
)
SETTINGS = {
    "steps": 7, "lr": 0.5, "clamp": 2.5, "weight_decay": 0.05, "kl_factor": 0.3, "stop_loss": 1e-6
}  # fmt: skip
CONFIG = EditConfig.create(**SETTINGS)
BUILDERS = {
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=3),
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=3),
    "gemma3": lambda: exact(tiny.tiny_gemma3, num_hidden_layers=3, final_logit_softcapping=20.0),
}
SITES: dict[str, tuple[Site, tuple[int, ...]]] = {
    "block": ("block", (1,)),
    "down_proj": ("down_proj", (0, 1)),
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def gpt2_exact() -> EditableModel:
    return BUILDERS["gpt2"]()


@pytest.fixture(scope="module")
def plain(gpt2_exact: EditableModel) -> Callable[[int, Site, EditConfig], "Plain"]:
    """`plain_targets` of an edit on the GPT-2, run once for each setting."""

    @functools.cache
    def run(edit: int, site: Site, config: EditConfig) -> Plain:
        return plain_targets(gpt2_exact, REQUESTS[edit], SITES[site][1], site, config)

    return run


@dataclass
class Plain:
    """What the plain optimisation of one edit ends with."""

    deltas: Tensor  # [sites d_model]
    values: Tensor
    losses: list[float]
    nll: float


def forward(model: EditableModel, ids: Sequence[int], anchor: int, site: Site, deltas: dict[int, Tensor]):
    """Logits [seq d_vocab] of one row with deltas added at the anchor, and what stood there before."""
    found: dict[int, Tensor] = {}
    handles = []
    for layer, delta in deltas.items():
        parts = model.layout.layers[layer]

        def hook(_module, _args, output, layer=layer, delta=delta):
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden[0, anchor].detach().clone()
            added = torch.zeros(hidden.shape[1], dtype=torch.float64)
            added[anchor] = 1.0
            changed = hidden + added[None, :, None] * delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        module = parts.block if site == "block" else parts.down_proj
        handles.append(module.register_forward_hook(hook))
    logits = model.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, found


def context_rows(model: EditableModel, request: EditRequest) -> list[tuple[Sequence[int], int]]:
    """Token ids and anchor behind each context."""
    encoder = model.encoder
    rows = []
    for context in CONTEXTS:
        ids = encoder.encode(context + request.text)
        anchor = encoder.subject_last_index(context + request.text, len(context) + request.subject_end)
        if anchor > 0:  # position 0 is left out
            rows.append((ids, anchor))
    return rows


def answer_nll(model: EditableModel, request: EditRequest, site: Site, deltas: dict[int, Tensor]) -> Tensor:
    """-log p of the answer, the mean over its tokens and the contexts."""
    target = model.encoder.encode_target(request.text, request.target_new)
    nll, rows = torch.zeros((), dtype=torch.float64), context_rows(model, request)
    for ids, anchor in rows:
        logits, _ = forward(model, [*ids, *target[:-1]], anchor, site, deltas)
        log_p = torch.log_softmax(logits[len(ids) - 1 :], 1)
        nll = nll - sum(log_p[i, token] for i, token in enumerate(target)) / len(target) / len(rows)
    return nll


def plain_targets(
    model: EditableModel,
    request: EditRequest,
    layers: Sequence[int],
    site: Site,
    config: EditConfig,
    held: Sequence[EditRequest] = (),
) -> Plain:
    """METHOD section 2.4 as written, with Adam spelled out; answers that are held may not lose probability."""
    encoder = model.encoder
    rows = context_rows(model, request)
    start = next(
        c for c in CONTEXTS if encoder.subject_last_index(c + request.subject, len(c + request.subject)) > 0
    )
    kl_ids = encoder.encode(start + request.subject + " is a")
    kl_anchor = encoder.subject_last_index(start + request.subject, len(start + request.subject))

    nothing = {layer: torch.zeros(model.layout.d_model, dtype=torch.float64) for layer in layers}
    _, at_anchor = forward(model, rows[0][0], rows[0][1], site, nothing)
    h0 = torch.stack([at_anchor[layer] for layer in layers])
    kl_before = torch.log_softmax(forward(model, kl_ids, kl_anchor, site, nothing)[0][-1], 0).detach()
    held_before = [answer_nll(model, fact, site, nothing).detach() for fact in held]

    deltas = torch.zeros_like(h0).requires_grad_()
    mean, square = torch.zeros_like(h0), torch.zeros_like(h0)
    losses: list[float] = []
    for step in range(1, config.rounds * config.steps + 1):
        parts = dict(zip(layers, deltas, strict=True))
        nll = answer_nll(model, request, site, parts)
        lost = [
            torch.relu(answer_nll(model, fact, site, parts) - before)
            for fact, before in zip(held, held_before, strict=True)
        ]
        kl_after = torch.log_softmax(forward(model, kl_ids, kl_anchor, site, parts)[0][-1], 0)
        kl = (kl_before.exp() * (kl_before - kl_after)).sum()
        decay = torch.stack([d.norm() / h.norm() ** 2 for d, h in zip(deltas, h0, strict=True)]).mean()
        loss = nll + config.kl_factor * kl + config.weight_decay * decay + sum(lost)
        losses.append(float(loss.detach()))
        rounds_done, within = divmod(step, config.steps)
        is_found = math.exp(-float(nll.detach())) >= targets_module.FOUND
        if losses[-1] < config.stop_loss or (within == 0 and (is_found or rounds_done == config.rounds)):
            break
        clamp = config.clamp * 2 ** (rounds_done if within else rounds_done - 1)
        (gradient,) = torch.autograd.grad(loss, deltas)
        with torch.no_grad():
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            moved = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            deltas -= config.lr * moved
            for delta, h in zip(deltas, h0, strict=True):
                if delta.norm() > clamp * h.norm():
                    delta.mul_(clamp * h.norm() / delta.norm())
    found = deltas.detach()
    return Plain(found, h0 + found, losses, float(nll.detach()))


def found(targets: Targets, edit: int) -> tuple[Tensor, Tensor]:
    deltas = torch.stack([targets.deltas[layer][edit] for layer in targets.layers])
    return deltas, torch.stack([targets.values[layer][edit] for layer in targets.layers])


@pytest.mark.parametrize("place", SITES)
def test_same_optimum_as_plain_optimisation(model, place):
    site, layers = SITES[place]
    targets = optimise_targets(model, REQUESTS, CONTEXTS, layers, site, CONFIG)
    assert targets.site == site and targets.layers == layers
    for edit, request in enumerate(REQUESTS):
        plain = plain_targets(model, request, layers, site, CONFIG)
        deltas, values = found(targets, edit)
        torch.testing.assert_close(deltas, plain.deltas, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(values, plain.values, rtol=1e-9, atol=1e-9)
        assert targets.losses[edit] == pytest.approx(plain.losses[-1], rel=1e-9)
        assert targets.probabilities[edit] == pytest.approx(math.exp(-plain.nll), rel=1e-9)
        assert targets.steps[edit] == len(plain.losses) == CONFIG.steps
        assert plain.losses[-1] < plain.losses[0]


@pytest.mark.parametrize("place", SITES)
def test_answers_about_the_same_subject_are_held(model, place):
    site, layers = SITES[place]
    said = EditRequest("People in {} speak", "france", "English")  # another spelling, the same subject
    born = EditRequest("{} was born in", "Marie Curie", "the city", id="born")
    died = EditRequest("{} died in", "Marie Curie", "Rome", id="died")
    other = EditRequest("People in {} speak", "Italy", "English")
    asked = REQUESTS[:2]
    targets = optimise_targets(model, asked, CONTEXTS, layers, site, CONFIG, held=(said, born, other, died))
    free = optimise_targets(model, asked, CONTEXTS, layers, site, CONFIG)
    for edit, held in enumerate(([said], [born, died])):
        plain = plain_targets(model, asked[edit], layers, site, CONFIG, held)
        torch.testing.assert_close(found(targets, edit)[0], plain.deltas, rtol=1e-9, atol=1e-9)
        assert targets.losses[edit] == pytest.approx(plain.losses[-1], rel=1e-9)
        assert targets.probabilities[edit] == pytest.approx(math.exp(-plain.nll), rel=1e-9)
        lost = []
        for deltas in (torch.zeros_like(plain.deltas), plain.deltas, found(free, edit)[0]):
            parts = dict(zip(layers, deltas, strict=True))
            lost.append(sum(float(answer_nll(model, fact, site, parts)) for fact in held))
        assert lost[1] - lost[0] < 0.5 * (lost[2] - lost[0]), lost


@pytest.mark.parametrize("place", SITES)
def test_products_in_bfloat16_reach_nearly_the_same_optimum(gpt2_exact, place):
    site, layers = SITES[place]
    found = {
        products: optimise_targets(
            gpt2_exact, REQUESTS, CONTEXTS, layers, site, EditConfig.create(**SETTINGS, products=products)
        )
        for products in ("float32", "bfloat16")
    }
    for layer in layers:
        own, half = (found[products].deltas[layer] for products in ("float32", "bfloat16"))
        assert not torch.equal(own, half)
        assert torch.cosine_similarity(own, half).min() > 0.98
    torch.testing.assert_close(
        torch.tensor(found["bfloat16"].losses), torch.tensor(found["float32"].losses), rtol=0.02, atol=0.02
    )


def test_clamp_bounds_every_delta(gpt2_exact):
    config = CONFIG.model_copy(update={"clamp": 0.05, "lr": 1.0})
    for site, layers in SITES.values():
        targets = optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, layers, site, config)
        for layer in layers:
            delta = targets.deltas[layer]
            limit = 0.05 * (targets.values[layer] - delta).norm(dim=1)
            torch.testing.assert_close(delta.norm(dim=1), limit, rtol=1e-9, atol=0)


def middle_stop(plain: Callable[[int, Site, EditConfig], Plain], site: Site) -> EditConfig:
    """A stopping loss that one edit passes in the middle of its run, with momentum, while others go on."""
    config = CONFIG.model_copy(update={"steps": 9})
    runs = [plain(edit, site, config).losses for edit in range(len(REQUESTS))]
    first = min(runs, key=lambda losses: losses[0])
    return config.model_copy(update={"stop_loss": (first[3] + first[4]) / 2})


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("below", [0.0, 1.0], ids=["never compacted", "compacted at once"])
def test_each_edit_stops_on_its_own_and_stays_where_it_stopped(gpt2_exact, plain, site, below, monkeypatch):
    monkeypatch.setattr("nmke.editors.targets.COMPACT_BELOW", below)
    config = middle_stop(plain, site)
    targets = optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, SITES[site][1], site, config)
    assert 5 in targets.steps and 9 in targets.steps
    for edit in range(len(REQUESTS)):
        expected = plain(edit, site, config)
        assert targets.steps[edit] == len(expected.losses)
        assert targets.losses[edit] == pytest.approx(expected.losses[-1], rel=1e-9)
        torch.testing.assert_close(found(targets, edit)[0], expected.deltas, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", SITES)
def test_targets_that_are_not_found_get_another_round_with_twice_the_clamp(gpt2_exact, monkeypatch, site):
    layers = SITES[site][1]
    once = CONFIG.model_copy(update={"steps": 4, "clamp": 0.6})
    first = optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, layers, site, once)
    middle = sorted(first.probabilities)[1:3]
    monkeypatch.setattr(targets_module, "FOUND", sum(middle) / 2)
    config = once.model_copy(update={"rounds": 3})
    targets = optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, layers, site, config)
    assert targets.steps.count(4) == 2 and max(targets.steps) > 4
    for edit, request in enumerate(REQUESTS):
        expected = plain_targets(gpt2_exact, request, layers, site, config)
        assert targets.steps[edit] == len(expected.losses)
        deltas, values = found(targets, edit)
        torch.testing.assert_close(deltas, expected.deltas, rtol=1e-9, atol=1e-9)
        longest = (deltas.norm(dim=1) / (values - deltas).norm(dim=1)).max()
        assert (longest > 0.6 + 1e-9) == (targets.steps[edit] > 4)


@pytest.mark.parametrize("budget", [1, 120, 100_000])
def test_grouping_and_batch_mates_do_not_matter(gpt2_exact, plain, budget):
    config = middle_stop(plain, "block").model_copy(update={"token_budget": budget})
    together = optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, (1,), "block", config)
    backwards = optimise_targets(gpt2_exact, REQUESTS[::-1], CONTEXTS, (1,), "block", config)
    for edit in range(len(REQUESTS)):
        alone = plain(edit, "block", middle_stop(plain, "block"))
        for other, at in ((together, edit), (backwards, 3 - edit)):
            torch.testing.assert_close(other.deltas[1][at], alone.deltas[0], rtol=1e-9, atol=1e-9)
            assert other.steps[at] == len(alone.losses)


def test_model_is_left_as_it_was(gpt2_exact):
    before = {name: value.clone() for name, value in gpt2_exact.model.state_dict().items()}
    optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, (0, 1), "down_proj", CONFIG)
    assert all(torch.equal(before[name], value) for name, value in gpt2_exact.model.state_dict().items())
    assert all(
        not parameter.requires_grad and parameter.grad is None for parameter in gpt2_exact.model.parameters()
    )
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in gpt2_exact.model.modules())


def test_progress_hears_of_every_edit_once_and_of_every_step(gpt2_exact):
    heard: list[float] = []

    class Watch:
        def task(self, title: str, total: float) -> "Watch":
            assert (title, total) == ("target values", 4)
            return self

        def __enter__(self) -> "Watch":
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def advance(self, steps: float = 1, note: str = "") -> None:
            assert note.startswith("p = " if steps else "step ")
            heard.append(steps)

    optimise_targets(gpt2_exact, REQUESTS, CONTEXTS, (1,), "block", CONFIG, Watch())
    assert sum(heard) == 4
    assert heard.count(0) >= CONFIG.steps, "and of every step in between"


def test_a_loss_that_is_not_finite_names_the_edit(tokenizer):
    model = exact(tiny.tiny_gpt2, tokenizer)
    embedding = model.model.get_input_embeddings().weight
    with torch.no_grad():  # the last token of "Marie Curie"
        embedding[model.encoder.encode(" Curie")[-1]] = float("nan")
    with pytest.raises(NumericsError, match=r"edit 'curie': the target optimisation's loss is nan at step 1"):
        optimise_targets(model, REQUESTS[:2], CONTEXTS, (0,), "block", CONFIG)


def test_a_subject_that_is_always_the_first_token_is_refused(gpt2_exact):
    with pytest.raises(RequestError, match=r"edit 'first token': the subject 'I' is the model's first token"):
        optimise_targets(gpt2_exact, REQUESTS[3:], ("",), (1,), "block", CONFIG)


def test_a_prompt_longer_than_the_model_reads_is_refused(gpt2_exact):
    long = EditRequest("The old city of {} " + "is in the city of " * 60, "Paris", "Rome")
    with pytest.raises(RequestError, match=r"tokens, the model reads 256; shorten the prompt"):
        optimise_targets(gpt2_exact, [long], CONTEXTS, (1,), "block", CONFIG)


def test_an_answer_that_no_longer_fits_behind_the_prompt_is_refused(gpt2_exact):
    def request(words: int) -> EditRequest:
        return EditRequest("The old city of {}" + " of" * words, "Paris", "Tokyo", id="long")

    answer = len(gpt2_exact.encoder.encode_target(request(1).text, "Tokyo"))
    fits = 1 + 256 - len(gpt2_exact.encoder.encode(request(1).text)) - (answer - 1)
    config = CONFIG.model_copy(update={"steps": 1})
    assert optimise_targets(gpt2_exact, [request(fits)], ("",), (1,), "block", config).steps == (1,)
    with pytest.raises(RequestError, match=r"edit 'long': .* have 257 tokens, the model reads 256"):
        optimise_targets(gpt2_exact, [request(fits + 1)], ("",), (1,), "block", config)
