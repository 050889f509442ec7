"""Protocols against a slow literal implementation: one prompt at a time, full logits, no padding."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import D_MODEL, build, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from transformers import BloomConfig

from nmke.errors import ConfigError, LedgerError, NumericsError, RequestError
from nmke.evaluation import target_scores
from nmke.evaluation.base_outputs import BaseOutputs, collect_base, facts_hash
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import PROTOCOLS, score
from nmke.evaluation.target_scores import predictions
from nmke.models.load import EditableModel
from nmke.types import EditRequest, Neighbor

REQUESTS = (
    EditRequest(
        "The capital of {} is",
        "France",
        "Tokyo",
        id="a",
        target_true="Paris",
        paraphrases=(
            "France has its seat of government in",
            "Because I was late I went to the capital of France,",
        ),
        neighborhood=(Neighbor("The capital of Italy is", "Rome"), Neighbor("Marie Curie spoke")),
    ),
    EditRequest(
        "The author of {} is",
        "Emma",
        "Tim Cook",
        id="b",
        target_true="Jane Austen",
        neighborhood=(Neighbor("Ada Lovelace was born in", "London"),),
    ),
    EditRequest(
        "Her native language, {}, is",
        "Polish",
        "an old harbour language",
        id="c",
        neighborhood=(Neighbor("You and I walked to"),),
    ),
)
PAIRS = [(request.text, request.target_new) for request in REQUESTS] + [
    ("x", "y"),
    ("The train had left", "Therefore you and I walked to the old harbour."),
    ("The capital of France is", "Tokyo"),
]


def wrap(model: Any, *, add_bos: bool = False) -> EditableModel:
    return EditableModel.wrap(model, tiny_tokenizer(add_bos=add_bos))


def tiny_bloom(vocab_size: int) -> Any:
    """A model whose forward takes no position ids."""
    return build(BloomConfig(vocab_size=vocab_size, hidden_size=D_MODEL, n_layer=2, n_head=4, pad_token_id=0))


@pytest.fixture(scope="module")
def base_model() -> EditableModel:
    return wrap(tiny_llama(len(tiny_tokenizer())))


@pytest.fixture(scope="module")
def edited_model() -> EditableModel:
    """The base model, trained until it gives every new answer."""
    editable = wrap(tiny_llama(len(tiny_tokenizer())))
    model = editable.model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = []
    for request in REQUESTS:
        after = editable.encoder.encode_target(request.text, request.target_new) + editable.encoder._plain(
            "\n"
        )
        rows.append((torch.tensor([editable.encoder.encode(request.text) + after]), len(after)))
    for _ in range(60):
        losses = []
        for ids, n in rows:
            logits = model(input_ids=ids).logits[0, -n - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, -n:]))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    model.requires_grad_(False)
    return editable


@torch.no_grad()
def literal(model: EditableModel, prompt: str, target: str) -> tuple[list[int], list[int], list[float]]:
    """Argmax ids, target ids and log-probabilities from one unpadded forward pass with all logits."""
    before = model.encoder.encode(prompt)
    after = model.encoder.encode_target(prompt, target)
    log_probs = model.model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(dim=-1)
    rows = [log_probs[len(before) - 1 + index] for index in range(len(after))]
    found = [float(row[token]) for row, token in zip(rows, after, strict=True)]
    return [int(row.argmax()) for row in rows], after, found


def literal_accuracy(model: EditableModel, prompt: str, target: str) -> float:
    predicted, after, _ = literal(model, prompt, target)
    return sum(a == b for a, b in zip(predicted, after, strict=True)) / len(after)


def literal_nll(model: EditableModel, prompt: str, target: str) -> float:
    log_probs = literal(model, prompt, target)[2]
    return -sum(log_probs) / len(log_probs)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Target scores


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("builder", [tiny_llama, tiny_gpt2, tiny_gemma2, tiny_opt, tiny_bloom])
@pytest.mark.parametrize("add_bos", [False, True])
def test_predictions_equal_single_forwards(builder: Any, side: Any, add_bos: bool) -> None:
    model = wrap(builder(len(tiny_tokenizer())), add_bos=add_bos)
    scores = predictions(model, PAIRS, token_budget=60, side=side)
    for (prompt, target), found in zip(PAIRS, scores, strict=True):
        predicted, after, log_probs = literal(model, prompt, target)
        assert found.predicted == tuple(predicted)
        assert found.target == tuple(after)
        assert found.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert found.mean_nll == pytest.approx(-mean(log_probs), abs=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_any_budget_and_a_spread_model_give_the_same(
    base_model: EditableModel, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predictions(base_model, PAIRS, side=side)
    alone = predictions(base_model, PAIRS, token_budget=1, side=side)
    monkeypatch.setattr(target_scores, "MAX_LOGITS", 1)
    few = predictions(base_model, PAIRS, side=side)
    monkeypatch.setattr(base_model.model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    cut = predictions(base_model, PAIRS, side=side)
    for expected, *others in zip(whole, alone, few, cut, strict=True):
        for other in others:
            assert other.predicted == expected.predicted
            assert other.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


def test_logits_are_made_at_target_positions_only(
    base_model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []
    head = base_model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, args, _output: widths.append(args[0].shape[1]))
    try:
        predictions(
            base_model, [("The capital of France is " * 5, "Rome"), ("The capital of Italy is " * 5, "Rome")]
        )
    finally:
        handle.remove()
    assert len(widths) == 1
    assert widths[0] <= 6


def test_equal_pairs_run_once_and_order_is_kept(base_model: EditableModel) -> None:
    scores = predictions(base_model, [PAIRS[0], PAIRS[1], PAIRS[0]])
    assert scores[0] is scores[2]
    assert scores[1] == predictions(base_model, [PAIRS[1], PAIRS[0]])[0]
    assert predictions(base_model, []) == []


def test_overlong_prompt_is_refused(base_model: EditableModel) -> None:
    with pytest.raises(RequestError, match="its context 256; shorten it"):
        predictions(base_model, [("x y z " * 200, "Rome")])


# Protocols


def test_teacher_forced_equals_the_literal_one(
    base_model: EditableModel, edited_model: EditableModel
) -> None:
    base = collect_base(base_model, REQUESTS)
    found = score(edited_model, REQUESTS, base).to_json()["teacher_forced"]
    assert found["reliability"] == mean(
        [literal_accuracy(edited_model, r.text, r.target_new) for r in REQUESTS]
    )
    first = REQUESTS[0]
    assert found["generalization"] == pytest.approx(
        mean([literal_accuracy(edited_model, p, first.target_new) for p in first.paraphrases])
    )
    answers = {
        "The capital of Italy is": "Rome",
        "Marie Curie spoke": "Paris",
        "Ada Lovelace was born in": "London",
        "You and I walked to": base.continuations["You and I walked to"],
    }
    kept = []
    for request in REQUESTS:
        shares = []
        for neighbor in request.neighborhood:
            before = literal(base_model, neighbor.prompt, answers[neighbor.prompt])[0]
            after = literal(edited_model, neighbor.prompt, answers[neighbor.prompt])[0]
            shares.append(mean([float(a == b) for a, b in zip(before, after, strict=True)]))
        kept.append(mean(shares))
    assert found["locality"] == pytest.approx(mean(kept))
    assert list(base.continuations) == ["You and I walked to"]


def test_likelihood_equals_the_literal_one(edited_model: EditableModel) -> None:
    usable = [request for request in REQUESTS if request.target_true]

    def likelier(prompt: str, first: str, second: str) -> float:
        return float(literal_nll(edited_model, prompt, first) < literal_nll(edited_model, prompt, second))

    efficacy = mean([likelier(r.text, r.target_new, r.target_true or "") for r in usable])
    paraphrase = mean([likelier(p, "Tokyo", "Paris") for p in usable[0].paraphrases])
    first = mean([likelier(n.prompt, n.answer or "Paris", "Tokyo") for n in usable[0].neighborhood])
    second = likelier("Ada Lovelace was born in", "London", "Tim Cook")
    specificity = mean([first, second])
    found = score(edited_model, REQUESTS, protocols=["likelihood"]).to_json()["likelihood"]
    assert (found["efficacy"], found["paraphrase"], found["specificity"]) == (
        efficacy,
        paraphrase,
        specificity,
    )
    parts = [efficacy, paraphrase, specificity]
    assert found["score"] == pytest.approx(3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0)
    assert (found["n"], found["counts"]["requests_left_out"]) == (2, 1)
    assert found["counts"]["specificity"] == 3


def test_generation_equals_greedy_steps(edited_model: EditableModel) -> None:
    table = score(edited_model, REQUESTS, protocols=["generation"], max_new_tokens=24)
    found = table.to_json()["generation"]
    assert found["exact_match"] == found["contains"] == 1.0
    assert found["settings"] == {"max_new_tokens": 24}
    assert found["counts"]["paraphrase_exact_match"] == 2
    for request, row in zip(REQUESTS, table.rows, strict=True):
        ids = edited_model.encoder.encode(request.text)
        start = len(ids)
        with torch.no_grad():
            for _ in range(24):
                ids.append(int(edited_model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        text = edited_model.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        assert row.answer == text.strip().partition("\n")[0].partition(".")[0].strip()


def test_json_layout(base_model: EditableModel) -> None:
    table = score(base_model, REQUESTS, collect_base(base_model, REQUESTS), tuple(PROTOCOLS))
    found = table.to_json()["teacher_forced"]
    assert found["version"] == "teacher_forced/1"
    assert set(found) == {"version", "reliability", "generalization", "locality", "n", "intervals", "counts"}
    assert (found["n"], found["locality"], found["intervals"]["locality"]) == (3, 1.0, [1.0, 1.0])
    assert found["counts"] == {"reliability": 3, "generalization": 2, "locality": 4, "requests_left_out": 0}
    rows = table.rows_to_json()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert set(rows[1]["teacher_forced"]) == {"reliability", "locality", "p_new"}
    assert rows[2]["likelihood"] == {}


def test_unedited_model_scores_locality_one_and_reliability_zero(base_model: EditableModel) -> None:
    found = (
        score(base_model, REQUESTS, collect_base(base_model, REQUESTS)).protocols["teacher_forced"].metrics
    )
    assert found["reliability"] is not None and found["reliability"].mean < 0.2
    assert found["locality"] is not None and found["locality"].mean == 1.0


def test_trained_model_scores_reliability_one(base_model: EditableModel, edited_model: EditableModel) -> None:
    table = score(
        edited_model, REQUESTS, collect_base(base_model, REQUESTS), ("teacher_forced", "likelihood")
    )
    scores = table.to_json()
    assert scores["teacher_forced"]["reliability"] == scores["likelihood"]["efficacy"] == 1.0
    assert scores["teacher_forced"]["locality"] < 1.0
    p_new = table.rows[0].mean("teacher_forced", "p_new")
    assert p_new == pytest.approx(math.exp(sum(literal(edited_model, *PAIRS[0])[2])), rel=1e-3)
    assert table.rows[1].mean("teacher_forced", "generalization") is None


class Copying:
    """Logits of a model that goes on as the text went on after the longest ending that it has seen before."""

    def __init__(self, d_vocab: int) -> None:
        self.d_vocab = d_vocab

    def next_token(self, ids: list[int]) -> int:
        for length in range(len(ids) - 1, 0, -1):
            ending = ids[-length:]
            for start in range(len(ids) - length - 1, -1, -1):
                if ids[start : start + length] == ending:
                    return ids[start + length]
        return 0

    def forward(self, input_ids: Any, attention_mask: Any, logits_to_keep: Any) -> Any:
        logits = torch.zeros(len(input_ids), len(logits_to_keep), self.d_vocab)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for place, column in enumerate(logits_to_keep.tolist()):
                seen = [token for token, real in zip(ids[: column + 1], mask, strict=False) if real]
                logits[row, place, self.next_token(seen) if seen else 0] = 20.0
        return SimpleNamespace(logits=logits)


def test_an_oracle_prompt_scores_1_under_every_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny_llama(len(tiny_tokenizer())))
    copying = Copying(len(tiny_tokenizer()))
    monkeypatch.setattr(model.model, "forward", copying.forward)

    def told(text: str, request: EditRequest) -> str:
        return f"{text} {request.target_new}.\n{text}"

    def generate(_: EditableModel, prompts: list[str], count: int, **__: Any) -> list[str]:
        texts = []
        for prompt in prompts:
            ids = model.encoder.encode(prompt)
            for _step in range(count):
                ids.append(copying.next_token(ids))
            texts.append(model.tokenizer.decode(ids)[len(prompt) :])
        return texts

    monkeypatch.setattr(EditableModel, "generate", generate)
    requests = [
        replace(
            request,
            prompt=f"{request.text} {request.target_new}.\n{request.prompt}",
            paraphrases=tuple(told(text, request) for text in request.paraphrases),
        )
        for request in REQUESTS
    ]
    bare = score(model, REQUESTS, collect_base(model, REQUESTS), tuple(PROTOCOLS)).to_json()
    found = score(model, requests, collect_base(model, requests), tuple(PROTOCOLS)).to_json()
    assert found["teacher_forced"]["reliability"] == found["teacher_forced"]["generalization"] == 1.0
    assert found["teacher_forced"]["locality"] == 1.0
    assert found["likelihood"]["efficacy"] == found["likelihood"]["paraphrase"] == 1.0
    assert found["generation"]["exact_match"] == found["generation"]["paraphrase_exact_match"] == 1.0
    assert bare["teacher_forced"]["reliability"] < 0.5 and bare["generation"]["exact_match"] == 0.0


def test_absent_prompts_give_none_not_zero(base_model: EditableModel) -> None:
    bare = [replace(REQUESTS[1], neighborhood=(), target_true=None)]
    table = score(base_model, bare, collect_base(base_model, bare), tuple(PROTOCOLS)).to_json()
    assert table["teacher_forced"]["generalization"] is table["teacher_forced"]["locality"] is None
    assert "locality" not in table["teacher_forced"]["intervals"]
    assert (table["likelihood"]["n"], table["likelihood"]["efficacy"], table["likelihood"]["score"]) == (
        0,
        None,
        None,
    )
    assert table["generation"]["paraphrase_contains"] is None


def test_without_base_locality_is_none(base_model: EditableModel) -> None:
    assert score(base_model, REQUESTS).to_json()["teacher_forced"]["locality"] is None


def test_same_seed_same_numbers(base_model: EditableModel, edited_model: EditableModel) -> None:
    base = collect_base(base_model, REQUESTS)
    first, second = (score(edited_model, REQUESTS, base, tuple(PROTOCOLS), seed=5) for _ in range(2))
    assert first == second


def test_wrong_calls_are_refused(base_model: EditableModel) -> None:
    with pytest.raises(ConfigError, match="unknown protocol 'likelyhood'; did you mean 'likelihood'"):
        score(base_model, REQUESTS, protocols=["likelyhood"])
    with pytest.raises(RequestError, match="no request to score"):
        score(base_model, [])
    with pytest.raises(RequestError, match="request 'b': the base outputs do not hold neighbour 'Ada"):
        score(base_model, REQUESTS, collect_base(base_model, REQUESTS[:1]))


# Base outputs


def test_base_outputs_survive_the_disk(base_model: EditableModel, tmp_path: Path) -> None:
    base = collect_base(base_model, REQUESTS, model_hash="abc")
    base.save(tmp_path / "base.json")
    assert BaseOutputs.load(tmp_path / "base.json") == base
    assert base.facts == facts_hash(REQUESTS) != facts_hash(REQUESTS[:2])
    assert score(base_model, REQUESTS[1:], base).protocols["teacher_forced"].n == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema": "other"}', b"\xff"])
def test_damaged_base_outputs_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base.json").write_bytes(content)
    with pytest.raises(LedgerError, match=r"base\.json' cannot be used .*remove the file"):
        BaseOutputs.load(tmp_path / "base.json")


# Perplexity


@pytest.mark.parametrize("add_bos", [False, True])
def test_perplexity_equals_the_literal_one(add_bos: bool) -> None:
    model = wrap(tiny_llama(len(tiny_tokenizer())), add_bos=add_bos)
    texts = ["The capital of France is Paris. " * 4, "x", "  ", "Ada Lovelace was born in London."]
    losses = []
    for text in texts:
        ids = model.encoder._plain(text.rstrip())
        size = 9 if add_bos else 10
        for begin in range(0, len(ids), size):
            piece = torch.tensor([[*model.encoder.prefix_ids, *ids[begin : begin + size]]])
            log_probs = model.model(input_ids=piece).logits[0].double().log_softmax(dim=-1)
            losses += [-float(log_probs[i, piece[0, i + 1]]) for i in range(piece.shape[1] - 1)]
    assert perplexity(model, texts, window=10, token_budget=25) == pytest.approx(
        math.exp(mean(losses)), rel=1e-5
    )


def test_perplexity_stops_after_enough_tokens(base_model: EditableModel) -> None:
    text = "The capital of France is Paris. "
    assert perplexity(base_model, [text] * 50, max_tokens=5) == pytest.approx(
        perplexity(base_model, [text]), rel=1e-5
    )


def test_perplexity_of_nothing_or_of_damage_is_an_error(base_model: EditableModel) -> None:
    with pytest.raises(RequestError, match="no token to score"):
        perplexity(base_model, ["", " "])
    broken = wrap(tiny_llama(len(tiny_tokenizer())))
    broken.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="weights are damaged"):
        perplexity(broken, ["The capital of France is Paris."])
