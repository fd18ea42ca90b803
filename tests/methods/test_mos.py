"""MoS: pools that blocks share, the index of each block, and what is refused."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of, pools_of
from tests.laws.kinds import Row, move, stacked

ROW = Row(
    made=lambda rank: {
        "MoS": lt.MoS(rank=rank, budget=rank, private=0, shards=1, alpha=3),
        "MoS private": lt.MoS(rank=rank, budget=rank, private=1, shards=1),
    },
    count=lambda site, rank: stacked(site) * rank * (site.inputs + site.outputs),
)

PLANTED = [
    ("budget in the scale", "scale(self.alpha, A.shape[-2], False)", "scale(self.alpha, self.budget, False)"),
    (
        "shards of a vector far apart",
        "picked.reshape(*pool.shape[:-2], index.shape[0] // self.shards, self.shards * pool.shape[-1])",
        "picked.unflatten(-2, (self.shards, -1)).transpose(-3, -2).flatten(-2)",
    ),
    ("the same shards for A and B", "if self.paired else", "if True else"),
    ("private shards of the next block", "block * own", "(block + 1) % 3 * own"),
    ("shards drawn with repetition", "torch.randperm(places,", "torch.randint(places, (places,),"),
    ("bound of a shard's width", "first.inputs**-0.5", "(first.inputs // self.shards) ** -0.5"),
    ("a pool for each block", '"*" if part.isdigit() else part', "part"),
]


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def adapted(**options) -> Blocks:
    model = Blocks()
    lt.adapt(model, lt.MoS(**{"rank": 4, "budget": 2, "private": 1, "shards": 2, "alpha": 8} | options), seed=1)
    return model


def test_one_pair_of_pools_for_each_type():
    model = adapted()
    pool = pools_of(model)["default"]
    shapes = {n: tuple(p.shape) for n, p in lt.trained(model).items()}
    assert shapes == {
        "shared/blocks-*-up-A": (12, 3), "shared/blocks-*-up-B": (12, 4),
        "shared/blocks-*-down-A": (12, 4), "shared/blocks-*-down-B": (12, 3),
    }  # fmt: skip
    assert [p.shape for p in model.parameters() if p.requires_grad] == [p.shape for p in pool.parameters()]
    assert (
        sum(p.numel() for g in lt.param_groups(model) for p in g["params"]) == lt.summary(model).trained == 2 * 3 * 28
    )
    assert "shared/blocks-*-up-A" in str(lt.summary(model))
    A, B = pool.tensors()["blocks-*-up-A"], pool.tensors()["blocks-*-up-B"]
    assert not B.any()
    assert A.abs().max() <= 6**-0.5
    assert A.std().item() == pytest.approx(6**-0.5 / 3**0.5, rel=0.25)


def test_every_block_draws_its_own_shards():
    model = adapted()
    drawn = []
    for name, layer in layers_of(model).items():
        t, block = layer["default"], int(name.split(".")[1])
        for index in (t.ia, t.ib):
            public, own = index[:6].tolist(), index[6:].tolist()
            assert len(set(public)) == 6
            assert max(public) < 6
            assert own == [6 + 2 * block, 7 + 2 * block]
        drawn.append((t.ia.tolist(), t.ib.tolist()))
    assert sum(a != b for a, b in drawn) >= 5
    paired = adapted(paired=True)
    assert all(torch.equal(layer["default"].ia, layer["default"].ib) for layer in layers_of(paired).values())


def test_linear_is_the_formula():
    model = adapted()
    move(model)
    t, layer = layers_of(model)["blocks.1.up"]["default"], model.blocks[1]["up"]
    A = torch.stack([torch.cat([t.PA[t.ia[2 * j]], t.PA[t.ia[2 * j + 1]]]) for j in range(4)])
    B = torch.stack([torch.cat([t.PB[t.ib[2 * j]], t.PB[t.ib[2 * j + 1]]]) for j in range(4)], 1)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + 8 / 4 * B @ A, layer.bias))


def test_private_shards_learn_from_their_block_alone():
    model = adapted()
    move(model)
    model.blocks[1]["up"](torch.randn(5, 6)).sum().backward()
    gradient = pools_of(model)["default"].tensors()["blocks-*-up-A"].grad
    assert gradient[:6].any()
    assert [bool(each.any()) for each in gradient[6:].split(2)] == [False, True, False]


def test_a_rank_of_the_paper_follows_the_pool():
    model = Blocks(2)
    lt.adapt(model, lt.MoS(), ["up"])
    assert layers_of(model)["blocks.0.up"]["default"].ia.shape == (2 * 3,)
    lone = nn.Sequential(nn.Linear(6, 8))
    with pytest.warns(UserWarning, match="one block only"):
        lt.adapt(lone, lt.MoS(), "0")
    assert "MoS: * is one block only, so nothing is shared there" in str(lt.summary(lone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5, "budget": 2}, r"layer 'blocks.0.up': MoS's pool has 3 public ranks \(3 blocks\), the layer asks for 4; raise budget"),
        ({"rank": 4, "budget": 2, "private": 2}, r"no public pool \(private = budget = 2\), so rank 4 must equal budget"),
        ({"rank": 1, "budget": 2, "private": 2, "shards": 1}, "must equal budget"),
        ({"shards": 5}, "layer 'blocks.0.up' has 6 inputs, which is not divisible by shards=5 of MoS"),
        ({"private": 3}, r"private is 3; it must be at most budget \(2\)"),
        ({"budget": 0}, "budget is 0; it must be a positive integer"),
        ({"shards": 0}, "shards is 0; it must be a positive integer"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_layers_of_one_type_share_a_shape_and_their_settings():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    with pytest.raises(
        ValueError, match=r"layer '2' is \(6, 8\) and '0' is \(8, 6\), but MoS's layers of one type \(\*\)"
    ):
        lt.adapt(model, lt.MoS(rank=1), ["0", "2"])
    with pytest.raises(
        ValueError, match=r"layer 'blocks.0.up' is given settings of its own, but the layers of a MoS share"
    ):
        lt.adapt(Blocks(), lt.MoS(rank=2), per_layer={"up": {"rank": 1}})
