"""What PEFT saves loads here with equal outputs, and the other way round."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import loratory as lt

from .pairs import assert_equal, loaded, outputs, peft_adapted, quiet, randomised, read_by_peft, saved, train

LINEAR = ["q_proj", "v_proj", "down_proj"]

# PEFT's options, and ours that give the same adapter
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"r": 4, "lora_alpha": 8, "target_modules": LINEAR}, {"rank": 4, "alpha": 8, "where": LINEAR}),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR}, {"rank": 4, "alpha": 8, "rslora": True, "where": LINEAR}),
    "dora": ({"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR}, {"method": "dora", "rank": 4, "alpha": 8, "where": LINEAR}),
    "dora and rslora": (
        {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True, "target_modules": LINEAR},
        {"method": "dora", "rank": 4, "alpha": 8, "rslora": True, "where": LINEAR},
    ),
    "all-linear": ({"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}, {"rank": 2, "alpha": 8}),
    "expression": ({"r": 2, "target_modules": r".*layers\.[12]\..*\.(q|v)_proj"}, {"rank": 2, "alpha": 8, "where": r".*layers\.[12]\..*\.(q|v)_proj"}),
    "excluded": (
        {"r": 2, "target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"rank": 2, "alpha": 8, "where": ["q_proj"], "exclude": ["model.layers.0.self_attn.q_proj"]},
    ),
    "some blocks": ({"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 3]}, {"rank": 2, "alpha": 8, "where": ["q_proj"], "blocks": [1, 3]}),
    "layers pattern": (
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
        {"rank": 2, "alpha": 8, "where": ["q_proj"], "blocks": [1, 3]},
    ),
    "patterns": (
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"v_proj": 2, r"layers\.1\..*down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"rank": 4, "alpha": 8, "where": LINEAR, "per_layer": {"v_proj": {"rank": 2, "alpha": 3}, r"layers\.1\..*down_proj": {"rank": 6}}},
    ),
    "patterns and rslora": (
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"rank": 4, "alpha": 8, "rslora": True, "where": LINEAR, "per_layer": {"v_proj": {"rank": 2}, "q_proj": {"alpha": 5}}},
    ),
    "a module in full": ({"r": 2, "target_modules": LINEAR, "modules_to_save": ["norm"]}, {"rank": 2, "alpha": 8, "where": LINEAR, "also_train": ["model.norm"]}),
    "embedding": ({"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, {"rank": 2, "alpha": 8, "where": ["embed_tokens", "q_proj"]}),
    "embedding, dora": (
        {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"method": "dora", "rank": 2, "alpha": 8, "where": ["embed_tokens", "q_proj"]},
    ),
    "head of a tied model": ({"r": 2, "target_modules": ["lm_head", "q_proj"]}, {"rank": 2, "alpha": 8, "where": ["lm_head", "q_proj"]}),
    "head in full, parted": (
        {"r": 2, "target_modules": LINEAR, "modules_to_save": ["lm_head"]},
        {"rank": 2, "alpha": 8, "where": LINEAR, "also_train": ["lm_head"], "untie": True},
    ),
    "embedding in full, parted": (
        {"r": 2, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
        {"rank": 2, "alpha": 8, "where": LINEAR, "also_train": ["embed_tokens"], "untie": True},
    ),
    "both in full, parted": (
        {"r": 2, "target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"rank": 2, "alpha": 8, "where": LINEAR, "also_train": ["embed_tokens", "lm_head"], "untie": True},
    ),
    "both in full, tied": (
        {"r": 2, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"rank": 2, "alpha": 8, "where": LINEAR, "also_train": ["embed_tokens"]},
    ),
    "tied LoRAs": ({"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, {}),
    "tied LoRAs, by the head": ({"r": 2, "target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True, "use_rslora": True}, {}),
    "tied LoRAs, by an expression": ({"r": 2, "target_modules": "(.*q_proj|embed_tokens)", "ensure_weight_tying": True}, {}),
    "tied DoRAs": ({"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, {}),
    "ties asked for that PEFT does not make": ({"r": 2, "target_modules": ".*(embed_tokens|q_proj)$", "ensure_weight_tying": True}, {}),
    "dropout": ({"r": 2, "target_modules": LINEAR, "lora_dropout": 0.3}, {"rank": 2, "alpha": 8, "where": LINEAR, "dropout": 0.3}),
    "rank above the layer": ({"r": 80, "target_modules": ["q_proj"]}, {}),
    "gaussian start": ({"r": 2, "target_modules": LINEAR, "init_lora_weights": "gaussian"}, {"rank": 2, "alpha": 8, "where": LINEAR, "start": "gaussian"}),
    "orthogonal start": ({"r": 2, "target_modules": LINEAR, "init_lora_weights": "orthogonal"}, {}),
}  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
def test_a_peft_adapter_gives_the_same_logits_here(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    base, x = stories(), ids()
    theirs = peft_adapted(base, **CASES[case][0])
    mine = loaded(base, saved(theirs, tmp_path / "a"))
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
    before = base.state_dict()
    lt.detach(mine)
    assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items())
    assert mine.config.tie_word_embeddings is True


@pytest.mark.parametrize("case", [name for name, (_, ours) in CASES.items() if ours])
def test_our_adapter_gives_the_same_logits_in_peft(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    base, x = stories(), ids()
    options = dict(CASES[case][1])
    mine = copy.deepcopy(base)
    lt.adapt(mine, options.pop("method", "lora"), **options)
    randomised(mine)
    lt.export(mine, tmp_path / "a", to="peft")
    theirs = read_by_peft(base, tmp_path / "a")
    assert_equal(outputs(theirs, x), outputs(mine.eval(), x), base=outputs(base, x))
    again = loaded(base, tmp_path / "a")
    assert_equal(outputs(again, x), outputs(mine, x))
    wanted = dict(lt.trained(mine))
    got = lt.trained(loaded(base, tmp_path / "a", trainable=True))
    assert set(got) == set(wanted)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize(
    "case", ["lora", "dora", "embedding", "both in full, parted", "both in full, tied", "a module in full"]
)
def test_go_on_training_from_a_peft_adapter(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    base, x = stories(), ids()
    theirs = peft_adapted(base, **CASES[case][0])
    folder = saved(theirs, tmp_path / "a")
    theirs = read_by_peft(base, folder, is_trainable=True)
    mine = loaded(base, folder, trainable=True)
    runs = [
        train([p for p in m.parameters() if p.requires_grad], lambda i, m=m: m(x, labels=x).loss, steps=8, lr=1e-3)
        for m in (theirs, mine)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[1][-1] < runs[1][0]
    a, b = outputs(mine, x), outputs(theirs, x)
    assert float((a - b).abs().max()) < 2e-3 * float(b.abs().max())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_of_transformers_and_biases(bias: str, dora: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    base, x = GPT2LMHeadModel(config).eval(), torch.arange(12).reshape(2, 6)
    theirs = peft_adapted(base, r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, bias=bias, use_dora=dora)
    mine = loaded(base, saved(theirs, tmp_path / "a"), trainable=True)
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
    names = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(lt.trained(mine)) == len(names)
    lt.export(mine, tmp_path / "b", to="peft")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["bias"] == bias
    assert_equal(outputs(read_by_peft(base, tmp_path / "b"), x), outputs(theirs, x))


class Residual(nn.Module):
    """A tiny convolutional net with a batch norm, a skip and a pooled head."""

    def __init__(self, *, groups: int = 1, bias: bool = True, dims: int = 2) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = conv(4, 8, 3, padding=1, bias=bias)
        self.block = nn.Sequential(conv(8, 8, 3, padding=1, stride=2, groups=groups), norm(8), nn.ReLU())
        self.skip = conv(8, 8, 1, stride=2)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu()
        h = self.block(h) + self.skip(h)
        return self.head(h.flatten(2).mean(-1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(dims: int, dora: bool, tmp_path: Path) -> None:
    base, x = Residual(dims=dims, bias=dims != 2).eval(), torch.randn(2, 4, *[6] * dims)
    options: dict[str, Any] = {
        "r": 2,
        "target_modules": ["stem", "block.0", "skip"],
        "rank_pattern": {"stem": 3},
        "use_dora": dora,
    }
    theirs = peft_adapted(base, **options, modules_to_save=["head"], bias="lora_only")
    mine = loaded(base, saved(theirs, tmp_path / "a"), trainable=True)
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
    lt.export(mine, tmp_path / "b", to="peft")
    again = read_by_peft(base, tmp_path / "b")
    assert_equal(outputs(again, x), outputs(theirs, x))


def test_a_grouped_convolution_goes_out_and_comes_back(tmp_path: Path) -> None:
    base, x = Residual(groups=2).eval(), torch.randn(2, 4, 6, 6)
    mine = copy.deepcopy(base)
    lt.adapt(mine, "lora", where=["block.0", "stem"], rank=2, alpha=6)
    randomised(mine)
    lt.export(mine, tmp_path / "a", to="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    assert_equal(outputs(read_by_peft(base, tmp_path / "a"), x), outputs(mine, x), base=outputs(base, x))
    assert_equal(outputs(loaded(base, tmp_path / "a"), x), outputs(mine, x))


def test_peft_mixing_the_groups_of_a_convolution_is_refused(tmp_path: Path) -> None:
    base = Residual(groups=2).eval()
    folder = saved(peft_adapted(base, r=2, target_modules=["block.0"]), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"layer 'block.0' has 2 groups, and PEFT's adapter carries inputs of one group"
    ):
        loaded(base, folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_a_resized_vocabulary(tied: bool, target: list[str], stories: Callable[[], Any], tmp_path: Path) -> None:
    def fresh(seed: int) -> Any:
        base = stories()
        if not tied:
            base.config.tie_word_embeddings = False
            base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() + 0.01)
        torch.manual_seed(seed)
        base.resize_token_embeddings(520)  # the new rows are random
        return base

    base, x = fresh(1), torch.arange(500, 520).reshape(2, 10)
    theirs = peft_adapted(base, r=2, target_modules=target)
    folder = saved(theirs, tmp_path / "a", save_embedding_layers=True)
    mine = loaded(fresh(1), folder)
    assert_equal(outputs(mine, x), outputs(theirs, x))
    if tied:  # PEFT's own file lacks the head of an untied model where the embedding is adapted
        other = fresh(2)
        mine = loaded(other, folder, trainable=True)
        assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(other, x))
        assert not any("embed" in n and "also_train" in n for n in lt.trained(mine))
        lt.save(mine, tmp_path / "own")
        assert not any("also_train" in n for n in lt.trained(loaded(fresh(2), tmp_path / "own", trainable=True)))
        lt.export(mine, tmp_path / "b", to="peft")
        assert_equal(outputs(read_by_peft(fresh(3), tmp_path / "b"), x), outputs(theirs, x))


def test_a_classifier(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    base, x = LlamaForSequenceClassification(config).eval(), torch.arange(1, 13).reshape(2, 6)
    with quiet():
        theirs = peft_adapted(base, r=2, target_modules="all-linear", task_type="SEQ_CLS")
    mine = loaded(base, saved(theirs, tmp_path / "a"), trainable=True)
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
    lt.export(mine, tmp_path / "b", to="peft")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert_equal(outputs(read_by_peft(base, tmp_path / "b"), x), outputs(theirs, x))


def test_other_low_rank_methods_go_out_as_the_lora_they_equal(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(4, 6)
    mine = copy.deepcopy(base)
    lt.adapt(mine, lt.MergedLoRA(groups=(True, False, True), rank=2, alpha=4), ["0"])
    randomised(mine)
    lt.export(mine, tmp_path / "a", to="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 4
    assert_equal(outputs(read_by_peft(base, tmp_path / "a"), x), outputs(mine, x), base=outputs(base, x))


def test_names_that_end_like_others_are_written_exactly(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    mine, x = copy.deepcopy(base), torch.randn(3, 4)
    lt.adapt(mine, lt.LoRA(rank=2), lambda name, module: name == "0")
    randomised(mine)
    lt.export(mine, tmp_path / "a", to="peft")
    assert_equal(outputs(read_by_peft(base, tmp_path / "a"), x), outputs(mine, x), base=outputs(base, x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_bfloat16_base(kind: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    """PEFT keeps the adapter in float32 and so do we; PEFT also computes it so, we in the base's precision."""
    base, x = stories().bfloat16(), ids()
    theirs = peft_adapted(base, **CASES[kind][0])
    mine = loaded(base, saved(theirs, tmp_path / "a"))
    assert {p.dtype for n, p in mine.named_parameters() if "loratory" in n} == {torch.float32}
    wanted, got, plain = outputs(theirs, x), outputs(mine, x), outputs(base, x)
    assert float((got - wanted).norm()) < 0.02 * float(wanted.norm()) < 0.2 * float((wanted - plain).norm())


