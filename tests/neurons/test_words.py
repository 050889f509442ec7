"""What neurons say and hear, against one neuron at a time."""

import torch
from tests import runs, tiny

from nmke.neurons.words import exciting_prompts, neuron_values, promoted_tokens

TEXTS = ("The capital of France is Paris", "Emma", "Because I was late, Tim Cook left", "of of of")


def test_promoted_tokens_are_the_ends_of_the_value_behind_norm_and_unembedding():
    model = runs.model()
    neurons = [(0, 3), (2, 40)]
    found = promoted_tokens(model, neuron_values(model, neurons), count=4)
    trunk = model.model.model
    for (layer, index), words in zip(neurons, found, strict=True):
        value = trunk.layers[layer].mlp.down_proj.weight[:, index]
        logits = model.model.lm_head.weight @ (trunk.norm.weight * value)
        logits = logits - logits.mean()
        top = logits.argsort(descending=True)[:4].tolist()
        bottom = logits.argsort()[:4].tolist()
        assert [token for token, _ in words.positive] == [model.tokenizer.decode([t]) for t in top]
        assert [token for token, _ in words.negative] == [model.tokenizer.decode([t]) for t in bottom]
        shown = torch.tensor([logit for _, logit in words.positive])
        torch.testing.assert_close(shown, logits[top], rtol=1e-4, atol=1e-5)
        assert all(logit > 0 for _, logit in words.negative)


def test_exciting_prompts_are_the_texts_with_the_largest_coefficient():
    model = runs.model()
    neurons = [(1, 0), (1, 9), (3, 5)]
    found = exciting_prompts(model, neurons, TEXTS, count=2)
    for layer, index in neurons:
        best = []
        for text in TEXTS:
            seen = []
            down = model.layout.layers[layer].down_proj
            handle = down.register_forward_pre_hook(
                lambda _m, args, seen=seen: seen.append(args[0][0].clone())
            )
            ids = model.encoder.encode(text)
            with torch.no_grad():
                model.model(torch.tensor([ids]))
            handle.remove()
            column = seen[0][1:, index]  # without the first token
            if len(column):
                at = int(column.abs().argmax())
                best.append((float(column[at]), model.tokenizer.decode(ids[: at + 2])))
        best.sort(key=lambda pair: -abs(pair[0]))
        for place, (value, text) in zip(found[layer, index], best[:2], strict=True):
            assert abs(place.coefficient - value) < 1e-4 and place.text == text
            assert text.endswith(place.token)


def test_a_model_that_pads_left_or_has_bos_is_read_the_same():
    tokenizer = tiny.tiny_tokenizer(add_bos=True, padding_side="left")
    from nmke.models.load import EditableModel

    model = EditableModel.wrap(runs.loud_llama(vocab_size=len(tokenizer)), tokenizer)
    alone = exciting_prompts(model, [(0, 1)], TEXTS[:1], count=1)[0, 1][0]
    among = [
        place for place in exciting_prompts(model, [(0, 1)], TEXTS, count=4)[0, 1] if "capital" in place.text
    ]
    assert abs(alone.coefficient - among[0].coefficient) < 1e-4 and alone.text == among[0].text
