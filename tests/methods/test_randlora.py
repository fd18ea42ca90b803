"""RandLoRA: the sum over its bases, both orders and scales, its rank, and bases that files do not hold."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.methods import randlora
from loratory.ops.scaled_basis import reference, scaled_basis
from loratory.runtime.layer import layers_of, pools_of
from tests.laws.kinds import LINEAR, Row, move, stacked

ROW = Row(
    made=lambda rank: {
        "RandLoRA": lt.RandLoRA(rank=rank),
        "RandLoRA released": lt.RandLoRA(rank=rank, order="released", scaling="rank", bases="sparse", alpha=6),
    },
    count=lambda site, rank: stacked(site) * math.ceil(min(site.shape[-2:]) / rank) * (rank + min(site.shape[-2:])),
    served=(*LINEAR, "experts", "experts transposed"),
    refusal="is not linear, and RandLoRA is defined for linear layers alone",
)

PLANTED = [
    ("released order for the paper's", 'if self.order == "released"', 'if self.order == "paper"'),
    ("root of the rank", "math.sqrt(n) if", "math.sqrt(r) if"),
    ("wrong side transposed", "if inputs <= out else", "if inputs < out - 1 else"),
    ("one basis for all", "t.PB[:D, :n].reshape", "t.PB[:D, :1].expand(D, n, r).reshape"),
    ("scales start at 1", "fill_(1 / max(n, d))", "fill_(1.0)"),
    ("seed ignored", "manual_seed(self.seed)", "manual_seed(0)"),
    ("bases in the file", "rebuilt=True", "rebuilt=False"),
    ("a basis too few", "n = math.ceil(d / r)", "n = max(1, d // r)"),
]


def adapted(inputs: int = 7, outputs: int = 9, **options) -> tuple[nn.Linear, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    layer = nn.Linear(inputs, outputs).double()
    model = nn.ModuleDict({"0": layer})
    lt.adapt(model, lt.RandLoRA(**{"rank": 3} | options), "0")
    move(model)
    return layer, {n: t.detach() for n, t in layer.loratory["default"].every_tensor().items()}


@pytest.mark.parametrize(("inputs", "outputs"), [(10, 12), (9, 7), (8, 8)])
@pytest.mark.parametrize("scaling", ["rank-root", "rank"])
def test_the_sum_over_the_bases(inputs, outputs, scaling):
    layer, t = adapted(inputs, outputs, alpha=12, scaling=scaling)
    n = math.ceil(min(inputs, outputs) / 3)
    s = 12 / 3 / (math.sqrt(n) if scaling == "rank-root" else 1)
    D = s * sum(
        t["PB"][:, j] @ torch.diag(t["lam"][:, j]) @ t["PA"][:, 0] @ torch.diag(t["gamma"][j]) for j in range(n)
    )
    D = D if inputs <= outputs else D.T
    x = torch.randn(4, inputs).double()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + D, layer.bias))


def test_the_released_order_pairs_other_blocks():
    layer, t = adapted(alpha=3, order="released", scaling="rank")
    left = t["PB"].reshape(9, 9)  # column 3 j + k
    right = torch.stack([t["lam"][k, j] * t["PA"][k, 0] * t["gamma"][j] for k in range(3) for j in range(3)])
    torch.testing.assert_close(layer.loratory["default"].method.delta(layer.loratory["default"]), left @ right)
    alone = adapted(rank=7, order="released")[0].loratory["default"]
    same = adapted(rank=7)[0].loratory["default"]
    torch.testing.assert_close(alone.method.delta(alone), same.method.delta(same))  # one basis: no difference


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 8), (8, 8)])
def test_the_update_has_full_rank_once_the_rows_of_gamma_differ(inputs, outputs):
    layer, _ = adapted(inputs, outputs, rank=4)
    own = layer.loratory["default"]
    assert torch.linalg.matrix_rank(own.method.delta(own)) == min(inputs, outputs)
    with torch.no_grad():
        own.gamma.fill_(0.1)
    assert torch.linalg.matrix_rank(own.method.delta(own)) <= 4


def test_the_first_step_moves_lambda_alone():
    layer = nn.Linear(7, 9)
    model = nn.Sequential(nn.ModuleDict({"fc": layer}))
    lt.adapt(model, lt.RandLoRA(rank=3))
    t = layer.loratory["default"]
    assert not t.lam.any()
    torch.testing.assert_close(t.gamma.detach(), torch.full((3, 7), 1 / 7))
    layer(torch.randn(5, 7)).square().sum().backward()
    assert t.lam.grad.any()
    assert not t.gamma.grad.any()


def test_bases_have_deviation_one_and_the_stated_shares():
    model = nn.ModuleDict({"a": nn.Linear(64, 400)})
    for bases, share in (("dense", None), ("sparse", 1 / 6), ("very-sparse", 1 / (2 * 8))):
        lt.adapt(model, lt.RandLoRA(rank=4, bases=bases, seed=3), "a", name=bases)
        pool = pools_of(model)[bases]
        assert (pool.PA.shape, pool.PB.shape) == ((4, 1, 64), (400, 16, 4))
        assert pool.PB.std().item() == pytest.approx(1, abs=1e-4)
        if share is not None:
            assert len(pool.PB.unique()) == 3
            assert (pool.PB > 0).float().mean().item() == pytest.approx(share, rel=0.06)


def test_another_seed_gives_other_bases():
    one, other, again = (adapted(seed=seed)[1]["PA"] for seed in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_layers_take_their_part_of_the_largest_bases():
    model = nn.ModuleDict({"a": nn.Linear(6, 30), "b": nn.Linear(20, 10)})
    lt.adapt(model, lt.RandLoRA(rank=4), ["a", "b"])
    pool = pools_of(model)["default"]
    assert (pool.PA.shape, pool.PB.shape) == ((4, 1, 20), (30, 5, 4))
    shapes = {n: tuple(t.shape) for n, layer in layers_of(model).items() for n, t in layer["default"].tensors().items()}
    assert shapes == {"lam": (4, 3), "gamma": (3, 10)}
    move(model)
    assert model["a"](torch.randn(2, 6)).shape == (2, 30)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_the_scaled_basis_is_its_definition(stack):
    torch.manual_seed(0)
    V = torch.randn(3, 7).double()
    lam, gamma = (torch.randn(*stack, *shape).double().requires_grad_() for shape in ((3, 2), (2, 7)))
    assert torch.equal(scaled_basis(V, lam, gamma), reference(V, lam, gamma))
    assert torch.autograd.gradcheck(lambda a, b: scaled_basis(V, a, b), (lam, gamma))


def test_the_file_holds_a_seed_in_place_of_the_bases(stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = stories()
    lt.adapt(model, lt.RandLoRA(rank=8, seed=5))
    move(model)
    ids = torch.arange(12).reshape(2, 6)
    lt.save(model, tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert sorted(record["rebuilt"]) == ["shared/PA", "shared/PB"]
    assert not any(key.startswith("shared/") for key in record["tensors"])
    bases = sum(t.numel() for t in pools_of(model)["default"].tensors().values())
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * lt.summary(model).trained + 20_000
    assert bases > 10_000
    again, state = stories(), torch.get_rng_state()
    lt.load(again, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    right = randlora.RandLoRA._drawn
    monkeypatch.setattr(randlora.RandLoRA, "_drawn", lambda *a: right(*a) + 1e-6)
    other = stories()
    with pytest.raises(
        ValueError,
        match=r"holds the checksum of tensor 'shared/P[AB]' \(\w{12}\) in place .* makes others of seed 5 \(\w{12}\)",
    ):
        lt.load(other, tmp_path)
    assert not pools_of(other)


def test_on_smollm2_the_file_is_small():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=49152))
    lt.adapt(model, lt.RandLoRA())
    assert lt.summary(model).bytes == 4 * 30 * (5 * 18 * (32 + 576) + 2 * 6 * (32 + 192)) < 10**7


def test_it_is_no_lora(tmp_path: Path):
    fresh = nn.ModuleDict({"fc": nn.Linear(7, 9)})
    lt.adapt(fresh, lt.RandLoRA(rank=3))
    move(fresh)
    with pytest.raises(
        ValueError, match=r"RandLoRA's update has rank min\(out, in\), so it is no low-rank adapter; merge it"
    ):
        lt.export(fresh, tmp_path / "exact", to="peft")
    check = lt.export(fresh, tmp_path / "near", to="peft", rank=4, limit=0.99)
    assert 0.05 < check.total < 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"bases": "very_sparse"}, "bases is 'very_sparse'; it must be one of dense, sparse, very-sparse"),
        ({"order": "peft"}, "order is 'peft'; it must be one of paper, released"),
        ({"scaling": "none"}, "scaling is 'none'; it must be one of rank-root, rank"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.RandLoRA(**options)
