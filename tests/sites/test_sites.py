"""Each site shows its layer as a matrix: shapes, read and write, products in the layer's own geometry."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loratory as lt
from loratory.sites import Site, find_site, is_supported
from tests.laws.kinds import KINDS, Kind

SHAPES = {  # (*stack, out, in) of the layer `first`, written by hand
    "Linear": (12, 9),
    "Conv1D of transformers": (12, 9),
    "Embedding": (12, 15),
    "Conv1d": (6, 18),
    "Conv1d strided, circular": (6, 18),
    "Conv2d": (6, 54),
    "Conv2d grouped": (2, 3, 27),
    "Conv2d depthwise": (6, 1, 9),
    "Conv2d strided, dilated": (6, 54),
    "Conv2d same": (6, 54),
    "Conv2d reflect": (6, 54),
    "Conv2d replicate": (6, 54),
    "Conv3d": (6, 162),
    "Conv3d grouped": (3, 2, 54),
}
HAVE_KIND = pytest.mark.parametrize(("kind", "shape"), [(KINDS[k], SHAPES[k]) for k in SHAPES], ids=list(SHAPES))


def site_and_layer(kind: Kind) -> tuple[Site, nn.Module]:
    layer = kind.layers()["first"].double()
    return find_site("first", layer), layer


def inputs(kind: Kind) -> torch.Tensor:
    x = kind.inputs()
    return x.double() if x.is_floating_point() else x


@HAVE_KIND
def test_shape_and_round_trip(kind: Kind, shape: tuple[int, ...]):
    site, layer = site_and_layer(kind)
    assert site.shape == shape == tuple(site.read().shape)
    assert (site.stack, site.outputs, site.inputs) == (shape[:-2], shape[-2], shape[-1])
    before = layer.weight.detach().clone()
    site.write(site.read().clone())
    assert torch.equal(layer.weight, before)
    site.write(site.read().detach() * 2)
    assert torch.equal(layer.weight, before * 2)
    assert layer.weight.is_leaf
    assert layer.weight.is_contiguous()


@HAVE_KIND
def test_apply_is_the_layer_itself(kind: Kind, shape: tuple[int, ...]):
    site, layer = site_and_layer(kind)
    x = inputs(kind)
    y = site.apply(x, site.read())
    bias = site.full_bias(y)
    torch.testing.assert_close(y if bias is None else y + bias, layer(x))


@HAVE_KIND
def test_down_and_up_are_the_product_of_the_factors(kind: Kind, shape: tuple[int, ...]):
    site, _ = site_and_layer(kind)
    x, r = inputs(kind), min(3, site.outputs, site.inputs)
    A = torch.randn(*site.stack, r, site.inputs, dtype=torch.float64)
    B = torch.randn(*site.stack, site.outputs, r, dtype=torch.float64)
    torch.testing.assert_close(site.up(site.down(x, A), B), site.apply(x, B @ A))


@HAVE_KIND
def test_along_out_multiplies_each_output_row(kind: Kind, shape: tuple[int, ...]):
    site, _ = site_and_layer(kind)
    x, v = inputs(kind), torch.randn(shape[:-1], dtype=torch.float64)
    scaled = site.apply(x, v.unsqueeze(-1) * site.read())
    torch.testing.assert_close(site.along_out(v) * site.apply(x, site.read()), scaled)


def test_grouped_kernels_stand_where_the_groups_are():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    W = find_site("conv", conv).read()
    for g, row, channel, i, j in [(0, 0, 0, 0, 0), (1, 2, 1, 2, 1), (1, 0, 1, 1, 2)]:
        assert W[g, row, channel * 9 + 3 * i + j] == conv.weight[3 * g + row, channel, i, j]


def test_embedding_columns_are_the_rows_of_the_table():
    table = nn.Embedding(5, 3)
    site = find_site("table", table)
    assert torch.equal(site.read()[:, 4], table.weight[4])
    assert site.one_hot


def test_padding_row_of_an_embedding_gets_no_gradient():
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=2))
    lt.adapt(model, lt.LoRA(rank=2), "0")
    model(torch.tensor([0, 2, 2, 4])).sum().backward()
    A = model[0].loratory["default"].A
    assert (A.grad.abs().sum(0) > 0).tolist() == [True, False, False, False, True]


def test_scaled_embeddings_scale_the_update_too():
    class Scaled(nn.Embedding):
        def __init__(self, scale: float | torch.Tensor) -> None:
            super().__init__(7, 4)
            self.embed_scale = scale

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    ids = torch.arange(7)
    for scale in (3.0, torch.tensor(3.0)):
        table = Scaled(scale)
        site = find_site("table", table)
        assert torch.equal(site.apply(ids, site.read()), table(ids))
        for method in (lt.LoRA(rank=2), lt.DoRA(rank=2)):
            model = nn.Sequential(Scaled(scale))
            lt.adapt(model, method, "0")
            with torch.no_grad():
                for p in lt.trained(model).values():
                    p += torch.randn_like(p)
            before = model(ids)
            lt.merge(model, probe=ids)
            torch.testing.assert_close(model(ids), before)


def test_a_subclass_with_its_own_forward_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(2 * x, self.weight, self.bias)

    model, x = nn.Sequential(Doubled(4, 3)), torch.randn(5, 4)
    before = model(x)
    lt.adapt(model, lt.LoRA(rank=2), "0")
    assert torch.equal(model(x), before)
    assert isinstance(model[0], Doubled)


def test_rank_is_capped_or_refused():
    site = find_site("blocks.0.q", nn.Linear(32, 64))
    assert site.rank(None, default=8) == 8
    assert site.rank(32, default=8) == 32
    assert find_site("q", nn.Linear(5, 64)).rank(None, default=8) == 5
    with pytest.raises(
        ValueError,
        match=r"layer 'blocks.0.q' has 32 inputs and 64 outputs, so rank 48 is too large \(at most 32\); lower rank",
    ):
        site.rank(48, default=8)
    with pytest.raises(ValueError, match=r"layer 'c' has 18 inputs and 3 outputs in each of 2 groups, so rank 4 is"):
        find_site("c", nn.Conv2d(4, 6, 3, groups=2)).rank(4, default=8)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.ConvTranspose1d(3, 3, 3),
        nn.ReLU(),
        nn.GRU(3, 3),
        nn.Bilinear(2, 2, 2),
        nn.EmbeddingBag(4, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_refused_by_their_type(layer: nn.Module):
    assert not is_supported(layer)
    with pytest.raises(TypeError, match=rf"layer 'odd' is a {type(layer).__name__}, .*allowed are Linear.*exclude="):
        find_site("odd", layer)


def test_a_quantised_weight_is_refused():
    layer = nn.Linear(4, 3)
    layer._parameters["weight"] = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 'q' \(Linear\) stores its weight as torch.int8; allowed are .*float32"):
        find_site("q", layer)


def test_an_embedding_that_rewrites_itself_is_refused():
    with pytest.raises(ValueError, match=r"layer 'e' is an Embedding with max_norm=1.0.*max_norm=None"):
        find_site("e", nn.Embedding(4, 3, max_norm=1.0))
