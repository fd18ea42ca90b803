"""Rows that cannot share one call of the model: in groups they give the same numbers as one adapter after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.sites.block import parameters
from tests.laws.bodies import BODIES, CAUSAL, METHODS, Case, cases
from tests.laws.kinds import move
from tests.runtime.models import tiny_bert
from tests.runtime.test_rows import Names, alone, close

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
IDS = torch.cat([IDS, IDS.flip(1)[:2]])
SERVED: Names = ["long", None, "short", "lora", "long", "dora"]
MASK = torch.ones_like(IDS)
MASK[1, :3] = MASK[4, :2] = 0  # padded left


def served(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """Virtual tokens of two lengths, and adapters of layers beside them."""
    model = case.plain(dtype)
    for i, (name, method) in enumerate(
        [
            ("long", case.method),
            ("short", lt.PromptTuning(tokens=1)),
            ("lora", lt.LoRA(rank=2)),
            ("dora", lt.DoRA(rank=1)),
        ]
    ):
        lt.adapt(model, method, name=name, seed=i)
        move(model, seed=i)
    return model


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    out.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("case", cases(BODIES, METHODS))
def test_virtual_tokens_of_each_row(case: Case):
    model = served(case)
    wanted = alone(model, SERVED, lambda i: model(IDS[i : i + 1], attention_mask=MASK[i : i + 1])[0])
    slow = gradients(model, wanted)
    with lt.rows(model, SERVED):
        out = model(IDS, attention_mask=MASK)[0]
        close(out, wanted)
        fast = gradients(model, out)
    assert set(slow) == set(fast)
    assert any(".long." in n for n in slow)
    for n in slow:
        torch.testing.assert_close(fast[n], slow[n], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("case", cases(CAUSAL, {"prompt": METHODS["prompt"], "prefix": METHODS["prefix"]}))
def test_generate(case: Case, options: dict[str, Any]):
    model = served(case)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        wanted = alone(
            model, SERVED, lambda i: model.generate(IDS[i : i + 1], attention_mask=MASK[i : i + 1], **settings)
        )
        with lt.rows(model, SERVED):
            assert torch.equal(model.generate(IDS, attention_mask=MASK, **settings), wanted)
    assert len({tuple(row.tolist()) for row in wanted[:, -5:]}) > 3


@pytest.mark.parametrize("case", cases(CAUSAL, {"prompt": METHODS["prompt"], "prefix": METHODS["prefix"]}))
def test_a_row_in_two_pieces_is_a_whole_row(case: Case):
    from transformers import DynamicCache

    model = served(case)
    with torch.no_grad(), lt.rows(model, SERVED):
        whole = model(IDS).logits
        first = model(IDS[:, :4], use_cache=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == 4
        then = model(IDS[:, 4:], past_key_values=cache)
        assert then.past_key_values is cache
        close(torch.cat([first.logits, then.logits], 1), whole)
        mine = DynamicCache(config=model.config)
        before = parameters(model).index("past_key_values") - 1
        model(IDS[:, :4], *[None] * before, mine)
        assert mine.get_seq_length() == 4
        close(model(IDS[:, 4:], past_key_values=mine, return_dict=False)[0], whole[:, 4:])


def test_a_loss_is_that_of_the_whole_batch():
    model = served(Case(CAUSAL["Llama"], METHODS["prompt"]))
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[2, 2:] = -100
    with lt.rows(model, SERVED):
        out = model(IDS, attention_mask=MASK, labels=labels)
        wanted = model.loss_function(logits=out.logits, labels=labels, vocab_size=37)
        torch.testing.assert_close(out.loss, wanted)
        torch.testing.assert_close(model(IDS, attention_mask=MASK, labels=labels, return_dict=False)[0], wanted)
        counted = model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=torch.tensor(100)).loss
        torch.testing.assert_close(counted * 100, wanted * int((labels[:, 1:] != -100).sum()))
        out.loss.backward()
    assert model.model.loratory["long"].P.grad.abs().sum() > 0
    assert "_loss_function" not in model.__dict__


def test_a_number_over_all_rows_is_refused():
    model = tiny_bert()
    for name in "ab":
        lt.adapt(model, lt.PromptTuning(tokens=2), name=name)
    ids = torch.arange(8).reshape(2, 4)
    message = r"the model gives 'loss' of shape \(\) over all rows at once.*call the model without labels"
    with lt.rows(model, ["a", "b"]):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, labels=torch.tensor([0, 1]))
        assert model(input_ids=ids).logits.shape == (2, 3)
        with pytest.raises(ValueError, match=r"'cu_seq_lens_q' is for packed rows, which cannot be divided"):
            model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 2, 8]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_each_group_as_it_was(reentrant: bool):
    def run(checkpointed: bool) -> dict[str, Tensor]:
        model = served(Case(CAUSAL["Llama"], METHODS["prefix"])).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with lt.rows(model, SERVED):
            out = model(IDS, attention_mask=MASK, use_cache=False)[0]
            inside = gradients(model, out)
            out = model(IDS, attention_mask=MASK, use_cache=False)[0]
        after = gradients(model, out)  # the block is left before the backward pass
        assert set(after) == set(inside)
        for n in after:
            torch.testing.assert_close(after[n], inside[n])
        assert "served" not in repr(getattr(model.model.layers[0], "_gradient_checkpointing_func", None))
        return inside

    plain, again = run(False), run(True)
    assert any(".long." in n for n in plain)
    assert set(plain) == set(again)
    for n in plain:
        torch.testing.assert_close(again[n], plain[n])


class Flat(nn.Module):
    """Its second layer does not see rows, but tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.up = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])


