"""adapt and detach: hyper-parameters, names, aliases, per-layer settings, and everything that is refused before a change."""

import copy

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.runtime.models import IDS, Tiny, tiny_gpt2


def method_of(model: nn.Module, layer: str, name: str = "default") -> lt.Method:
    return layers_of(model)[layer][name].method


def untouched(model: nn.Module) -> bool:
    twin = Tiny()
    return (
        repr(model) == repr(twin)
        and all(type(a) is type(b) for a, b in zip(model.modules(), twin.modules(), strict=True))
        and list(model.state_dict()) == list(twin.state_dict())
        and all(
            torch.equal(a, b) and a.requires_grad for a, b in zip(model.parameters(), twin.parameters(), strict=True)
        )
        and "_loratory_state" not in model.__dict__
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4, "alpha": 8}, lt.LoRA(rank=4, alpha=8)),
        ({"r": 4}, lt.LoRA(rank=4)),
        ({"lora_r": 4}, lt.LoRA(rank=4)),
        ({"lora_rank": 4}, lt.LoRA(rank=4)),
        ({"lora_alpha": 16}, lt.LoRA(alpha=16)),
        ({"lora_dropout": 0.1}, lt.LoRA(dropout=0.1)),
        ({"use_rslora": True}, lt.LoRA(rslora=True)),
        ({"loraplus_lr_ratio": 16}, lt.LoRA(lr_ratio=16)),
        ({"r": 4, "use_dora": True}, lt.DoRA(rank=4)),
        ({"r": 4, "use_dora": False}, lt.LoRA(rank=4)),
        ({"r": 4, "task_type": "CAUSAL_LM"}, lt.LoRA(rank=4)),
    ],
    ids=str,
)
def test_names_of_hyperparameters(options, expected):
    model = Tiny()
    lt.adapt(model, "lora", where="q_proj", **options)
    assert method_of(model, "blocks.0.attn.q_proj") == expected


@pytest.mark.parametrize("alias", ["where", "target_modules", "lora_target"])
def test_names_of_where(alias):
    model = Tiny()
    lt.adapt(model, "lora", **{alias: ["q_proj", "v_proj"]})
    assert {n.split(".")[-1] for n in layers_of(model)} == {"q_proj", "v_proj"}


