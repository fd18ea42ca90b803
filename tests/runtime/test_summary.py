"""summary and param_groups."""

import torch
from torch import nn

import loratory as lt
from tests.runtime.models import Tiny

PRINTED = """\
layer                     method    shape   trained  bytes    share
-------------------------------------------------------------------
blocks.*.attn.q_proj (2)  LoRA r=2  8 x 8        64    256  4.780 %
blocks.*.up_proj (2)      LoRA r=2  16 x 8       96    384  7.170 %
head.weight               in full   11 x 8       88    352  6.572 %
head.bias                 in full   11           11     44  0.822 %
trained 259 of 1,339 numbers (19.343 %), 0.00 MB"""


def test_summary_in_full():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj, up_proj", also_train="head")
    summary = lt.summary(model)
    assert str(summary) == PRINTED
    assert summary.total == sum(p.numel() for p in Tiny().parameters())
    assert summary.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.bytes == 4 * summary.trained
    assert abs(summary.share - 259 / 1339) < 1e-12
    assert summary.rows[0] == ("blocks.0.attn.q_proj", "LoRA r=2", (8, 8), 32, 128, 32 / 1339)


def test_summary_of_two_adapters_and_of_none():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="a")
    lt.adapt(model, lt.DoRA(rank=3), "q_proj", name="b")
    assert lt.summary(model).trained == 2 * (3 * 16 + 8)
    lt.use(model, "a", "b")
    summary = lt.summary(model)
    assert summary.rows[0].method == "LoRA r=2+DoRA r=3"
    assert summary.trained == 2 * (2 * 16) + 2 * (3 * 16 + 8)
    lt.use(model)
    assert (lt.summary(model).trained, lt.summary(model).rows) == (0, [])


def test_summary_counts_a_tied_weight_once(stories):
    model = stories()
    total = sum(p.numel() for p in model.parameters())
    lt.adapt(model, lt.LoRA(rank=2))
    assert lt.summary(model).total == total


def test_param_groups_by_rate_and_decay():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    lt.adapt(model, lt.LoRA(rank=2, lr_ratio=4.0), "0", also_train="1", bias="adapted")
    groups = lt.param_groups(model, lr=0.1, weight_decay=0.01)
    assert [(g["lr"], g["weight_decay"], g["names"]) for g in groups] == [
        (0.1, 0.01, ["layers/0/A"]),
        (0.4, 0.01, ["layers/0/B"]),
        (0.1, 0.0, ["also_train/0.bias", "also_train/1.weight", "also_train/1.bias"]),
    ]
    trained = lt.trained(model)
    assert [p is trained[n] for g in groups for p, n in zip(g["params"], g["names"], strict=True)] == [True] * 5
    optimizer = torch.optim.AdamW(groups)
    assert len(optimizer.param_groups) == 3
