"""The loss on supervised positions in chunks equals the model's own, forward and gradients, and is in nobody's way."""

import copy
import gc
import logging
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.functional import cross_entropy

import loratory as lt
from tests.families import SIZES
from tests.laws.kinds import move

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8)),
    "gemma2 soft cap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.7, query_pre_attn_scalar=8)
    ),
    "cohere scale": lambda: tf.CohereForCausalLM(
        tf.CohereConfig(**SIZES, logit_scale=0.3, bos_token_id=1, eos_token_id=2)
    ),
    "granite scaling": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    ),
}


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 14), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.6, -100)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def steps(model, **more):
    """Loss and gradients."""
    model.zero_grad()
    out = model(**batch(), **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, **options):
    own, theirs = steps(model)[0], steps(model)[1]
    lean = lt.lean_loss(model, **options)
    assert lean.aside is None
    out, ours = steps(model)
    assert out.logits is None
    torch.testing.assert_close(out.loss, own.loss)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=2e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    return lean


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, chunk):
    same(built(name), chunk=chunk)


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("name", ["llama", "gemma2 soft cap", "gpt2"])
def test_with_adapters_on_all_layers_and_on_the_head(name, chunk):
    model = built(name)
    lt.adapt(model, lt.DoRA(rank=3), "all-linear")
    lt.adapt(model, lt.LoRA(rank=2), "lm_head", name="head", untie=True)
    lt.use(model, "default", "head")
    move(model)
    same(model, chunk=chunk)


def test_a_head_trained_in_full_and_a_frozen_one():
    model = built("llama tied")
    lt.adapt(model, lt.LoRA(rank=2), "q_proj")
    move(model)
    same(model, chunk=4)
    model = built("llama")
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", also_train=["lm_head"])
    move(model)
    same(model, chunk=4)


def test_no_logits_of_the_batch_exist_and_only_supervised_positions_meet_the_head():
    model = built("llama")
    lt.adapt(model, lt.LoRA(rank=2), "q_proj")
    lt.lean_loss(model, chunk=4)
    met = []
    model.lm_head.register_forward_hook(lambda m, i, o: met.append(o.shape))
    steps(model)
    supervised = int((batch()["labels"][:, 1:] != -100).sum())
    products = [shape for shape in met if shape[-1] == 97]
    assert max(shape.numel() // 97 for shape in products) == 4
    assert sum(shape.numel() // 97 for shape in products) == 2 * supervised  # once more in the backward pass


def test_items_of_a_whole_step_divide_it_as_the_trainer_asks():
    model = built("llama")
    plain = model(**batch(), num_items_in_batch=torch.tensor(50)).loss
    lt.lean_loss(model)
    torch.testing.assert_close(model(**batch(), num_items_in_batch=torch.tensor(50)).loss, plain)
    torch.testing.assert_close(model(**batch(), num_items_in_batch=50).loss, plain)


def test_shifted_labels_are_taken_as_they_are():
    model = built("llama")
    given = batch()
    shifted = torch.nn.functional.pad(given.pop("labels"), (0, 1), value=-100)[:, 1:]
    z = model(**given).logits
    lt.lean_loss(model)
    torch.testing.assert_close(
        model(**given, labels=given["input_ids"], shift_labels=shifted).loss,
        cross_entropy(z.flatten(0, 1), shifted.flatten()),
    )


def test_label_smoothing_is_that_of_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    model = built("llama")
    given = batch()
    labels = given.pop("labels")
    wanted = LabelSmoother(epsilon=0.2)({"logits": model(**given).logits}, labels, shift_labels=True)
    lt.lean_loss(model, label_smoothing=0.2)
    torch.testing.assert_close(model(**given, labels=labels).loss, wanted)


def test_evaluation_generation_and_rows_keep_their_logits():
    model = built("llama")
    lt.adapt(model, lt.LoRA(rank=2), "q_proj")
    lt.lean_loss(model)
    with torch.no_grad():
        assert model(**batch()).logits.shape == (3, 14, 97)
    model.eval()
    assert model(**batch()).logits.shape == (3, 14, 97)
    assert model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    model.train()
    assert model(input_ids=batch()["input_ids"]).logits.shape == (3, 14, 97)
    with lt.rows(model, ["default", "default", "default"]):
        assert model(**batch()).logits is not None
    assert model(**batch()).logits is None


def test_a_forward_that_fails_leaves_nothing_behind():
    model = built("llama")
    plain = model(**batch()).loss
    lean = lt.lean_loss(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[500]]), labels=torch.tensor([[1]]))
    model.eval()
    assert model(**batch()).logits.shape[-1] == 97
    torch.testing.assert_close(model.train()(**batch()).loss, plain)
    lean.close()
    assert model(**batch()).logits.shape[-1] == 97


def test_a_hook_that_runs_the_forward_first_without_gradients_changes_nothing():
    model = built("llama")
    own, theirs = steps(model)
    lt.lean_loss(model, chunk=3)

    def first(module, args, kwargs):
        with torch.no_grad():
            module.forward(*args, **kwargs)

    model.register_forward_pre_hook(first, with_kwargs=True)
    out, ours = steps(model)
    torch.testing.assert_close(out.loss, own.loss)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 512])
def test_nothing_of_a_step_outlives_it(chunk):
    model = built("llama")
    lt.lean_loss(model, chunk=chunk)
    seen = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    gc.disable()  # freed at once, not when the collector comes by
    try:
        model(**batch()).loss.backward()
        assert seen[-1]() is None
    finally:
        gc.enable()


def test_copies_and_second_calls():
    model = built("llama")
    lt.lean_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**batch()).loss != model(**batch()).loss
    lt.lean_loss(model, label_smoothing=0.1)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_checkpointing_and_bf16():
    model = built("llama")
    model.gradient_checkpointing_enable()
    same(model, chunk=3)
    model = built("llama").bfloat16()
    own = steps(model)[0].loss
    lt.lean_loss(model, chunk=3)
    torch.testing.assert_close(steps(model)[0].loss, own, rtol=1e-2, atol=0)


def test_a_batch_without_supervised_positions_divides_as_the_model_does():
    model = built("llama")
    lt.lean_loss(model)
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    loss = model(**given, num_items_in_batch=5).loss
    loss.backward()
    assert float(loss) == 0
    assert model(**given).loss.isnan()


class Halved(tf.LlamaForCausalLM):
    """A model that does something to its logits which no field of its configuration tells."""

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=97)
        return out


class Own(tf.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        if labels is not None:
            out.loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: Halved(tf.LlamaConfig(**SIZES)), "another loss of the same hidden states"),
        (lambda: Own(tf.LlamaConfig(**SIZES)), "a trial forward failed"),
        (lambda: nn.Linear(3, 3), "no language model of transformers"),
        (lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)), "no output head"),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
            ),
            "encoder-decoder",
        ),
    ],
)
def test_it_steps_aside_where_it_does_not_know_the_model(made, why, caplog):
    model = made()
    with caplog.at_level(logging.WARNING, "loratory"):
        lean = lt.lean_loss(model)
    assert why in lean.aside
    assert "stays as it is" in caplog.text
    assert not model._forward_hooks
    if isinstance(model, Halved | Own):
        assert model.train()(**batch()).logits.shape[-1] == 97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        lt.lean_loss(nn.Linear(2, 2), **options)
