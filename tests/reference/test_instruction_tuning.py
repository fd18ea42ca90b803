"""Masked loss, packed rows, prefix and prompt tuning, and the novelty filter against transformers, PEFT and rouge-score."""

from typing import Any

import torch
from torch import nn

import loratory as lt
from loratory.ops.masks import additive, causal_mask, document_numbers
from loratory.tasks.novelty import novelty
from tests.reference.vectors import Vectors


def tiny_llama(v: Vectors) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    s = v.settings
    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        intermediate_size=s["intermediate"],
        hidden_act=s["hidden_act"],
        rms_norm_eps=s["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": s["rope_theta"]},
        tie_word_embeddings=s["tie_word_embeddings"],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double().eval()
    names = [n.removeprefix("base.") for n in v.tensors if n.startswith("base.")]
    missing, unexpected = model.load_state_dict({n: v.given(f"base.{n}") for n in names}, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if s["tie_word_embeddings"] else [])
    model.tie_weights()
    return model


def batch(v: Vectors) -> dict[str, torch.Tensor]:
    return {"input_ids": v.given("ids"), "attention_mask": v.given("attention_mask"), "labels": v.given("labels")}


def test_every_tensor():
    v = Vectors("instruction-tuning")
    model = tiny_llama(v)
    out = model(**batch(v))
    v.compare("base_logits", out.logits)
    v.compare("base_loss_masked", out.loss.reshape(1))
    packed_rows(v, model)
    prefix(v, model)
    prompt(v, model)
    model_is_as_before(v, model)
    about = v.about
    found = novelty(about["novelty_candidates"], about["novelty_pool"], threshold=v.settings["novelty_threshold"])
    v.compare("novelty.max_rougeL", torch.tensor([each.score for each in found], dtype=torch.float64))
    v.compare("novelty.keep", torch.tensor([int(each.kept) for each in found]))
    v.finish()


def packed_rows(v: Vectors, model: Any) -> None:
    ids, positions, segment = v.given("packed.ids"), v.given("packed.position_ids"), v.given("packed.segment")
    documents = document_numbers(positions)
    torch.testing.assert_close(documents[0] - documents[0, 0], segment - segment[0])
    mask = additive(causal_mask(ids.shape[1], documents=segment[None]), torch.float64)[None]
    v.compare("packed.logits", model(ids, attention_mask=mask, position_ids=positions).logits)
    v.compare("packed.logits", model(ids, position_ids=positions, use_cache=False).logits)


def prefix(v: Vectors, model: Any) -> None:
    s, embedding = v.settings, v.given("prefix.embedding")
    lt.adapt(model, lt.PrefixTuning(tokens=s["virtual_tokens"]))
    P = put(model, embedding)
    assert P.shape == (s["virtual_tokens"], s["layers"], 2, s["kv_heads"], s["hidden"] // s["heads"])
    out = model(**batch(v))
    out.loss.backward()
    v.compare("prefix.logits", out.logits)
    v.compare("prefix.loss", out.loss.reshape(1))
    v.compare("prefix.grad", P.grad.reshape(embedding.shape))
    lt.detach(model)


def prompt(v: Vectors, model: Any) -> None:
    n, embedding = v.settings["virtual_tokens"], v.given("prompt.embedding")
    lt.adapt(model, lt.PromptTuning(tokens=n))
    P = put(model, embedding)
    states = []
    hook = model.model.norm.register_forward_hook(lambda module, args, out: states.append(out))
    out = model(**batch(v))
    hook.remove()
    out.loss.backward()
    everywhere = model.lm_head(states[0])  # our logits leave the virtual positions out
    v.compare("prompt.logits", everywhere)
    torch.testing.assert_close(out.logits, everywhere[:, n:], rtol=1e-12, atol=1e-12)
    v.compare("prompt.loss", out.loss.reshape(1))
    v.compare("prompt.grad", P.grad)
    lt.detach(model)


def put(model: Any, embedding: torch.Tensor) -> nn.Parameter:
    """Give the adapter the vectors' embedding."""
    (P,) = lt.trained(model).values()
    with torch.no_grad():
        P.copy_(embedding.reshape(P.shape))
    return P


def model_is_as_before(v: Vectors, model: Any) -> None:
    v.compare("base_logits", model(**batch(v)).logits)
