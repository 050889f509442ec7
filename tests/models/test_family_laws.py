"""The families that people edit most: the layout is found, edits hit, masks hold, undo is exact, padding agrees."""

from pathlib import Path

import pytest
from tests.models.family_laws import LINEAR, SETTINGS, padding_gap, tiny_editable, try_family
from torch import Tensor
from transformers import GPT2LMHeadModel

from nmke.errors import LayoutError
from nmke.models.layout import probe_layout

FAMILIES = {
    "gpt2": "transformer.h.0.mlp.c_proj",
    "gptj": "transformer.h.0.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.0.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.0.fc2",
    "llama": "model.layers.0.mlp.down_proj",
    "mistral": "model.layers.0.mlp.down_proj",
    "qwen2": "model.layers.0.mlp.down_proj",
    "qwen3": "model.layers.0.mlp.down_proj",
    "gemma2": "model.layers.0.mlp.down_proj",
    "gemma3_text": "model.layers.0.mlp.down_proj",
    "phi": "model.layers.0.mlp.fc2",
    "olmo": "model.layers.0.mlp.down_proj",
}


HIDDEN = ("opt",)  # families whose layers do not show what their neurons read


@pytest.mark.parametrize("settings", [SETTINGS, LINEAR], ids=["own neurons", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_laws_of_a_family(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    found = try_family(family, tmp_path, **settings)
    assert found.method == ("nmke-linear" if settings is LINEAR or family in HIDDEN else "nmke")
    assert (found.n_layers, found.down_proj) == (2, FAMILIES[family])
    assert found.gained > 1.0, "both answers gain more than a nat"
    most = 1 / 64 if found.method == "nmke" else 0.25
    assert 0 < found.changed <= most, "an edit changes its own neurons' columns and no other"
    assert found.others_changed == ()
    assert found.undone
    assert found.padding_gap < 1e-4


def test_padding_with_wrong_positions_is_noticed() -> None:
    class WithoutPositions(GPT2LMHeadModel):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object
        ) -> object:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model = tiny_editable("gpt2")
    assert padding_gap(model) < 1e-4
    model.model.__class__ = WithoutPositions  # it now counts padding as positions
    assert padding_gap(model) > 1e-2
    with pytest.raises(LayoutError, match="text behind padding gives other logits than text alone"):
        probe_layout(model.model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe"])
def test_a_mixture_of_experts_is_told_what_it_would_need(family: str) -> None:
    with pytest.raises(
        LayoutError,
        match=r"of shape \[4, .*mixture of experts.*need a down-projection, key statistics .* for every expert.*"
        r"use a dense model",
    ):
        tiny_editable(family)
