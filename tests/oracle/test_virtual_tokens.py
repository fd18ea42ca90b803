"""Prompt and prefix tuning against PEFT's own, with the same numbers in both."""

import pytest
import torch

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.bodies import IDS, Case, bare_bert, bert, gpt2, llama, qwen3

LABELS = torch.cat([torch.full((2, 2), -100), IDS[:, 2:]], 1)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
causal = pytest.mark.parametrize("make", [llama, qwen3, gpt2], ids=["Llama", "Qwen3", "GPT-2"])


def theirs_and_ours(make, theirs, method):
    """PEFT's model and ours, with PEFT's numbers in both."""
    import peft

    torch.manual_seed(5)
    model = peft.get_peft_model(Case(make, method).plain(), theirs).eval()
    ours = Case(make, method).adapted()
    encoder = model.prompt_encoder["default"]
    (layer,) = layers_of(ours).values()
    put(encoder, layer["default"])
    return model, ours, encoder, layer["default"]


def put(encoder, t) -> None:
    with torch.no_grad():
        first = t.E if "E" in t.tags else t.P
        first.copy_(encoder.embedding.weight.reshape(first.shape))
        if "E" in t.tags:
            for i, linear in ((1, encoder.transform[0]), (2, encoder.transform[2])):
                for name, value in ((f"W{i}", linear.weight), (f"b{i}", linear.bias)):
                    getattr(t, name).copy_(value.reshape(getattr(t, name).shape))


@causal
def test_prompt_tuning(make):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs, ours, encoder, t = theirs_and_ours(make, config, lt.PromptTuning(tokens=3))
    expected, found = (m(input_ids=IDS, attention_mask=MASK, labels=LABELS) for m in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits[:, 3:])
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    torch.testing.assert_close(t.P.grad, encoder.embedding.weight.grad)


@causal
@pytest.mark.parametrize("hidden", [None, 6])
def test_prefix_tuning(make, hidden):
    import peft

    network = {} if hidden is None else {"prefix_projection": True, "encoder_hidden_size": hidden}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **network, **shape_of(make))
    theirs, ours, encoder, t = theirs_and_ours(make, config, lt.PrefixTuning(tokens=3, hidden=hidden))
    expected, found = (m(input_ids=IDS, attention_mask=MASK, labels=LABELS) for m in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    first = t.P if hidden is None else t.E
    torch.testing.assert_close(first.grad.flatten(), encoder.embedding.weight.grad.flatten())
    if hidden is not None:
        torch.testing.assert_close(t.W2.grad.flatten(), encoder.transform[2].weight.grad.flatten())


def shape_of(make):
    """PEFT takes head_dim as width / heads; Qwen3's is its own."""
    return {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2} if make is qwen3 else {}


def test_prefix_tuning_of_a_classifier():
    import peft

    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs, ours, _, _ = theirs_and_ours(bert, config, lt.PrefixTuning(tokens=3))
    expected, found = (m(input_ids=IDS, attention_mask=MASK).logits for m in (theirs, ours))
    torch.testing.assert_close(found, expected)


def test_prompt_tuning_of_an_encoder():
    """The states of real tokens are PEFT's; the pooled one is that of the first real token, where PEFT takes a virtual one."""
    import peft

    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    theirs, ours, _, _ = theirs_and_ours(bare_bert, config, lt.PromptTuning(tokens=3))
    expected, found = (m(input_ids=IDS, attention_mask=MASK) for m in (theirs, ours))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state[:, 3:])
    assert not torch.allclose(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generate(kind):
    import peft

    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    method = {"prompt": lt.PromptTuning, "prefix": lt.PrefixTuning}[kind](tokens=3)
    config = configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs, ours, _, _ = theirs_and_ours(llama, config, method)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, found = (
        m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options) for m in (theirs, ours)
    )
    assert torch.equal(found, expected)
