"""What methods add to the loss."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.penalty import has_penalty


def test_active_adapters_alone_are_counted():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    lt.adapt(model, lt.SALT(rank=2), name="a")
    lt.adapt(model, lt.LoRA(rank=2), name="b")
    assert not has_penalty(model)
    assert float(lt.penalty(model)) == 0.0
    lt.use(model, "a")
    with torch.no_grad():
        for layer in model:
            layer.loratory["a"].B.fill_(3.0)
    assert has_penalty(model)
    assert float(lt.penalty(model)) == pytest.approx(2 * 0.01 * 3.0, rel=1e-5)
    lt.penalty(model).backward()
    assert model[0].loratory["a"].B.grad is not None
    lt.use(model, "a", "b")
    assert float(lt.penalty(model)) > 0


def test_a_plain_model_has_none():
    with pytest.raises(ValueError, match="has no adapters"):
        lt.penalty(nn.Linear(2, 2))
