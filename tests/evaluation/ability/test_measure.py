"""Tasks on tiny models: the harness in this process against literal forward passes and its own model wrapper."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_gemma2, tiny_llama, tiny_tokenizer

from nmke.errors import RequestError
from nmke.evaluation.ability import lm, measure
from nmke.evaluation.target_scores import next_token_scores
from nmke.facts import locate
from nmke.models.load import EditableModel

PASSAGES = [
    "You and I walked to the old harbour",
    "The capital of France is Paris",
    "Marie Curie spoke Polish",
]
QUESTIONS = [
    {
        "question": "The capital of France is",
        "choices": ["Paris", "the old harbour", "a train", "x"],
        "answer": 0,
    },
    {"question": "Marie Curie spoke", "choices": ["Polish", "Tokyo", "y y y", "the"], "answer": 2},
    {"question": "Ada Lovelace was born in", "choices": ["London", "Rome", "of", "The"], "answer": 3},
]


def wrap(builder: Any = tiny_llama, **changes: Any) -> EditableModel:
    return EditableModel.wrap(builder(len(tiny_tokenizer()), **changes), tiny_tokenizer())


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return wrap()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a few records of ours."""

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("bench_arc_easy_test.jsonl", QUESTIONS)
    write("bench_mmlu.jsonl", [{**q, "subject": f"s{i}"} for i, q in enumerate(QUESTIONS)])
    write("bench_lambada_test.jsonl.gz", [{"text": text} for text in PASSAGES])
    write(
        "bench_winogrande_dev.jsonl",
        [{"question": "The _ had left the old harbour.", "choices": ["train", "capital"], "answer": 1}],
    )
    solved = [{"question": f"{n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    write("bench_gsm8k_train200.jsonl", solved)
    write("bench_gsm8k_test.jsonl", [{"question": "999+1?", "answer": "So 1,000\n#### 1,000"}] * 3)
    write(
        "bench_bbh.jsonl.gz",
        [
            {"task": "t", "input": f"q{n}", "target": target}
            for n, target in enumerate(["True", "(A)", "] }"])
        ],
    )
    monkeypatch.setattr(locate, "_folders", lambda: [tmp_path])
    return tmp_path


@torch.no_grad()
def literal(model: EditableModel, prompt: str, answer: str) -> tuple[float, bool]:
    """Log-probability and greediness of an answer, one unpadded forward pass with all logits."""
    before, after = model.encoder.encode(prompt), model.encoder.encode_target(prompt, answer)
    rows = model.model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(dim=-1)
    picked = rows[len(before) - 1 : -1]
    found = sum(float(row[token]) for row, token in zip(picked, after, strict=True))
    return found, [int(row.argmax()) for row in picked] == after


def test_choice_accuracy_equals_the_literal_one(model: EditableModel, data: Path) -> None:
    found = measure(model, "arc_easy")
    hits, hits_norm = [], []
    for q in QUESTIONS:
        prompt = f"Question: {q['question']}\nAnswer:"
        scores = [literal(model, prompt, text)[0] for text in q["choices"]]
        lengths = [len(text) for text in q["choices"]]
        norm = [score / length for score, length in zip(scores, lengths, strict=True)]
        hits.append(float(scores.index(max(scores)) == q["answer"]))
        hits_norm.append(float(norm.index(max(norm)) == q["answer"]))
    assert found.values["acc"] == tuple(hits)
    assert found.values["acc_norm"] == tuple(hits_norm)
    assert (found.n, found.version, found.chance) == (3, "nmke_arc_easy/1", 0.25)
    assert found.metrics["acc"].mean == pytest.approx(sum(hits) / 3)
    assert found.to_json()["intervals"]["acc"][0] <= found.metrics["acc"].mean


def test_letters_are_scored_behind_the_question(model: EditableModel, data: Path) -> None:
    found = measure(model, "mmlu")
    for q, value in zip(QUESTIONS, found.values["acc"], strict=True):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", q["choices"], strict=True))
        prompt = f"{q['question']}\n{options}\nAnswer:"
        scores = [literal(model, prompt, letter)[0] for letter in "ABCD"]
        assert value == float(scores.index(max(scores)) == q["answer"])


def test_lambada_counts_greedy_words_and_gives_perplexity(model: EditableModel, data: Path) -> None:
    found = measure(model, "lambada")
    hits = [literal(model, *text.rsplit(" ", 1)) for text in PASSAGES]
    assert found.values["acc"] == tuple(float(greedy) for _, greedy in hits)
    mean = -sum(score for score, _ in hits) / 3
    assert found.metrics["perplexity"].mean == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-3)


def test_winogrande_scores_one_ending_behind_either_filling(model: EditableModel, data: Path) -> None:
    found = measure(model, "winogrande")
    scores = [literal(model, f"The {name}", "had left the old harbour.")[0] for name in ("train", "capital")]
    assert found.values["acc"] == (float(scores.index(max(scores)) == 1),)


def test_generated_answers_are_trimmed_before_they_are_compared(
    model: EditableModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def said(answers: list[str]) -> Any:
        def continue_prompts(_model: Any, asked: list[str], decoding: Any) -> list[str]:
            prompts.extend(asked)
            return [decoding.cut(text) for text in answers]

        return continue_prompts

    monkeypatch.setattr(lm, "continue_prompts", said(["  true.\nQ: more", " (B)", " ] }"]))
    assert measure(model, "bbh").values["exact_match"] == (1.0, 0.0, 1.0)
    assert prompts == ["Q: q0\nA:", "Q: q1\nA:", "Q: q2\nA:"]
    monkeypatch.setattr(
        lm, "continue_prompts", said([" 999 + 1 = 1,000.", " It is 1000.00\n\nQuestion: 5?", " about 10"])
    )
    assert measure(model, "gsm8k").values["exact_match"] == (1.0, 1.0, 0.0)
    assert prompts[-1].count("Question:") == 6 and "4+1?\nAnswer: It is 5.\n#### 5" in prompts[-1]


def test_same_seed_same_numbers_and_random_states_are_left_alone(model: EditableModel, data: Path) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = (measure(model, "arc_easy", limit=2, seed=1) for _ in range(2))
    assert (first.values, first.metrics) == (second.values, second.metrics)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("builder", [tiny_llama, tiny_gemma2])
def test_next_tokens_equal_single_forwards_under_both_padding_sides(builder: Any, side: Any) -> None:
    model = wrap(builder)
    contexts = [tuple(model.encoder.encode(text)) for text in (*PASSAGES, "x", PASSAGES[0])]
    options = [[3, 9], [5], [0, 1, 2], [7], [9]]
    for budget in (1, 30, 4096):
        found = next_token_scores(model, contexts, options, budget, side)
        for context, asked, scores in zip(contexts, options, found, strict=True):
            with torch.no_grad():
                row = model.model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(dim=0)
            assert [s for s, _ in scores] == pytest.approx([float(row[t]) for t in asked], abs=1e-4)
            assert [best for _, best in scores] == [int(row.argmax()) == token for token in asked]


@pytest.mark.parametrize("add_bos", [False, True])
def test_likelihoods_agree_with_the_harness_own_wrapper(add_bos: bool) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    model = EditableModel.wrap(tiny_llama(len(tokenizer)), tokenizer)
    own = huggingface.HFLM(
        pretrained=model.model, tokenizer=tiny_tokenizer(add_bos=add_bos), batch_size=2, add_bos_token=add_bos
    )
    pairs = [(q["question"], " " + text) for q in QUESTIONS for text in q["choices"]]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    ours = lm.HarnessModel(model, token_budget=40).loglikelihood(requests)
    theirs = own.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_whole_texts_are_scored_as_by_the_harness_own_wrapper() -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = tiny_tokenizer(add_bos=True)
    model = EditableModel.wrap(tiny_llama(len(tokenizer)), tokenizer)
    own = huggingface.HFLM(  # it puts BOS in front itself, and would count a second one
        pretrained=model.model, tokenizer=tiny_tokenizer(add_bos=True), add_bos_token=False, max_length=512
    )
    requests = [SimpleNamespace(args=(text,)) for text in PASSAGES]
    assert lm.HarnessModel(model).loglikelihood_rolling(requests) == pytest.approx(
        own.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3
    )


def test_long_prompts_lose_their_beginning(model: EditableModel) -> None:
    long = "old harbour " * 400
    context, answer = lm.HarnessModel(model)._tokens(long, " Rome")
    assert len(context) + len(answer) == model.context_length
    assert list(context) == model.encoder.encode(long)[-len(context) :]


def test_missing_data_says_how_to_get_it(model: EditableModel, data: Path) -> None:
    with pytest.raises(
        RequestError, match=r"task 'piqa' needs bench_piqa_valid\.jsonl or .*`nmke data get piqa`"
    ):
        measure(model, "piqa")