def test_loras_that_peft_ties_merge_into_one_weight_and_are_not_parted(
    stories: Callable[[], Any], tmp_path: Path
) -> None:
    base, x = stories(), ids()
    theirs = peft_adapted(base, **CASES["tied LoRAs"][0])
    folder = saved(theirs, tmp_path / "a")
    mine = loaded(base, folder)
    assert {"model.embed_tokens", "lm_head"} <= set(lt.inspect(folder).layers)
    wanted, plain = outputs(mine, x), outputs(base, x)
    lt.merge(mine)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert mine.config.tie_word_embeddings is True
    assert_equal(outputs(mine, x), wanted, base=plain)
    lt.unmerge(mine)
    assert torch.equal(outputs(mine, x), wanted)
    lt.merge(mine)
    lt.detach(mine)
    assert torch.equal(outputs(mine, x), plain)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    mine = loaded(base, folder)
    lt.export(mine, tmp_path / "again", to="peft")
    assert_equal(outputs(read_by_peft(base, tmp_path / "again"), x), outputs(theirs, x))
    with pytest.raises(
        ValueError, match=r"ties the LoRA of 'lm_head' to that of the embedding \(ensure_weight_tying\)"
    ):
        loaded(base, folder, trainable=True)
    lt.export(mine, tmp_path / "merged", to="merged")
    assert_equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), x), wanted)
    other = stories()
    lt.adapt(other, lt.LoRA(rank=2), where=["embed_tokens", "lm_head"])
    randomised(other)
    with pytest.raises(ValueError, match="shares its weight with 'lm_head', so merging would change both"):
        lt.merge(other)
    file = folder / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(ValueError, match=r"lacks 2 of the \d+ tensors .*'lm_head.lora_A.weight'"):
        loaded(base, folder)


def test_a_tied_weight_saved_once_goes_into_both_places(stories: Callable[[], Any], tmp_path: Path) -> None:
    base, x = stories(), ids()
    theirs = peft_adapted(base, **CASES["both in full, tied"][0])
    file = saved(theirs, tmp_path / "a") / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    mine = loaded(base, tmp_path / "a", trainable=True)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