def test_names_of_the_other_options():
    model = Tiny(blocks=3)
    lt.adapt(model, "lora", exclude_modules=["o_proj", "mlp"], modules_to_save=["head"], target_modules="attention", layers_to_transform=[0, 1])  # fmt: skip
    assert set(layers_of(model)) == {f"blocks.{i}.attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    assert {n for n in lt.trained(model) if n.startswith("also")} == {"also_train/head.weight", "also_train/head.bias"}
    model = Tiny()
    lt.adapt(model, "lora", lora_target="q_proj", additional_target="head,norm")
    assert "also_train/blocks.1.norm.weight" in lt.trained(model)


@pytest.mark.parametrize(
    "options",
    [{"r": 4, "rank": 4}, {"lora_alpha": 1, "alpha": 2}, {"target_modules": "q_proj", "where": "q_proj"}],
    ids=str,
)
def test_one_setting_under_two_names_is_refused(options):
    model = Tiny()
    with pytest.raises(ValueError, match=r"are the same setting \((rank|alpha|where)\); give it once"):
        lt.adapt(model, "lora", **options)
    assert untouched(model)


def test_per_layer_settings():
    model = Tiny()
    patterns = {"attn.q_proj": {"rank": 2}, r"blocks\.1\..*": {"rank": 3, "alpha": 5.0}, "up_proj": {"rank": 1}}
    lt.adapt(model, lt.LoRA(rank=4), per_layer=patterns)
    ranks = {n: layer["default"].A.shape[0] for n, layer in layers_of(model).items()}
    assert ranks["blocks.0.attn.q_proj"] == ranks["blocks.1.attn.q_proj"] == 2  # the first pattern that matches counts
    assert ranks["blocks.1.attn.k_proj"] == ranks["blocks.1.up_proj"] == 3
    assert ranks["blocks.0.up_proj"] == 1
    assert ranks["blocks.0.attn.k_proj"] == ranks["head"] == 4
    assert method_of(model, "blocks.1.attn.k_proj") == lt.LoRA(rank=3, alpha=5.0)


def test_patterns_of_peft():
    model = Tiny()
    lt.adapt(model, "lora", r=4, lora_alpha=4, rank_pattern={"q_proj": 2, "head": 1}, alpha_pattern={"q_proj": 6})
    assert method_of(model, "blocks.0.attn.q_proj") == lt.LoRA(rank=2, alpha=6)
    assert method_of(model, "head") == lt.LoRA(rank=1, alpha=4)
    assert method_of(model, "blocks.0.attn.k_proj") == lt.LoRA(rank=4, alpha=4)


@pytest.mark.parametrize(
    ("method", "where", "options", "error", "message"),
    [
        ("lorra", None, {}, ValueError, r"there is no method 'lorra'; nearest names: lora"),
        ("lora", None, {"rnak": 4}, TypeError, r"LoRA has no hyper-parameter 'rnak'.*nearest names: rank"),
        ("lora", None, {"exclud": "head"}, TypeError, r"no such option; nearest names: exclude"),
        (lt.LoRA(), None, {"rank": 4}, TypeError, r"adapt got rank beside a finished LoRA; set them on it"),
        (lt.LoRA, None, {}, TypeError, r"method is a type; give a method such as loratory.LoRA\(rank=8\)"),
        (8, None, {}, TypeError, r"method is a int; give a method such as"),
        ("lora", None, {"rank": 0}, ValueError, r"rank is 0; it must be a positive integer"),
        ("lora", None, {"rank": True}, TypeError, r"rank is True; it must be a positive integer"),
        ("lora", None, {"rank": 2.5}, TypeError, r"rank is 2.5; it must be a positive integer"),
        ("lora", None, {"rank": 9}, ValueError, r"layer 'blocks.0.attn.q_proj' has 8 inputs and 8 outputs, so rank 9 .*\(at most 8\)"),
        ("lora", None, {"alpha": 0}, ValueError, r"alpha is 0; it must be a positive"),
        ("lora", None, {"dropout": 1.0}, ValueError, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ("lora", "embed", {"dropout": 0.1}, ValueError, r"layer 'embed' is an embedding.*dropout 0.1 cannot apply"),
        ("dora", "embed", {"dropout": 0.1}, ValueError, r"layer 'embed' is an embedding.*dropout 0.1 cannot apply"),
        ("lora", "norm", {}, TypeError, r"layer 'blocks.0.norm' is a LayerNorm"),
        ("lora", "q_proj", {"name": "a.b"}, ValueError, r"adapter name 'a.b' cannot be used; letters, digits"),
        ("lora", "q_proj", {"name": ""}, ValueError, r"adapter name '' cannot be used"),
        ("lora", "q_proj", {"name": "keys"}, ValueError, r"adapter name 'keys' cannot be used.*attribute name"),
        ("lora", "q_proj", {"name": "active"}, ValueError, r"adapter name 'active' cannot be used"),
        ("lora", "q_proj", {"name": "mix"}, ValueError, r"adapter name 'mix' cannot be used"),
        ("lora", "q_proj", {"name": "site"}, ValueError, r"adapter name 'site' cannot be used"),
        ("lora", "q_proj", {"name": 3}, ValueError, r"adapter name 3 cannot be used"),
        ("lora", "q_proj", {"bias": "some"}, ValueError, r"bias is 'some'; it must be one of none, all, adapted"),
        ("lora", "q_proj", {"also_train": "haed"}, ValueError, r"also_train names 'haed'.*nearest names: head"),
        ("lora", "head, q_proj", {"also_train": "head"}, ValueError, r"layer 'head' is chosen both by where= and by also_train="),
        ("lora", "q_proj", {"per_layer": {"k_proj": {"rank": 2}}}, ValueError, r"per_layer names 'k_proj', which none of the chosen layers matches; nearest names: q_proj"),
        ("lora", "q_proj", {"per_layer": {"q_proj": {"rnk": 2}}}, TypeError, r"per_layer\['q_proj'\] sets 'rnk', which LoRA does not have; nearest names: rank"),
        ("lora", "q_proj", {"per_layer": {"q_proj": {"rank": 0}}}, ValueError, r"rank is 0"),
        ("lora", "q_proj", {"rank_pattern": {"(q_proj": 2}}, ValueError, r"per_layer names '\(q_proj', which is no regular expression"),
    ],
)  # fmt: skip
def test_refusals_leave_the_model_untouched(method, where, options, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        lt.adapt(model, method, where, **options)
    assert untouched(model)


def test_dropout_can_be_left_out_for_the_embedding():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2, dropout=0.1), "embed, head", per_layer={"embed": {"dropout": 0.0}})
    assert model.train()(IDS).shape == (2, 4, 11)


def test_a_taken_name_is_refused():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.raises(
        ValueError,
        match=r"the adapter name 'default' is taken; give another name=, or call loratory.detach\(model, 'default'\)",
    ):
        lt.adapt(model, lt.LoRA(rank=2))
    assert lt.adapters(model) == ("default",)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model is a dict; it must be a torch.nn.Module"):
        lt.adapt({}, lt.LoRA())
    with pytest.raises(ValueError, match=r"this Tiny has no adapters; call loratory.adapt\(model, ...\)"):
        lt.summary(Tiny())


def test_a_part_that_is_adapted_already_is_refused():
    model = Tiny()
    lt.adapt(model.blocks[0], lt.LoRA(rank=2), "q_proj")
    with pytest.raises(RuntimeError, match="a part of this model is adapted already on its own; detach it there first"):
        lt.adapt(model, lt.LoRA(rank=2))


def test_a_single_layer_as_model_is_refused():
    with pytest.raises(
        ValueError, match=r"the model itself is a single layer, which has no name; put it into a module"
    ):
        lt.adapt(nn.Linear(3, 3), lt.LoRA(), lambda name, module: True)


def test_a_bare_sequential_works():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    before = model(x)
    lt.adapt(model, lt.LoRA(rank=2))
    assert list(layers_of(model)) == ["0", "2"]
    assert len(model) == 3
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == [
        "0.weight", "0.bias", "0.loratory.default.A", "0.loratory.default.B",
        "2.weight", "2.bias", "2.loratory.default.A", "2.loratory.default.B",
    ]  # fmt: skip
    assert isinstance(model[0], nn.Linear)
    assert model[:1](x).shape == (5, 4)


def test_the_adapted_tree_in_full():
    model = Tiny(blocks=1)
    lt.adapt(model, lt.DoRA(rank=2), "q_proj", also_train="head")
    assert {n: tuple(p.shape) for n, p in lt.trained(model).items()} == {
        "layers/blocks.0.attn.q_proj/A": (2, 8),
        "layers/blocks.0.attn.q_proj/B": (8, 2),
        "layers/blocks.0.attn.q_proj/m": (8,),
        "also_train/head.weight": (11, 8),
        "also_train/head.bias": (11,),
    }


def test_trained_names_carry_the_adapter_where_two_are_active():
    model = Tiny(blocks=1)
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="a")
    lt.adapt(model, lt.LoRA(rank=2), "k_proj", name="b")
    lt.use(model, "a", "b")
    assert list(lt.trained(model)) == [
        "a/layers/blocks.0.attn.q_proj/A", "a/layers/blocks.0.attn.q_proj/B",
        "b/layers/blocks.0.attn.k_proj/A", "b/layers/blocks.0.attn.k_proj/B",
    ]  # fmt: skip


