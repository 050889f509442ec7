"""LPS, PSA and MPC against per-neuron evaluation of the formula: one prompt, one neuron, one softmax at a time."""

import copy
import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from tests import tiny
from tests.exact import exact
from tests.tiers import sampled
from torch import Tensor, nn

from nmke.attribution import log_prob, neuron_scores, read_out
from nmke.attribution.base import Readout, _indirect_write
from nmke.errors import ConfigError, LayoutError
from nmke.models.load import EditableModel
from nmke.models.norms import FrozenNorm
from nmke.models.tokens import pad_batch
from nmke.models.weights import written_matrix

PROMPTS = (
    "The capital of France is",
    "Ada Lovelace was born in the old city of",
    "Because I was late, Tim Cook",
    "Emma",
)


@dataclass(frozen=True)
class Family:
    """Where the literal version finds, by name, what the engine finds by probing."""

    builder: object
    blocks: str
    middle: (
        str  # module whose input is the stream between attention and MLP, or the attention of parallel blocks
    )
    final_norm: str
    post_norm: str = ""
    factor: float = 1.0
    parallel: bool = False


FAMILIES = {
    "llama": Family(tiny.tiny_llama, "model.layers", "post_attention_layernorm", "model.norm"),
    "gpt2": Family(tiny.tiny_gpt2, "transformer.h", "ln_2", "transformer.ln_f"),
    "opt": Family(
        tiny.tiny_opt, "model.decoder.layers", "final_layer_norm", "model.decoder.final_layer_norm"
    ),
    "gptneox": Family(
        tiny.tiny_gptneox, "gpt_neox.layers", "attention", "gpt_neox.final_layer_norm", parallel=True
    ),
    "gemma2": Family(
        tiny.tiny_gemma2,
        "model.layers",
        "pre_feedforward_layernorm",
        "model.norm",
        "post_feedforward_layernorm",
    ),
    "gemma3": Family(
        tiny.tiny_gemma3,
        "model.layers",
        "pre_feedforward_layernorm",
        "model.norm",
        "post_feedforward_layernorm",
    ),
    "granite": Family(
        tiny.tiny_granite, "model.layers", "post_attention_layernorm", "model.norm", factor=0.5
    ),
}


@dataclass
class Subject:
    """A family's model, its prompts, and what one plain forward per prompt leaves behind."""

    family: Family
    model: EditableModel
    ids: list[list[int]]
    seen: list[dict[str, Tensor]]  # per prompt: inputs and outputs of named modules, [seq ...]
    logits: list[Tensor]

    def block(self, layer: int) -> nn.Module:
        return self.model.model.get_submodule(f"{self.family.blocks}.{layer}")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    family = FAMILIES[request.param]
    caps = {
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": None,
    }  # SDPA knows none in the attention
    changes = caps if request.param == "gemma2" else {}
    model = exact(family.builder, **changes)
    ids = [model.encoder.encode(prompt) for prompt in PROMPTS]
    runs = [record(model, row) for row in ids]
    return Subject(family, model, ids, [run[0] for run in runs], [run[1] for run in runs])


