"""What neurons read through is found by asking the MLP, or refused."""

import pytest
import torch
from tests import tiny
from tests.models.families import tiny_family
from torch import nn

from nmke.errors import LayoutError
from nmke.models.layout import probe_layout
from nmke.models.read_in import find_read_in
from nmke.models.weights import DownProjection


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gemma2, tiny.tiny_gemma3, tiny.tiny_qwen2])
def test_gate_and_up_are_told_apart(build):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in probe_layout(model).layers:
        found = layer.read_in
        assert found.gate is layer.mlp.gate_proj and found.up is layer.mlp.up_proj
        assert found.gate_name == f"{layer.block_name}.mlp.gate_proj"
        assert found.up_name == f"{layer.block_name}.mlp.up_proj"
        assert found.behind_activation is layer.mlp.gate_proj
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_gptj, tiny.tiny_gptneox, tiny.tiny_falcon])
def test_an_mlp_without_gate_has_one_reading_matrix(build):
    layer = probe_layout(build()).layers[1]
    names = {"c_fc", "fc_in", "dense_h_to_4h"}
    assert layer.read_in.gate is None and layer.read_in.up_name.rpartition(".")[2] in names
    assert layer.read_in.behind_activation is layer.read_in.up is layer.linear("up")[0]
    with pytest.raises(LayoutError, match=r"the gate of layer '.*' was asked for; its MLP has none"):
        layer.matrix("gate")


def test_a_fused_gate_is_refused():
    layer = probe_layout(tiny_family("phi3")).layers[0]
    with pytest.raises(
        LayoutError, match=r"linear layers of shape \[64, 32\] were needed; found .*gate_up_proj"
    ):
        layer.matrix("up")
    assert isinstance(layer.matrix("down"), DownProjection)


def test_parts_that_lie_in_the_block_itself_are_refused():
    layer = probe_layout(tiny.tiny_opt()).layers[0]
    with pytest.raises(LayoutError, match="without a module around them"):
        layer.matrix("up")


class Mlp(nn.Module):
    """Two or one reading matrices, joined by any function."""

    def __init__(self, join, count=2):
        super().__init__()
        self.join, self.reading = join, nn.ModuleList(nn.Linear(4, 6) for _ in range(count))
        self.down = nn.Linear(6, 4)

    def forward(self, hidden):
        return self.down(self.join(*(linear(hidden) for linear in self.reading)))


@pytest.mark.parametrize(
    "act", [torch.relu, torch.tanh, nn.functional.silu, lambda x: torch.relu(x).square()]
)
def test_any_activation_gives_the_gate_away(act):
    mlp = Mlp(lambda a, b: b * act(a))
    assert find_read_in(mlp, mlp.down, "block.mlp.down").gate_name == "block.mlp.reading.0"
    assert find_read_in(mlp, mlp.down, "block.mlp.down").up_name == "block.mlp.reading.1"


@pytest.mark.parametrize(
    ("join", "count", "message"),
    [
        (lambda a, b: a * b, 2, "2 of 2 linear layers multiply the coefficient"),
        (lambda a, b: torch.relu(a + b), 2, "0 of 2 linear layers multiply the coefficient: none"),
        (lambda a: a, 1, "1 of 1 linear layers multiply"),
        (lambda a: torch.softmax(a, -1), 1, "does not depend on its own row alone"),
        (lambda a, b, c: a * torch.relu(b) + c, 3, "one or two linear layers of shape"),
    ],
)
def test_other_mlps_are_refused(join, count, message):
    mlp = Mlp(join, count)
    with pytest.raises(LayoutError, match=message):
        find_read_in(mlp, mlp.down, "mlp.down")
