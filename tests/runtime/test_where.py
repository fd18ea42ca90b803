"""Where a method acts: presets, names, regular expressions, predicates, exclusions, blocks, and what is refused."""

import pytest
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from loratory.runtime.where import select
from tests.runtime.models import Tiny, tiny_bert, tiny_gpt2

Q = ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]
ATTENTION = [f"blocks.{i}.attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"blocks.{i}.{p}" for i in (0, 1) for p in ("up_proj", "down_proj")]


def shown(value):
    """A name for a test case that is the same in every process."""
    return "predicate" if callable(value) else repr(sorted(value) if isinstance(value, set) else value)


BLOCKS = [*ATTENTION[:4], *MLP[:2], *ATTENTION[4:], *MLP[2:]]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("all-linear", [*BLOCKS, "head"]),
        ("all", [*BLOCKS, "head"]),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("embedding", ["embed"]),
        ("q_proj", Q),
        ("attn.q_proj", Q),
        ("blocks.1.attn.q_proj", Q[1:]),
        (" q_proj , head ", [*Q, "head"]),
        (["q_proj", "embedding"], ["embed", *Q]),
        (("q_proj",), Q),
        ({"q_proj", "head"}, [*Q, "head"]),
        (r".*\.q_proj", Q),
        (r"blocks\.[1-9]\.attn\.(q|k)_proj", ["blocks.1.attn.q_proj", "blocks.1.attn.k_proj"]),
        (r"blocks\.0\..*", BLOCKS[:6]),
        (lambda name, module: isinstance(module, nn.Linear) and module.out_features == 16, [MLP[0], MLP[2]]),
    ],
    ids=shown,
)
def test_choice(where, chosen):
    assert list(select(Tiny(), where)) == chosen
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), where)
    assert list(layers_of(model)) == chosen


@pytest.mark.parametrize(
    ("exclude", "chosen"),
    [
        ("head", BLOCKS),
        ("mlp", ["head", *ATTENTION]),
        (["head", "o_proj", "mlp"], [n for n in ATTENTION if "o_proj" not in n]),
        (r"blocks\.0\..*", [*BLOCKS[6:], "head"]),
        (lambda name, module: "proj" in name, ["head"]),
    ],
    ids=shown,
)
def test_exclude(exclude, chosen):
    assert sorted(select(Tiny(), "all-linear", exclude=exclude)) == sorted(chosen)


def test_blocks():
    model = Tiny(blocks=3)
    assert list(select(model, "q_proj", blocks=[0, 2])) == ["blocks.0.attn.q_proj", "blocks.2.attn.q_proj"]
    assert list(select(model, "q_proj", blocks=1)) == ["blocks.1.attn.q_proj"]
    with pytest.raises(ValueError, match=r"blocks holds \[7\], but the chosen layers lie in blocks \[0, 1, 2\]"):
        select(model, "q_proj", blocks=[0, 7])


def test_conv_preset():
    model = nn.ModuleDict({"a": nn.Conv2d(2, 2, 3), "b": nn.Linear(2, 2), "c": nn.ConvTranspose2d(2, 2, 3)})
    assert list(select(model, "conv")) == ["a"]


def test_a_name_is_matched_at_dots():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "freq": nn.Linear(2, 2)})
    assert list(select(model, "q")) == ["q"]


def test_a_wrong_name_is_an_error_with_the_three_nearest():
    with pytest.raises(ValueError, match=r"where names 'q_prj', which no layer .* nearest names: q_proj, \w+, \w+$"):
        select(Tiny(), ["q_prj", "v_proj"])
    with pytest.raises(ValueError, match=r"where names 'query'.*nearest names: "):
        select(Tiny(), "q_proj, query")
    with pytest.raises(ValueError, match=r"exclude names 'haed'.*nearest names: head"):
        select(Tiny(), "all-linear", exclude="haed")


