"""Adapted models in pickles (torch.save of a whole module) and copies. Loratory itself neither writes nor reads any."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.kinds import move, plain_state, same
from tests.runtime.models import IDS, Tiny, tiny_bert
from tests.runtime.moe import moe


def attention() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "conv": nn.Conv1d(8, 8, 3)}).eval()


MODELS = {
    "plain": (Tiny, "all-linear", lambda m: m(IDS)),
    "embedding": (Tiny, "embedding", lambda m: m(IDS)),
    "attention": (attention, ["all-linear", "conv"], lambda m: m["conv"](m["mha"](*[torch.ones(4, 8, 8)] * 3)[0])),
    "transformers": (tiny_bert, "all-linear", lambda m: m(IDS).logits),
    "experts": (lambda: moe("mixtral"), ["all-linear", "experts"], lambda m: m(IDS).logits),
}


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_bytes(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize("copied", [through_pickle, through_bytes, copy.deepcopy])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_the_same_model_and_its_own(kind: str, copied, tmp_path: Path):
    make, where, run = MODELS[kind]
    model = make()
    base = run(model)
    lt.adapt(model, lt.LoRA(rank=2), where, name="a")
    move(model, 1)
    lt.adapt(model, lt.DoRA(rank=2), where, name="b")
    move(model, 2)
    lt.use(model, "a", "b", mix=[0.7, 0.3])
    before = run(model)
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]  # the same generated classes
    assert same(plain_state(twin), plain_state(model))
    assert torch.equal(run(twin), before)
    assert lt.active(twin) == ("a", "b")
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    lt.use(twin, "b")
    move(twin, 3)
    lt.save(twin, tmp_path / "b")
    assert torch.equal(run(model), before)
    run(twin).square().sum().backward()
    assert all(p.grad is not None for p in lt.trained(twin).values())
    assert all(p.grad is None for p in model.parameters())
    lt.detach(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in make().modules()]
    torch.testing.assert_close(run(twin), base)
    lt.detach(model)


def test_another_process_reads_the_pickle(tmp_path: Path):
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    move(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(IDS), tmp_path / "out.pt")
    code = (
        "import torch\n"
        f"model, out = (torch.load(f'{tmp_path}/{{n}}.pt', weights_only=False) for n in ('model', 'out'))\n"
        "import loratory as lt\n"
        "from tests.runtime.models import IDS\n"
        "assert torch.equal(model(IDS), out) and lt.active(model) == ('default',)\n"
        "lt.detach(model)\n"
        "assert type(model.head) is torch.nn.Linear and not torch.equal(model(IDS), out)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_merged_model():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    move(model)
    lt.merge(model, probe=IDS)
    twin = through_pickle(model)
    assert torch.equal(twin(IDS), model(IDS))
    lt.unmerge(twin)
    lt.detach(model)
    lt.detach(twin)
    assert torch.equal(twin(IDS), model(IDS))


def test_a_class_with_its_own_way_of_copying_is_refused():
    class Own(nn.Linear):
        def __reduce__(self):
            return Own, (4, 4)

    model = nn.Sequential(Own(4, 4))
    lt.adapt(model, lt.LoRA(rank=2), "0")
    assert len(layers_of(model)) == 1
    with pytest.raises(
        TypeError, match="a Own is copied by code of its own, which would lose its adapters; detach them first"
    ):
        copy.deepcopy(model)
