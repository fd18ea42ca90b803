"""What is peculiar to prompt tuning: its start and its bad input."""

import pytest
import torch

import loratory as lt
from tests.laws.bodies import BODIES, METHODS, BodyRow, Case, llama

ROW = BodyRow(made={"prompt": METHODS["prompt"]}, count=lambda method, site: method.tokens * site.width, bodies=BODIES)
PLANTED = [
    ("prompt starts one token on", "self.ids or tuple(drawn.tolist())", "(self.ids or tuple(drawn.tolist()))[1:]"),
    (
        "prompt longer than stated",
        "P = new(site, self.tokens, site.width)",
        "P = new(site, self.tokens + 1, site.width)",
    ),
]


def start(method, **options):
    model = Case(llama, method).plain()
    lt.adapt(model, method, **options)
    (P,) = lt.trained(model).values()
    return P, model.get_input_embeddings().weight


def test_it_starts_as_tokens_of_the_vocabulary():
    P, table = start(lt.PromptTuning(tokens=6), seed=1)
    assert all(any(torch.equal(row, word) for word in table) for row in P)
    assert not torch.equal(P, start(lt.PromptTuning(tokens=6), seed=2)[0])


@pytest.mark.parametrize(("tokens", "expected"), [(3, [4, 9, 7]), (2, [4, 9]), (7, [4, 9, 7, 4, 9, 7, 4])])
def test_it_starts_from_token_ids_repeated_or_cut(tokens, expected):
    for ids in ([4, 9, 7], torch.tensor([4, 9, 7])):
        P, table = start(lt.PromptTuning(tokens=tokens, ids=ids))
        assert torch.equal(P, table[expected])


def test_it_starts_from_scaled_embeddings_as_the_model_reads_them():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, head_dim=4
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    lt.adapt(model, lt.PromptTuning(tokens=2, ids=(3, 5)))
    (P,) = lt.trained(model).values()
    torch.testing.assert_close(P, model.get_input_embeddings()(torch.tensor([3, 5])))
    assert not torch.allclose(P, model.get_input_embeddings().weight[[3, 5]])


def test_peft_names():
    model = Case(llama, lt.PromptTuning()).plain()
    lt.adapt(model, "prompt-tuning", num_virtual_tokens=5)
    assert lt.summary(model).trained == 5 * 16
    assert lt.PromptTuning().tokens == 100
    assert "model" in str(lt.summary(model))


def test_bad_input():
    for options in ({"tokens": 0}, {"ids": ()}, {"ids": (1.5,)}, {"ids": (True,)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lt.PromptTuning(**options)
    with pytest.raises(TypeError, match=r"tokens is 2.5"):
        lt.PromptTuning(tokens=2.5)
    for wrong in (-1, 37):
        with pytest.raises(ValueError, match=rf"ids holds {wrong}; the model's vocabulary has ids 0 to 36"):
            start(lt.PromptTuning(tokens=2, ids=(3, wrong)))


def test_shapes_on_the_meta_device():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are Llama-2-7B
    lt.adapt(model, lt.PromptTuning(tokens=20, ids=(1, 2)))
    assert lt.summary(model).trained == 20 * 4096
    lt.detach(model)
    lt.adapt(model, lt.PrefixTuning(tokens=20, ids=(1, 2)))
    assert lt.summary(model).trained == 20 * 2 * 32 * 4096  # nv x 2 L KV d
