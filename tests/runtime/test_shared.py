"""Tensors that layers share: registered once, at the root, in whatever is done with the model."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of, pools_of
from tests.laws.kinds import move, plain_state, same
from tests.methods.test_mos import Blocks

METHOD = lt.MoS(rank=4, budget=2, private=1, shards=2)
X = torch.linspace(-1, 1, 30).reshape(5, 6)


def adapted(name: str = "default") -> Blocks:
    model = Blocks().eval()
    lt.adapt(model, METHOD, name=name, seed=1)
    move(model)
    return model


def test_each_tensor_is_registered_once():
    model = adapted()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "loratory" in n]
    assert names == [f"loratory_shared.default.blocks-*-{kind}-{side}" for kind in ("up", "down") for side in "AB"]
    assert [n for n in model.state_dict() if n.endswith("-A")] == [n for n in names if n.endswith("-A")]
    lt.detach(model)
    assert not any("loratory" in n for n in model.state_dict())
    assert same(model.state_dict(), Blocks().state_dict())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_layers_of_a_copy_share_the_copys_tensors(copied):
    model = adapted()
    before, twin = model(X), copied(model)
    assert torch.equal(twin(X), before)
    pool = pools_of(twin)["default"]
    assert all(layer["default"].pool is pool for layer in layers_of(twin).values())
    move(twin, 5)
    assert not torch.equal(twin(X), before)
    assert torch.equal(model(X), before)


def test_they_follow_the_model_to_another_precision():
    model = adapted().double()
    assert layers_of(model)["blocks.0.up"]["default"].PA.dtype == torch.float64
    assert model(X.double()).dtype == torch.float64


def test_the_file_holds_them_once(tmp_path: Path):
    model = adapted()
    lt.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert sorted(k for k in tensors if k.startswith("shared/")) == sorted(lt.trained(model))
    assert {k.rpartition("/")[2] for k in tensors if k.startswith("layers/")} == {"ia", "ib"}
    again = Blocks().eval()
    lt.load(again, tmp_path, trainable=True)
    assert torch.equal(again(X), model(X))
    assert same(lt.trained(again), lt.trained(model))
    again(X).sum().backward()
    assert all(p.grad is not None for p in lt.trained(again).values())


def test_rows_mix_merge_with_pools_of_several_adapters():
    model = adapted("a")
    a = model(X)
    lt.adapt(model, METHOD, name="b", seed=2)
    move(model, 4)
    b = model(X)
    lt.adapt(model, lt.LoRA(rank=2), name="c")
    move(model, 5)
    c = model(X)
    with lt.rows(model, ["a", "b", "a", "c", None]):
        mixed = model(X)
    torch.testing.assert_close(mixed[:4], torch.stack([a[0], b[1], a[2], c[3]]))
    lt.use(model, "a", "b", mix=[0.5, 0.5])
    between = model(X)
    lt.merge(model, probe=X)
    torch.testing.assert_close(model(X), between)
    lt.unmerge(model)
    lt.detach(model, "a")
    assert set(pools_of(model)) == {"b"}
    lt.use(model, "b")
    assert torch.equal(model(X), b)
    lt.merge(model, probe=X, keep_base=False)
    assert list(model.state_dict()) == list(Blocks().state_dict())


def test_a_sequential_root_runs_as_before():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    base = model(X)
    lt.adapt(model, lt.MoS(rank=2, shards=1), "0")
    torch.testing.assert_close(model(X), base)


def test_save_pretrained_and_export_of_a_transformers_model(stories, tmp_path: Path):
    model = stories()
    lt.adapt(model, lt.MoS(rank=4, shards=1, alpha=8))
    move(model)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        out, plain = model(ids).logits, plain_state(model)
        model.save_pretrained(tmp_path / "own")
        again = stories()
        lt.load(again, tmp_path / "own")
        assert torch.equal(again(ids).logits, out)
        model.save_pretrained(tmp_path / "merged", merged=True)
        merged = type(stories()).from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, out, rtol=1e-3, atol=1e-3)
        check = lt.export(model, tmp_path / "peft", to="peft")
        other = stories()
        lt.load(other, tmp_path / "peft")
        torch.testing.assert_close(other(ids).logits, out, rtol=1e-3, atol=1e-3)
    assert check is None or "0 in total" in str(check)
    assert same(plain_state(model), plain)


def test_a_model_whose_blocks_are_not_reached_is_named():
    model = Blocks()
    lt.adapt(model, METHOD)
    optimizer = torch.optim.SGD(lt.param_groups(model))
    model.blocks[0]["up"](X).sum().backward()
    with pytest.raises(RuntimeError, match=r"layer 'blocks.0.down' and 2 more got no gradient in the first step"):
        optimizer.step()
