"""Reading in parts gives what one readout gives."""

import pytest
import torch
from tests import runs, tiny
from tests.exact import exact

from nmke.attribution import neuron_scores, parts, read_out
from nmke.models.tokens import pad_batch

IDS = [[70, 71, 72, 73, 74, 75, 76], [80, 81], [90, 91, 92, 93], [60, 61, 62], [65, 66, 67, 68, 69]]


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gemma2], ids=["llama", "gemma2"])
@pytest.mark.parametrize("columns", [None, [3, 1, 0, 2, 2]], ids=["last", "chosen"])
def test_parts_join_in_the_order_given(builder, columns, monkeypatch):
    model = exact(builder, attn_logit_softcapping=None) if builder is tiny.tiny_gemma2 else exact(builder)
    at = None if columns is None else torch.tensor(columns)
    whole = read_out(model, pad_batch(IDS, 0), [0, 1], at)
    monkeypatch.setattr(parts, "LEAST_TOKENS", 8)
    monkeypatch.setattr(parts, "FLOATS", 0)
    found = parts.read_rows(model, IDS, [0, 1], columns)
    assert torch.equal(found.targets, whole.targets) and found.rerun.rows == whole.rerun.rows
    for layer in (0, 1):
        for name in ("lps", "mpc", "contribution", "gradient", "ablation"):
            score = neuron_scores.get(name)
            torch.testing.assert_close(
                score(found, layer, 30.0), score(whole, layer, 30.0), rtol=1e-7, atol=1e-9
            )


def test_one_part_is_a_plain_readout_bit_for_bit():
    model = runs.model()
    whole = read_out(model, pad_batch(IDS, model.encoder.pad_id), [0, 2], None, torch.tensor([5, 6, 7, 8, 9]))
    found = parts.read_rows(model, IDS, [0, 2], None, torch.tensor([5, 6, 7, 8, 9]))
    assert torch.equal(found.finals, whole.finals) and torch.equal(found.targets, whole.targets)
    assert all(torch.equal(found.coefficients[i], whole.coefficients[i]) for i in (0, 2))