def test_a_seed_makes_the_start_and_leaves_the_global_generator_alone():
    starts = []
    for _ in range(2):
        model = Tiny()
        torch.manual_seed(len(starts))
        before = torch.random.get_rng_state()
        lt.adapt(model, lt.LoRA(rank=2), seed=7)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append(lt.trained(model))
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), seed=8)
    assert not torch.equal(lt.trained(model)["layers/head/A"], starts[0]["layers/head/A"])
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_requires_grad_of_the_base_returns():
    model = Tiny()
    model.embed.requires_grad_(False)
    lt.adapt(model, lt.LoRA(rank=2))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "loratory" in n
    }
    lt.detach(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"embed.weight"}


def test_detach_of_an_unknown_name():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), name="french")
    with pytest.raises(ValueError, match=r"there is no adapter 'frensh'; the model has: french"):
        lt.detach(model, "frensh")
    assert lt.active(model) == ("french",)


def test_detaching_one_of_three_keeps_the_mix_of_the_others():
    model = Tiny()
    for i, name in enumerate("abc"):
        lt.adapt(model, lt.LoRA(rank=2), "q_proj", name=name)
        with torch.no_grad():
            for p in lt.trained(model).values():
                p.add_(0.1 * (i + 1))
    lt.use(model, "a", "c", mix=[0.3, 0.7])
    expected = model(IDS)
    lt.use(model, "a", "b", "c", mix=[0.3, 5.0, 0.7])
    lt.detach(model, "b")
    assert lt.active(model) == ("a", "c")
    assert torch.equal(model(IDS), expected)


def replicas(model: nn.Module) -> list[nn.Module]:
    """How replicate() asks each module for a copy; the rest of it needs GPUs."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


@pytest.mark.parametrize(("make", "method"), [(Tiny, "lora"), (tiny_gpt2, "prompt-tuning")])
def test_copies_of_data_parallel_are_refused(make, method):
    model = make()
    lt.adapt(model, method)
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        replicas(model)
    lt.detach(model)
    replicas(model)
