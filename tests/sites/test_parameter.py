"""Bare parameters as sites: axes, round trips, the adapted weight in the parameter's own layout, and what is refused."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.sites import Bare, find_site, known_parameters, target
from loratory.sites.parameter import ParameterSite


class Holder(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(*shape, dtype=dtype))


AXES = {
    "out in": (5, 4),
    "in out": (4, 5),
    "experts out in": (3, 5, 4),
    "experts in out": (3, 4, 5),
    "in experts out": (4, 3, 5),
    "out, in, experts": (5, 4, 3),
    "layers experts in out": (2, 3, 4, 5),
}


@pytest.mark.parametrize("axes", AXES)
def test_every_orientation(axes: str):
    holder = Holder(*AXES[axes])
    site = find_site("w", target(holder, "w", axes))
    assert isinstance(site, ParameterSite)
    stack = {3: (3,), 4: (2, 3)}.get(holder.w.dim(), ())
    assert site.shape == (*stack, 5, 4) == tuple(site.read().shape)
    assert (site.weight_name, site.bias) == ("w", None)
    letters = {"out": "o", "in": "i", "experts": "e", "layers": "l"}
    stored = "".join(letters[word] for word in axes.replace(",", "").split())
    canonical = "".join(c for c in stored if c in "el") + "oi"
    assert torch.equal(site.read(), torch.einsum(f"{stored}->{canonical}", holder.w))
    assert torch.equal(site.stored(site.read()), holder.w)
    B, A = torch.randn(*stack, 5, 2).double(), torch.randn(*stack, 2, 4).double()
    changed = site.plus(B, A)
    assert changed.shape == holder.w.shape
    torch.testing.assert_close(changed, site.stored(site.read() + B @ A))
    x = torch.randn(*stack, 6, 4).double()
    torch.testing.assert_close(site.apply(x, B @ A), site.up(site.down(x, A), B))
    torch.testing.assert_close(site.run(x), x @ site.read().mT)
    before = holder.w.detach().clone()
    site.write(site.read().detach().clone() * 2)
    assert torch.equal(holder.w, before * 2)
    assert holder.w.is_contiguous()


@pytest.mark.parametrize(
    ("axes", "shape"), [("out", (5, 4)), ("out in in", (5, 4, 3)), ("rows columns", (5, 4)), ("out in", (5, 4, 3))]
)
def test_wrong_axes(axes, shape):
    with pytest.raises(ValueError, match=r"parameters gives 'w' the axes .* but it is \(5, 4.*for example 'out in'"):
        target(Holder(*shape), "w", axes)


def test_a_parameter_of_unknown_orientation():
    with pytest.raises(ValueError, match=r"'w' is a bare parameter \(3, 5, 4\).*parameters=\{'w': 'experts out in'\}"):
        target(Holder(3, 5, 4), "w")
    with pytest.raises(ValueError, match=r"no layer and no parameter 'nothing.here'"):
        target(Holder(3, 5, 4), "nothing.here")


def test_the_weight_of_a_layer_is_chosen_by_its_layer():
    with pytest.raises(ValueError, match=r"'0.weight' is the weight of a Linear; name the layer, '0', in where="):
        target(nn.Sequential(nn.Linear(4, 5)), "0.weight", "out in")


def test_recurrent_layers_never_read_their_weights_by_name():
    with pytest.raises(ValueError, match=r"'0.weight_ih_l0' belongs to a LSTM.*would do nothing"):
        target(nn.Sequential(nn.LSTM(4, 5)), "0.weight_ih_l0", "out in")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_stacks_are_refused(dtype: torch.dtype):
    holder = Holder(3, 5, 4)
    holder._parameters["w"] = nn.Parameter(torch.ones(3, 5, 4).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 'w' is stored as torch.(int8|float8_e4m3fn); allowed are"):
        find_site("w", Bare(holder, "w", "experts out in"))


def test_known_parameters_of_multihead_attention():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=4, vdim=6)})
    found = {n: (bare.leaf, bare.axes) for n, bare in known_parameters(model).items()}
    assert found == {"a.in_proj_weight": ("in_proj_weight", "out in")} | {
        f"b.{p}_proj_weight": (f"{p}_proj_weight", "out in") for p in "qkv"
    }
    out = target(model, "a.out_proj")
    assert isinstance(out, Bare)
    assert find_site("a.out_proj", out).weight_name == "a.out_proj.weight"


def test_a_rank_is_per_entry_and_checked_per_entry():
    model = nn.Sequential(Holder(3, 5, 4))
    lt.adapt(model, lt.LoRA(rank=4), parameters={"w": "experts out in"})
    assert {n: tuple(p.shape) for n, p in lt.trained(model).items()} == {
        "layers/0.w/A": (3, 4, 4),
        "layers/0.w/B": (3, 5, 4),
    }
    with pytest.raises(
        ValueError, match=r"layer '0.w' has 4 inputs and 5 outputs in each of 3 entries, so rank 5 is too large"
    ):
        lt.adapt(model, lt.LoRA(rank=5), parameters={"w": "experts out in"}, name="b")


def test_only_stacks_of_experts_are_known_by_their_module():
    """Other modules may say `is_transposed` of something else."""
    module = Holder(3, 5, 4)
    module.is_transposed = True
    assert known_parameters(module) == {}
    module.num_experts = 3
    assert {n: bare.axes for n, bare in known_parameters(module).items()} == {"w": "experts in out"}
    module.is_transposed = False
    module.bias = nn.Parameter(torch.zeros(3, 5))
    assert {n: bare.axes for n, bare in known_parameters(module).items()} == {"w": "experts out in"}
