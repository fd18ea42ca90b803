"""Examples packed into one row are each as if alone: logits of every family, loss and gradients, sliding windows, both attentions."""

import pytest
import torch
import transformers as tf

from loratory.tasks.packing import PackBatch, check_packing
from loratory.tasks.task import PadBatch
from tests.families import SIZES

GEMMA = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8)),
    "qwen2 sliding": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=0)
    ),
    "mistral sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=3)),
    "gemma2 sliding": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA)),
    "gemma3 sliding": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES)),
}


def built(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for p in model.parameters():  # wide enough that a leak would be seen
            p.mul_(3)
    return model


def examples():
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (9, 4, 1, 12):
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, *ids[1:]]})
    return found


def grads(model, batch):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=10).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, how) for name in MODELS for how in ("sdpa", "eager") if (name, how) != ("gemma2 sliding", "sdpa")],
)  # transformers has no sdpa for Gemma 2
def test_logits_loss_and_gradients_are_those_alone(name, attention):
    model = built(name, attention)
    packed, padded = PackBatch()(examples()), PadBatch(0)(examples())
    with torch.no_grad():
        together = model(**{k: v for k, v in packed.items() if k != "labels"}).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits[0] for e in examples()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    (loss, ours), (wanted, theirs) = grads(model, packed), grads(model, padded)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    check_packing(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral sliding"])
def test_flex_attention_keeps_them_apart_too(name, monkeypatch):
    """Its masks, with the attention itself not compiled: inductor cannot compile it for a processor."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as wrapped

    def plainly(query, key, value, training=False, **options):
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(wrapped, "compile_friendly_flex_attention", plainly)
    model = built(name, "flex_attention")
    packed = {k: v for k, v in PackBatch()(examples()).items() if k != "labels"}
    plain = built(name, "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).logits, plain(**packed).logits, rtol=1e-4, atol=1e-4)
    check_packing(model)


def test_no_label_crosses_from_one_example_to_the_next_and_nothing_is_padded():
    batch = PackBatch()([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, -100, 9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch


class Leaking(tf.LlamaForCausalLM):
    """A model that makes no block-diagonal mask."""

    def forward(self, *args, position_ids=None, attention_mask=None, **kwargs):
        ids = kwargs["input_ids"]
        return super().forward(*args, position_ids=position_ids, attention_mask=torch.ones_like(ids), **kwargs)


class Unplaced(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids)


def test_a_model_that_lets_them_see_each_other_is_refused():
    torch.manual_seed(0)
    model = Leaking(tf.LlamaConfig(**SIZES)).train()
    with pytest.raises(ValueError, match=r"Leaking lets examples of one row see each other .* leave packing out"):
        check_packing(model)
    assert model.training
    with pytest.raises(ValueError, match="takes position_ids, and Unplaced does not"):
        check_packing(Unplaced(tf.LlamaConfig(**SIZES)))
