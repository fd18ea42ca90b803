"""What is peculiar to prefix tuning: its start, its network and its bad input."""

import pytest
import torch

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.bodies import BODIES, IDS, METHODS, SIZES, BodyRow, Case, bert, llama, outputs, qwen3


def count(method, site):
    each = site.heads * site.head_dim
    columns = SIZES["num_hidden_layers"] * 2 * each
    if method.hidden:
        return method.tokens * each + method.hidden * (each + 1) + columns * (method.hidden + 1)
    return method.tokens * columns


ROW = BodyRow(
    made={label: method for label, method in METHODS.items() if label != "prompt"}, count=count, bodies=BODIES
)
PLANTED = [
    (
        "keys and values exchanged",
        "P[:, :, i] = each",
        "P[:, :, 1 - i] = each",
        "tests/laws/test_bodies.py::test_from_token_ids_the_model_starts_as_after_these_tokens",
    ),
    (
        "prefix of the block before",
        "t.P[:, block]",
        "t.P[:, block - 1]",
        "tests/laws/test_bodies.py::test_from_token_ids_the_model_starts_as_after_these_tokens",
    ),
    (
        "network without its bias",
        " + t.b2[block].unsqueeze(-2)",
        "",
        "tests/laws/test_bodies.py::test_gradients_reach_exactly_the_declared_tensors",
    ),
    (
        "network without its bend",
        "torch.tanh(t.E @ t.W1.T + t.b1)",
        "(t.E @ t.W1.T + t.b1)",
        "tests/oracle/test_virtual_tokens.py",
    ),
]


def test_tensors():
    model = Case(llama, lt.PrefixTuning(tokens=5)).adapted()
    assert {n: tuple(p.shape) for n, p in lt.trained(model).items()} == {"layers/model/P": (5, 2, 2, 2, 4)}
    model = Case(qwen3, lt.PrefixTuning(tokens=5, hidden=3)).adapted()
    assert {n: tuple(p.shape) for n, p in lt.trained(model).items()} == {
        "layers/model/E": (5, 16),
        "layers/model/W1": (3, 16),
        "layers/model/b1": (3,),
        "layers/model/W2": (2, 2, 2, 8, 3),
        "layers/model/b2": (2, 2, 2, 8),
    }
    decayed = {
        n.split("/")[-1]: g["weight_decay"] for g in lt.param_groups(model, weight_decay=0.1) for n in g["names"]
    }
    assert decayed == {"E": 0.1, "W1": 0.1, "b1": 0.0, "W2": 0.1, "b2": 0.0}


def test_attention_by_hand():
    """One block, one head: softmax over the prefix and the text, on which the prefix is not rotated."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, attn_implementation="eager"
    )  # fmt: skip
    model = LlamaModel(config).eval()
    lt.adapt(model, lt.PrefixTuning(tokens=2))
    (P,) = lt.trained(model).values()
    with torch.no_grad():
        P.normal_()
    attention, seen = model.layers[0].self_attn, {}
    attention.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=kwargs["hidden_states"], y=out[0]), with_kwargs=True
    )
    model(torch.tensor([[3, 4, 5]]))
    x = seen["x"][0]
    angle = torch.arange(2, 5)[:, None] * torch.tensor([1.0, 10000**-0.5])  # positions 2, 3, 4
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    q, k = (u * cos + torch.cat([-u[:, 2:], u[:, :2]], 1) * sin for u in (attention.q_proj(x), attention.k_proj(x)))
    k, v = torch.cat([P[:, 0, 0, 0], k]), torch.cat([P[:, 0, 1, 0], attention.v_proj(x)])
    scores = q @ k.T / 2
    scores[torch.ones(3, 5).triu(3).bool()] = -torch.inf
    torch.testing.assert_close(seen["y"][0], attention.o_proj(scores.softmax(-1) @ v))


def test_a_start_from_tokens_runs_the_base_alone():
    """An adapter that is active meanwhile, even one of virtual tokens, does not show in the start of another."""
    method = lt.PrefixTuning(tokens=3, ids=(4, 9, 7))
    alone = Case(llama, method).adapted()
    model = Case(llama, lt.PromptTuning(tokens=2)).adapted(name="a")
    lt.adapt(model, lt.LoRA(rank=2), name="b", bias="all")
    with torch.no_grad():
        for p in lt.trained(model).values():
            p.add_(0.3)
    lt.use(model, "a", "b")
    model.train()
    lt.adapt(model, method, name="c")
    assert model.training
    assert torch.equal(layers_of(model)["model"]["c"].P, layers_of(alone)["model"]["default"].P)


def test_bad_input():
    for options, field in (({"tokens": 0}, "tokens"), ({"hidden": 0}, "hidden"), ({"ids": ()}, "ids")):
        with pytest.raises(ValueError, match=field):
            lt.PrefixTuning(**options)
    with pytest.raises(ValueError, match="hidden is 4 and ids are given"):
        lt.PrefixTuning(hidden=4, ids=(1,))
    with pytest.raises(ValueError, match="keeps no keys and values, so a prefix cannot start from token ids"):
        Case(bert, lt.PrefixTuning(tokens=2, ids=(1, 2))).adapted()


def test_a_config_that_does_not_tell_the_heads_is_refused_at_the_first_text():
    model = Case(llama, lt.PrefixTuning(tokens=2)).plain()
    model.config.num_key_value_heads = 4
    lt.adapt(model, lt.PrefixTuning(tokens=2))
    with pytest.raises(
        RuntimeError, match="attention block 0 has 2 key heads of 4, but the model's config gives 4 of 4"
    ):
        outputs(model, IDS)
