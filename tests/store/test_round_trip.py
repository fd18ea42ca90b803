"""An adapter saved and loaded is the same adapter, whatever state the model was in."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from tests.oracle.pairs import randomised

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": lt.LoRA(rank=3, alpha=6), "where": ["q_proj", "down_proj"]},
    "lora+": {"method": lt.LoRA(rank=3, lr_ratio=16.0, start="gaussian", dropout=0.1), "where": "attention"},
    "per layer": {"method": lt.LoRA(rank=3), "per_layer": {"v_proj": {"rank": 2, "alpha": 1.0, "rslora": True}}},
    "dora": {"method": lt.DoRA(rank=2), "where": ["embed_tokens", "q_proj", "lm_head"]},
    "merged lora": {"method": lt.MergedLoRA(groups=(True, False), rank=2), "where": ["gate_proj"]},
    "in full beside": {"method": lt.LoRA(rank=2), "where": ["q_proj"], "also_train": ["model.norm", "embed_tokens"]},
    "parted": {"method": lt.LoRA(rank=2), "where": ["q_proj"], "also_train": ["lm_head"], "untie": True},
    "full": {"method": lt.Full()},
    "frozen": {"method": lt.Frozen()},
}


def ids() -> torch.Tensor:
    return torch.arange(5, 25).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


@pytest.mark.parametrize("case", METHODS)
def test_the_same_bits_come_back(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    model, other = stories(), stories()
    lt.adapt(model, **METHODS[case])
    randomised(model)
    lt.save(model, tmp_path, training={"seed": 7, "lr": 1e-3})
    lt.load(other, tmp_path, trainable=True)
    mine, theirs = lt.trained(model), lt.trained(other)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert torch.equal(logits(model), logits(other))
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in lt.param_groups(m, 1e-3, 0.1)] for m in (model, other)
    ]
    assert groups[0] == groups[1]
    lt.save(other, tmp_path / "again")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_loaded_for_use_nothing_is_trained(stories: Callable[[], Any], tmp_path: Path) -> None:
    model, other = stories(), stories()
    lt.adapt(model, **METHODS["in full beside"])
    lt.save(model, tmp_path)
    lt.load(other, tmp_path)
    assert not any(p.requires_grad for p in other.parameters())
    assert lt.adapters(other) == ("default",)


def test_saved_while_merged_inactive_or_mixed(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj", "o_proj"], name="a", also_train=["model.norm"])
    randomised(model)
    alone = logits(model)
    lt.adapt(model, lt.DoRA(rank=2), ["q_proj", "v_proj"], name="b", also_train=["model.norm"])
    randomised(model, seed=2)
    lt.use(model, "a")
    lt.save(model, tmp_path / "plain", name="a")
    plain = (tmp_path / "plain" / "adapter.safetensors").read_bytes()
    states: dict[str, Callable[[], Any]] = {
        "other": lambda: lt.use(model, "b"),
        "mixed": lambda: lt.use(model, "a", "b", mix=[0.5, 2.0]),
        "none": lambda: lt.use(model),
        "merged": lambda: (lt.use(model, "b"), lt.merge(model)),
    }
    for state, enter in states.items():
        enter()
        lt.save(model, tmp_path / state, name="a")
        assert (tmp_path / state / "adapter.safetensors").read_bytes() == plain, state
        other = stories()
        lt.load(other, tmp_path / state)
        assert torch.equal(logits(other), logits_of(stories(), tmp_path / "plain")), state
    lt.unmerge(model)
    lt.use(model, "a", "b")
    with pytest.raises(ValueError, match=r"the model has adapters a, b, active: a, b; say which with name="):
        lt.save(model, tmp_path / "which")
    assert not (tmp_path / "which").exists()
    assert alone.shape == logits(model).shape


def logits_of(base: Any, folder: Path) -> torch.Tensor:
    lt.load(base, folder)
    return logits(base)


def test_a_second_adapter_loads_beside_the_first(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, **METHODS["parted"])
    randomised(model)
    lt.save(model, tmp_path)
    lt.load(model, tmp_path, name="copy")
    assert lt.active(model) == ("copy",)
    second = logits(model)
    lt.use(model, "default")
    assert torch.equal(second, logits(model))
    with pytest.raises(ValueError, match=r"the adapter name 'copy' is taken; give another name="):
        lt.load(model, tmp_path, name="copy")
    lt.merge(model)
    with pytest.raises(
        RuntimeError, match=r"the model is merged; call loratory.unmerge\(model\) before adding an adapter"
    ):
        lt.load(model, tmp_path, name="third")
    lt.unmerge(model)
    assert lt.adapters(model) == ("default", "copy")


def test_save_pretrained_of_an_adapted_model_is_the_adapter(stories: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = stories()
    model.config._name_or_path = ""
    model.save_pretrained(tmp_path / "base")
    lt.adapt(model, **METHODS["dora"])
    randomised(model)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lt.load(other, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(other))
    lt.detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()
    model, x = copy.deepcopy(base), torch.randn(3, 2, 4, 4)
    lt.adapt(model, lt.LoRA(rank=1), ["0", "3"], also_train=["1"])
    randomised(model)
    lt.save(model, tmp_path)
    lt.load(base, tmp_path)
    assert torch.equal(model.eval()(x), base(x))


def test_new_tokens(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    model.resize_token_embeddings(520)
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj"], also_train=["embed_tokens"])
    randomised(model)
    lt.save(model, tmp_path)
    torch.manual_seed(99)
    other = stories()
    with pytest.raises(
        ValueError,
        match=r"'model.embed_tokens.weight' is \(512, 64\) here, but \(520, 64\).*resize_token_embeddings\(520\)",
    ):
        lt.load(other, tmp_path)
    other.resize_token_embeddings(520)  # other new rows; the adapter holds its own
    lt.load(other, tmp_path)
    with torch.no_grad():
        x = torch.arange(510, 520).unsqueeze(0)
        assert torch.equal(model(x).logits, other(x).logits)
    assert other.lm_head.weight is other.model.embed_tokens.weight  # the tie stays: one copy for both places


def test_new_rows_that_differ_are_another_base(stories: Callable[[], Any], tmp_path: Path) -> None:
    model, other = stories(), stories()
    model.resize_token_embeddings(520)
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj"])
    lt.save(model, tmp_path)
    other.resize_token_embeddings(520)
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' holds slightly other numbers.* other random rows for new tokens"
    ):
        lt.load(other, tmp_path)


def test_inspect(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, **METHODS["per layer"])
    lt.save(model, tmp_path, training={"seed": 7, "steps": 100})
    seen = lt.inspect(tmp_path)
    assert (seen.method, seen.hyperparameters["rank"], seen.training) == ("lora", 3, {"seed": 7, "steps": 100})
    assert seen.layers["model.layers.0.self_attn.v_proj"] == {"rank": 2, "alpha": 1.0, "rslora": True}
    assert seen.numbers == sum(p.numel() for p in lt.trained(model).values())
    assert seen.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    text = str(seen)
    assert all(
        part in text
        for part in (
            "loratory-adapter 1",
            "lora (rank=3",
            "LlamaForCausalLM",
            "float32",
            "seed=7",
            "35: model.layers.0",
        )
    )


def test_the_record_of_training_stays_through_load_and_save(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, lt.LoRA(rank=1), ["q_proj"])
    lt.save(model, tmp_path / "a", training={"run": 1})
    lt.detach(model)
    lt.load(model, tmp_path / "a")
    lt.save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter.json").read_text())["training"] == {"run": 1}


def test_a_base_is_known_while_it_is_merged(tmp_path: Path) -> None:
    """Transposed layers and tables, too: the base's own numbers in the order in which they are stored."""
    from tests.runtime.models import IDS, tiny_gpt2

    model = tiny_gpt2()
    lt.adapt(model, lt.LoRA(rank=2), ["c_attn", "c_fc", "wte"])
    randomised(model)
    out = model(IDS).logits
    lt.merge(model, untie=True)
    lt.save(model, tmp_path)
    again = tiny_gpt2()
    lt.load(again, tmp_path)
    assert torch.equal(again(IDS).logits, out)


def test_the_orientation_of_a_bare_parameter_is_stored(tmp_path: Path) -> None:
    from tests.laws.kinds import Kernel

    base, x = nn.Sequential(Kernel()), torch.randn(2, 6)
    model = copy.deepcopy(base)
    lt.adapt(model, lt.LoRA(rank=2), parameters={"kernel": "in, out"})
    randomised(model)
    lt.save(model, tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert record["parameters"] == {"0.kernel": "in out"}
    assert list(lt.inspect(tmp_path).layers) == ["0.kernel"]
    again = copy.deepcopy(base)
    lt.load(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_a_file_from_before_bare_parameters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    base = copy.deepcopy(model)
    lt.adapt(model, lt.LoRA(rank=2), "0")
    randomised(model)
    lt.save(model, tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    del record["parameters"]
    (tmp_path / "adapter.json").write_text(json.dumps(record))
    lt.load(base, tmp_path)
    x = torch.randn(2, 4)
    assert torch.equal(base(x), model(x))