def record(model: EditableModel, ids: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}

    def hook_for(path: str):
        def hook(_module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states")
            made = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(made, Tensor):
                flat = given.ndim == 2  # OPT runs its MLP on [batch*seq d_model]
                pair = (given, made) if flat else (given[0], made[0])
                seen[f"{path} in"], seen[f"{path} out"] = pair[0].clone(), pair[1].clone()

        return hook

    handles = [
        module.register_forward_hook(hook_for(path), with_kwargs=True)
        for path, module in model.model.named_modules()
        if path
    ]
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return seen, logits


def middle(subject: Subject, prompt: int, layer: int, at: int) -> Tensor:
    """x: the residual stream after attention and before the MLP."""
    path, seen = f"{subject.family.blocks}.{layer}", subject.seen[prompt]
    if subject.family.parallel:
        return (seen[f"{path} in"] + seen[f"{path}.{subject.family.middle} out"])[at]
    return seen[f"{path}.{subject.family.middle} in"][at]


def probed(subject: Subject) -> tuple[Tensor, Tensor | None, float]:
    """The final norm's parameters as the engine's probe finds them (in float32)."""
    norm = FrozenNorm.probe(subject.model.layout.final_norm, subject.model.layout.d_model)
    return norm.weight.double(), None if norm.bias is None else norm.bias.double(), norm.eps


def own(subject: Subject) -> tuple[Tensor, Tensor | None, float]:
    """The final norm's own parameters."""
    norm = subject.model.model.get_submodule(subject.family.final_norm)
    return getattr(norm, "offset", 0.0) + norm.weight, getattr(norm, "bias", None), norm.eps


def literal_scores(
    subject: Subject,
    layer: int,
    scale: str,
    amplification: float,
    norm: tuple[Tensor, Tensor | None, float],
    columns: list[int] | None = None,
    targets: list[int] | None = None,
) -> Tensor:
    """S[b, i] as METHOD section 3 has it: one evaluation of f per prompt and neuron."""
    weight, bias, eps = norm
    model, path = subject.model, f"{subject.family.blocks}.{layer}"
    down = model.layout.layers[layer].down_proj
    down_path = model.layout.layers[layer].down_proj_name
    values = written_matrix(down)
    unembedding = model.model.get_output_embeddings().weight
    rows = []
    for prompt, seen in enumerate(subject.seen):
        at = len(subject.ids[prompt]) - 1 if columns is None else columns[prompt]
        final = seen[f"{subject.family.final_norm} in"][at]
        layer_norm = bias is not None
        mean = final.mean() if layer_norm else torch.zeros((), dtype=torch.float64)
        statistic = ((final - mean).square().mean() + eps).rsqrt()

        def log_p(u: Tensor, mean: Tensor = mean, statistic: Tensor = statistic) -> Tensor:
            normed = weight * (u - mean) * statistic + (0.0 if bias is None else bias)
            raw = unembedding @ normed
            return torch.log_softmax(model.layout.logit_map.apply(raw), 0)

        x = middle(subject, prompt, layer, at)
        coefficient = seen[f"{down_path} in"][at]
        write = torch.full_like(x, subject.family.factor)
        if subject.family.post_norm:
            post = subject.block(layer).get_submodule(subject.family.post_norm)
            given = seen[f"{path}.{subject.family.post_norm} in"][at]
            write = (post.offset + post.weight) * (given.square().mean() + post.eps).rsqrt()
        y = int(subject.logits[prompt][at].argmax()) if targets is None else targets[prompt]
        before = float(log_p(x)[y])
        row = []
        for neuron in range(values.shape[1]):
            moved = x + amplification * coefficient[neuron] * write * values[:, neuron]
            low, high = math.log(1e-8), math.log(1 - 1e-8)
            a, b = (min(max(value, low), high) for value in (float(log_p(moved)[y]), before))
            row.append(a - b if scale == "log" else math.exp(a) - math.exp(b))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def read(subject: Subject, side: str = "right", **options: Tensor) -> Readout:
    batch = pad_batch(subject.ids, subject.model.encoder.pad_id, side)
    return read_out(subject.model, batch, [0, 1], **options)


@pytest.mark.parametrize("amplification", [30.0, 400.0])
@pytest.mark.parametrize("name, scale", [("lps", "log"), ("psa", "linear")])
def test_scores_equal_one_evaluation_per_prompt_and_neuron(subject, name, scale, amplification):
    readout = read(subject)
    for layer in (0, 1):
        scores = neuron_scores.get(name)(readout, layer, amplification)
        expected = literal_scores(subject, layer, scale, amplification, probed(subject))
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        plain = literal_scores(subject, layer, scale, amplification, own(subject))  # the probe reads float32
        torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ["lps", "psa"])
def test_the_fused_path_gives_the_same_scores(subject, name, monkeypatch):
    readout = read(subject)
    chunked = [neuron_scores.get(name)(readout, layer, 30.0) for layer in (0, 1)]
    monkeypatch.setattr(log_prob, "runs_fused", lambda tensor: True)
    for layer, expected in enumerate(chunked):
        scores = neuron_scores.get(name)(readout, layer, 30.0)
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_probabilities_are_clamped_where_the_write_is_huge(subject):
    scores = neuron_scores.get("lps")(read(subject), 1, 1e5)
    expected = literal_scores(subject, 1, "log", 1e5, probed(subject))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    lowest = float(expected.min())
    assert (expected < lowest + 1).any() and lowest > math.log(1e-8)
    assert float(scores.max()) <= -math.log(1e-8) + 1e-9


def test_padding_side_does_not_matter(subject):
    right, left = read(subject, "right"), read(subject, "left")
    assert torch.equal(right.targets, left.targets)
    for layer in (0, 1):
        scores = [neuron_scores.get("lps")(r, layer, 30.0) for r in (right, left)]
        torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)
    last = [logits[-1].argmax() for logits in subject.logits]
    assert torch.equal(right.targets, torch.stack(last))


@pytest.mark.parametrize("side", ["right", "left"])
def test_another_column_and_another_target_are_scored(subject, side):
    index, targets = [2, 4, 1, 0], [5, 70, 11, 300]
    batch = pad_batch(subject.ids, subject.model.encoder.pad_id, side)
    columns = torch.tensor([batch.column(row, i) for row, i in enumerate(index)])
    readout = read(subject, side, columns=columns, targets=torch.tensor(targets))
    scores = neuron_scores.get("lps")(readout, 0, 30.0)
    expected = literal_scores(subject, 0, "log", 30.0, probed(subject), index, targets)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_middle_is_the_stream_between_attention_and_mlp(subject):
    readout = read(subject)
    for layer in (0, 1):
        at = [len(row) - 1 for row in subject.ids]
        expected = torch.stack([middle(subject, b, layer, at[b]) for b in range(len(at))])
        torch.testing.assert_close(readout.middles[layer], expected, rtol=1e-9, atol=1e-9)


