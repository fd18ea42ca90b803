"""MergedLoRA is a LoRA on each adapted row block."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import LINEAR, Row
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "MergedLoRA q, v": lt.MergedLoRA(rank=rank, alpha=3),
        "MergedLoRA k": lt.MergedLoRA(groups=(False, True, False), rank=rank, alpha=3),
    },
    count=lambda site, rank: 2 * rank * (site.inputs + site.outputs // 3),  # q, v
    served=LINEAR,
    refusal="MergedLoRA needs a linear layer",
)

PLANTED = [
    (
        "blocks of A exchanged",
        "[t.B.new_zeros(rows, i * rank), next(adapted), t.B.new_zeros(rows, (n - 1 - i) * rank)]",
        "[t.B.new_zeros(rows, (n - 1 - i) * rank), next(adapted), t.B.new_zeros(rows, i * rank)]",
    ),
    ("scale by the effective rank", "scale(self.alpha, rank, False)", "scale(self.alpha, n * rank, False)"),
    ("blocks off by one", "for on in self.groups:", "for on in (*self.groups[1:], self.groups[0]):"),
]


@pytest.mark.parametrize(
    "groups", [(True, False, True), (False, True, False), (True, True), (False, False, False, True)]
)
def test_is_a_lora_on_each_adapted_block(groups: tuple[bool, ...]):
    x, n, rows = torch.randn(3, 7).double(), sum(groups), 12 // len(groups)
    model, t = adapted(nn.Linear(7, 12), lt.MergedLoRA(groups=groups, rank=2, alpha=6))
    assert {k: tuple(v.shape) for k, v in t.items()} == {"A": (2 * n, 7), "B": (rows * n, 2)}
    expected = (x @ model[0].weight.T + model[0].bias).split(rows, dim=1)
    As, Bs = iter(t["A"].split(2)), iter(t["B"].split(rows))
    blocks = [y + 3 * (x @ next(As).T) @ next(Bs).T if on else y for y, on in zip(expected, groups, strict=True)]
    torch.testing.assert_close(model(x), torch.cat(blocks, 1))


def test_other_blocks_keep_their_bits_when_merged():
    x = torch.randn(3, 7).double()
    model, _ = adapted(nn.Linear(7, 12), lt.MergedLoRA(groups=(True, False, True), rank=2))
    before = model[0].weight.detach().clone()
    lt.merge(model, probe=x)
    changed = (model[0].weight != before).any(dim=1)
    assert changed.tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_default_rank_is_capped_by_the_block():
    model = nn.Sequential(nn.Linear(20, 12))
    lt.adapt(model, lt.MergedLoRA(), "0")
    assert tuple(model[0].loratory["default"].B.shape) == (8, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (False, False)}, r"groups is \(False, False\); it must hold.*at least one of them True"),
        ({"groups": ()}, r"groups is \(\); it must hold one True or False for each block"),
        ({"groups": (1, 0, 1)}, r"groups is \(1, 0, 1\); it must hold one True or False"),
        ({"rank": 0}, r"rank is 0; it must be a positive integer"),
        ({"alpha": 0}, r"alpha is 0; it must be a positive"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in"),
    ],
)
def test_bad_hyperparameters(fields, message):
    with pytest.raises(ValueError, match=message):
        lt.MergedLoRA(**fields)


def test_bad_layers():
    with pytest.raises(
        ValueError, match=r"layer '0' \(linear\) has 10 outputs.*divisible by its 3 groups.*other groups="
    ):
        lt.adapt(nn.Sequential(nn.Linear(8, 10)), lt.MergedLoRA(rank=2), "0")
    with pytest.raises(
        ValueError, match=r"layer '0' has blocks of 3 rows, so rank 5 is too large \(at most 3\); lower"
    ):
        lt.adapt(nn.Sequential(nn.Linear(8, 9)), lt.MergedLoRA(rank=5), "0")
    with pytest.raises(ValueError, match=r"layer '0' has 4 inputs and 9 outputs, so rank 5 is too large"):
        lt.adapt(nn.Sequential(nn.Linear(4, 9)), lt.MergedLoRA(rank=5), "0")
