"""The default model: the gradient's scores agree with silencing neurons one by one."""

import pytest
import torch

from nmke.attribution.ablation import ablate
from nmke.config import EditConfig
from nmke.facts import bundled_facts
from nmke.models.load import load_model
from nmke.neurons import survey
from nmke.neurons.agreement import spearman


@pytest.mark.model
def test_gradient_ranks_neurons_as_ablation_does_and_the_papers_score_does_not():
    model = load_model("smollm2-135m", device="cpu")
    config = EditConfig.create()
    found = survey(model, bundled_facts()[:3], ("",), ("gradient", "lps"), config, [5])
    chosen = torch.arange(0, 1536, 24)
    truth = ablate(found.readout, 5, chosen)
    assert (spearman(found.scores["gradient"][5][:, chosen], truth) > 0.95).all()
    assert spearman(found.scores["lps"][5][:, chosen], truth).mean() < 0.4
