"""ConvLoRA: its view of the product, ranks and refusals."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import Row
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "ConvLoRA": lt.ConvLoRA(rank=rank or 2, alpha=3),
        "ConvLoRA kept": lt.ConvLoRA(rank=rank or 2, cache_delta=True),
    },
    count=lambda site, rank: rank * site.module.kernel_size[0] * (site.inputs // site.module.kernel_size[0] + site.outputs * site.module.kernel_size[0]),
    served=("Conv2d", "Conv2d strided, dilated", "Conv2d same", "Conv2d reflect", "Conv2d replicate"),
    refusal="is no Conv2d with a square kernel and one group",
)  # fmt: skip

PLANTED = [
    ("scale left out", "scale(self.alpha, t.A.shape[0] // k, False) * t.B", "t.B"),
    ("scale of rank times kernel", "t.A.shape[0] // k, False", "t.A.shape[0], False"),
    ("taps aligned", ").reshape(t.shape)", ").reshape(-1, k, t.A.shape[1] // k, k).transpose(1, 2).reshape(t.shape)"),
    ("sign of the update", "(scale(self.alpha", "(-scale(self.alpha"),
]


def test_convolution_is_the_formula():
    x = torch.randn(2, 5, 7, 6).double()
    model, t = adapted(nn.Conv2d(5, 4, 3, padding=1), lt.ConvLoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (6, 15), "B": (12, 6)}
    K = model[0].weight + 3 * (t["B"] @ t["A"]).view(4, 5, 3, 3)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, K, model[0].bias, padding=1))


def test_rank_1_reaches_nine_as_a_matrix():
    model, t = adapted(nn.Conv2d(16, 16, 3, bias=False), lt.ConvLoRA(rank=1))
    W = model[0].weight.detach().clone()
    lt.merge(model, probe=torch.randn(1, 16, 4, 4).double())
    assert torch.linalg.matrix_rank(t["B"] @ t["A"]) == 3
    assert torch.linalg.matrix_rank((model[0].weight.detach() - W).reshape(16, -1)) == 9


def test_counts_of_the_papers_table():
    with torch.device("meta"):
        blocks = {f"c{i}": nn.Conv2d(26, 26, 3) for i in range(18)}
        model = nn.ModuleDict(blocks | {"conv_2": nn.Conv2d(26, 26, 3), "up": nn.Conv2d(26, 48, 3)})
    lt.adapt(model, lt.ConvLoRA(rank=2, alpha=4), "conv", per_layer={"conv_2": {"rank": 8}, "up": {"rank": 8}})
    assert lt.summary(model).trained == 25_920


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, (3, 1)), nn.Conv3d(4, 4, 3)],
)
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match=r"layer '0' .* is no Conv2d with a square kernel and one group"):
        lt.adapt(nn.Sequential(layer), lt.ConvLoRA(), "0")


@pytest.mark.parametrize(("options", "message"), [({"rank": 0}, "rank is 0"), ({"alpha": 0}, "alpha is 0")])
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.ConvLoRA(**options)