def test_a_layer_that_turns_out_to_hide_its_rows():
    model = Flat()
    for i, (name, where) in enumerate([("a", "up"), ("b", "all-linear"), ("c", "first"), ("d", "first")]):
        lt.adapt(model, lt.LoRA(rank=2), where, name=name)
        move(model, seed=i)
    names: Names = ["a", "c", "b", None, "d", "a"]
    x = torch.randn(6, 5, 6)
    wanted = alone(model, names, lambda i: model(x[i : i + 1]))
    calls = []
    model.first.register_forward_hook(lambda module, args, y: calls.append(len(y)))
    with lt.rows(model, names):
        close(model(x), wanted)
        calls.clear()
        close(model(x), wanted)
        assert sorted(calls) == [1, 2, 3]  # b; both a; the others together
        with pytest.raises(RuntimeError, match=r"layer 'up' runs outside the model's forward.*call the model itself"):
            model.up(x)
        with lt.disabled(model):
            close(model(x), Flat()(x))
        with lt.rows(model, ["b"] * 6):
            close(model(x)[2], wanted[2])
        close(model(x), wanted)
    assert "forward" not in model.__dict__


def test_a_cache_is_as_it_was_when_a_call_starts_again():
    """The block after the attention sees tokens without rows, so the first call starts again when the cache is half filled."""
    from transformers import DynamicCache, Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen2MoeConfig(
        vocab_size=37, hidden_size=16, intermediate_size=12, moe_intermediate_size=8, shared_expert_intermediate_size=6,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    for i, (name, where) in enumerate([("a", "shared_expert.up_proj"), ("b", "q_proj"), ("c", "v_proj")]):
        lt.adapt(model, lt.LoRA(rank=2), where, name=name)
        move(model, seed=i)
    names: Names = ["a", "b", None, "c", "a", "b"]
    with torch.no_grad():
        wanted = alone(model, names, lambda i: model(IDS[i : i + 1]).logits)
        with lt.rows(model, names):
            cache = DynamicCache(config=config)
            close(model(IDS[:, :4], past_key_values=cache).logits, wanted[:, :4])
            assert cache.get_seq_length() == 4
            close(model(IDS[:, 4:], past_key_values=cache).logits, wanted[:, 4:])


def test_experts_as_modules():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            y, to = torch.zeros_like(x), (x.sum(-1) * 7).long() % 3
            for e, expert in enumerate(self.experts):
                y[to == e] = expert(x[to == e])
            return y

    model = nn.Sequential(Routed(), nn.Linear(6, 2))
    for i, (name, where) in enumerate([("a", "experts"), ("b", "1"), ("c", "all-linear")]):
        lt.adapt(model, lt.LoRA(rank=2), _experts(where), name=name)
        move(model, seed=i)
    x = torch.randn(5, 4, 6)
    names: Names = ["a", "b", None, "c", "a"]
    wanted = alone(model, names, lambda i: model(x[i : i + 1]))
    with lt.rows(model, names):
        close(model(x), wanted)


def _experts(where: str) -> Any:
    return [f"0.experts.{e}" for e in range(3)] if where == "experts" else where


def test_fused_experts_generate():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=37, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, sliding_window=5,
        )
    ).eval()  # fmt: skip
    for i, (name, where) in enumerate(
        [("a", "experts"), ("b", "all-linear"), ("c", "experts, q_proj"), ("d", "q_proj")]
    ):
        lt.adapt(model, lt.LoRA(rank=2), where, name=name)
        move(model, seed=i)
    names: Names = ["a", "b", None, "c", "d", "a"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        for options in ({}, {"num_beams": 2}):
            wanted = alone(model, names, lambda i: model.generate(IDS[i : i + 1], **settings, **options))  # noqa: B023
            with lt.rows(model, names):
                assert torch.equal(model.generate(IDS, **settings, **options), wanted)
        with lt.rows(model, names):
            out = model(IDS, output_router_logits=False)
        close(out.logits, alone(model, names, lambda i: model(IDS[i : i + 1]).logits))


def test_an_encoder_decoder_in_groups():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=None
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    lt.adapt(model, lt.LoRA(rank=2), "q", name="a", also_train="encoder.final_layer_norm")
    move(model, seed=1)
    for name, where in (("b", "v"), ("c", "k")):
        lt.adapt(model, lt.LoRA(rank=2), where, name=name)
        move(model, seed=2)
    ids = torch.arange(1, 17).reshape(4, 4)
    names: Names = ["a", None, "b", "c"]
    settings = {"num_beams": 2, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        wanted = alone(model, names, lambda i: model.generate(ids[i : i + 1], **settings))
        with lt.rows(model, names):
            assert torch.equal(model.generate(ids, **settings), wanted)
            assert torch.equal(model.generate(ids, **settings), wanted)
    assert "forward" not in model.encoder.__dict__


def transformer(batch_first: bool) -> Any:
    torch.manual_seed(1)
    model: Any = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 3, 8, batch_first=batch_first, dropout=0.0), 2, enable_nested_tensor=False
    )
    for i, (name, where) in enumerate([("a", "linear1"), ("b", "in_proj_weight, out_proj")]):
        where = (
            where.split(", ")
            if i == 0
            else [f"layers.{k}.self_attn.{leaf}" for k in range(2) for leaf in where.split(", ")]
        )
        lt.adapt(model, lt.LoRA(rank=1), where, name=name)
        move(model, seed=i)
    return model.double().eval()