def test_chunks_of_neurons_give_the_same_scores(subject, monkeypatch):
    readout = read(subject)
    whole = neuron_scores.get("lps")(readout, 1, 30.0)
    monkeypatch.setattr(log_prob, "CHUNK_FLOATS", 7 * subject.model.layout.d_vocab)
    torch.testing.assert_close(neuron_scores.get("lps")(readout, 1, 30.0), whole, rtol=1e-12, atol=1e-12)


def test_reading_changes_nothing_in_the_model(subject):
    before = {name: value.clone() for name, value in subject.model.model.state_dict().items()}
    neuron_scores.get("psa")(read(subject), 0, 30.0)
    after = subject.model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in subject.model.model.modules()
    )


def test_mpc_is_the_down_projections_input(subject):
    scores = neuron_scores.get("mpc")(read(subject), 1, 30.0)
    path = subject.model.layout.layers[1].down_proj_name
    expected = torch.stack([seen[f"{path} in"][-1] for seen in subject.seen])
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_middle_of_a_llama_by_hand():
    model = exact(tiny.tiny_llama)
    ids = model.encoder.encode(PROMPTS[0])
    trunk = model.model.model
    hidden = trunk.embed_tokens(torch.tensor([ids]))
    positions = torch.arange(len(ids))[None]
    rotary = trunk.rotary_emb(hidden, positions)
    causal = torch.full((1, 1, len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
    block = trunk.layers[0]
    attended, _ = block.self_attn(
        block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=causal
    )
    expected = (hidden + attended)[0, -1]
    readout = read_out(model, pad_batch([ids], 0), [0])
    torch.testing.assert_close(readout.middles[0][0], expected, rtol=1e-9, atol=1e-9)


def test_bfloat16_scores_follow_the_float32_ones():
    wanted = tiny.tiny_tokenizer()
    models = [
        EditableModel.wrap(tiny.tiny_llama(len(wanted)).to(dtype), wanted)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    batch = pad_batch([models[0].encoder.encode(prompt) for prompt in PROMPTS], 0)
    targets = torch.tensor([5, 6, 7, 8])
    full, half = (neuron_scores.get("lps")(read_out(m, batch, [1], None, targets), 1, 30.0) for m in models)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("amplification", sampled([0.3, 3.0, 30.0], lambda one: one != 3.0))
def test_float32_scores_equal_the_literal_ones(subject, amplification):
    """In float32 small steps go through a series in place of the exponential."""
    twin = copy.deepcopy(subject.model.model).float()
    readout = read_out(
        EditableModel.wrap(twin, subject.model.tokenizer),
        pad_batch(subject.ids, subject.model.encoder.pad_id),
        [0, 1],
    )
    targets = read(subject).targets.tolist()
    readout = dataclasses.replace(readout, targets=torch.tensor(targets))
    for layer in (0, 1):
        scores = neuron_scores.get("lps")(readout, layer, amplification)
        expected = literal_scores(subject, layer, "log", amplification, own(subject), targets=targets)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("bound", log_prob.SERIES_BOUNDS)
def test_series_of_the_exponential_stays_within_its_error(bound):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(4, 100, generator=generator), dim=1)
    slope = torch.randn(30, 100, generator=generator)
    steps = 2 * torch.rand(4, 30, generator=generator) - 1
    steps = bound * steps / slope.abs().amax(dim=1)
    found = log_prob._by_series(probabilities, slope, steps, bound)
    probabilities, slope, steps = probabilities.double(), slope.double(), steps.double()
    reach = steps[:, :, None] * slope  # [prompts neurons d_vocab]
    expected = (probabilities[:, None] * reach.exp()).sum(dim=2).log()
    assert reach.abs().max() > 0.9 * bound
    assert (found - expected).abs().max() < 1e-5
    plain = log_prob._by_exponential(probabilities, slope, steps)
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-12)


def test_a_map_that_mixes_channels_behind_the_down_projection_is_refused():
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LayoutError, match=r"neither a factor nor an RMS norm.*--mask none"):
        _indirect_write(lambda written: written @ mixing, torch.ones(3, 8))


def test_unknown_score_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown attribution score 'lsp'; did you mean 'lps'"):
        neuron_scores.get("lsp")
    assert set(neuron_scores.names()) == {
        "ablation",
        "contribution",
        "gradient",
        "integrated",
        "lps",
        "mpc",
        "psa",
    }