def test_nothing_matched_shows_five_layers():
    shown = r"layers of this model are, for example: embed, blocks.0.attn.q_proj(, [\w.]+){3}$"
    with pytest.raises(ValueError, match=rf"no layer matches where='layers.*'; {shown}"):
        select(Tiny(), r"layers\.\d+\.q")
    with pytest.raises(ValueError, match=rf"no layer matches where='conv'; {shown}"):
        select(Tiny(), "conv")
    with pytest.raises(ValueError, match=rf"no layer matches where=<function .*; {shown}"):
        select(Tiny(), lambda name, module: False)
    with pytest.raises(ValueError, match="no layer matches where="):
        select(Tiny(), r"blocks\.\d\.attn\.q")  # an expression is for the whole name
    with pytest.raises(ValueError, match=r"no layer matches where='head' without exclude='head'"):
        select(Tiny(), "head", exclude="head")
    with pytest.raises(ValueError, match="this model has no layer that can be adapted"):
        select(nn.Sequential(nn.ReLU()), "all-linear")


def test_bad_kinds():
    with pytest.raises(ValueError, match=r"where='\(q_proj' is no regular expression \(.*\); give a preset"):
        select(Tiny(), "(q_proj")
    with pytest.raises(TypeError, match=r"where is a int; allowed are a preset, names"):
        select(Tiny(), 3)
    with pytest.raises(TypeError, match=r"where holds 3; each entry must be a layer name or a preset"):
        select(Tiny(), ["q_proj", 3])


def test_a_chosen_layer_without_a_matrix_is_an_error_naming_its_type():
    model = Tiny()
    for where in ("norm", lambda name, module: name.endswith("norm")):
        with pytest.raises(TypeError, match=r"layer 'blocks.0.norm' is a LayerNorm, which has no matrix"):
            lt.adapt(model, lt.LoRA(rank=2), where)
    assert lt.adapters(model) == ()


def test_all_linear_leaves_out_the_head(stories):
    assert not any("lm_head" in n for n in select(stories(), "all-linear"))
    assert set(select(stories(), "lm_head")) == {"lm_head"}
    assert "classifier" not in select(tiny_bert(), "all-linear")
    assert {n.split(".")[-1] for n in select(tiny_gpt2(), "all-linear")} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("family", ["SiglipVision", "CLIPVision"])
def test_the_head_of_a_vision_tower_is_left_out_too(family):
    """Its `base_model` is the model itself."""
    import transformers as tf

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4}  # fmt: skip
    whole = family.removesuffix("Vision")
    config = getattr(tf, f"{whole}Config")(vision_config=sizes, num_labels=3)
    model = getattr(tf, f"{whole}ForImageClassification")(config)
    chosen = select(model, "all-linear")
    assert chosen
    assert "classifier" not in chosen


def test_presets_on_transformers_models(stories):
    names = {n.split(".")[-1] for n in select(stories(), "attention")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {n.split(".")[-1] for n in select(stories(), "mlp")} == {"gate_proj", "up_proj", "down_proj"}
    assert list(select(stories(), "embedding")) == ["model.embed_tokens"]
    bert = tiny_bert()
    assert {n.split("layer.")[-1][2:] for n in select(bert, "attention")} == {
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    }  # fmt: skip
    assert {n.split("layer.")[-1][2:] for n in select(bert, "mlp")} == {"intermediate.dense", "output.dense"}
    assert list(select(bert, "embedding")) == ["bert.embeddings.word_embeddings"]
    gpt2 = tiny_gpt2()
    assert {n.split(".", 3)[-1] for n in select(gpt2, "attention")} == {"attn.c_attn", "attn.c_proj"}
    assert {n.split(".", 3)[-1] for n in select(gpt2, "mlp")} == {"mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize("family", ["stories", "bert", "gpt2"])
def test_all_linear_is_that_of_peft(family, stories):
    from peft import LoraConfig, get_peft_model

    make = {"stories": stories, "bert": tiny_bert, "gpt2": tiny_gpt2}[family]
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = LoraConfig(target_modules="all-linear", task_type=task, fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(make(), config).base_model.targeted_module_names
    assert sorted(select(make(), "all-linear")) == sorted(theirs)