@pytest.mark.parametrize("time", [4, 5])
def test_time_first(time: int):
    model = transformer(batch_first=False)
    x, names = torch.randn(time, 4, 6, dtype=torch.float64), ["a", "b", None, "b"]
    wanted = alone(model, names, lambda i: model(x[:, i : i + 1]), 1)
    with lt.rows(model, names, dim=1):
        close(model(x), wanted)
    if time == 4:  # the batch cannot be told from the time, but the attention knows
        with (
            pytest.raises(ValueError, match=r"has batch_first=False and gets .* give rows\(..., dim=1\)"),
            lt.rows(model, names),
        ):
            model(x)
    turned: Any = transformer(batch_first=True)
    with lt.rows(turned, names):
        close(turned(x.transpose(0, 1)).transpose(0, 1), wanted)


def test_a_wrong_dim():
    model = Flat()
    lt.adapt(model, lt.LoRA(rank=2))
    for dim in (-1, True, "time"):
        with (
            pytest.raises(ValueError, match=r"dim is .*; it must be 0, or 1 for a model whose inputs have time first"),
            lt.rows(model, ["default", None], dim=dim),
        ):  # type: ignore[arg-type]
            pass


def test_a_quantised_cache_is_refused():
    class QuantizedCache:
        def get_seq_length(self) -> int:
            return 0

    model = served(Case(CAUSAL["Llama"], METHODS["prompt"]))
    with (
        lt.rows(model, SERVED),
        pytest.raises(ValueError, match=r"'past_key_values' is a QuantizedCache, which cannot be divided"),
    ):
        model(IDS, past_key_values=QuantizedCache())
