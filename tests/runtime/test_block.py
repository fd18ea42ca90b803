"""The contract of block sites: what virtual tokens do to mask, positions, labels, outputs, cache and generate."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.bodies import BODIES, CAUSAL, FIRST, IDS, SIZES, Case, bert, gpt2, llama, outputs
from tests.laws.kinds import move

METHODS = {"prompt": lt.PromptTuning(tokens=3, ids=FIRST), "prefix": lt.PrefixTuning(tokens=3, ids=FIRST)}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def telling(stories):
    """A trained model, a way to continue texts with it, and the texts."""
    model = stories()
    texts = ["Once upon a time", "Tom had a big red ball and", "The dog"]
    rows = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    def go_on(ids: list[list[int]], **options):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        return model.generate(padded, attention_mask=mask, **options)[:, width:]

    return model, go_on, rows


@both
@each_attention
def test_generate_goes_on_as_after_these_tokens(telling, method, attention):
    model, go_on, rows = telling
    model.set_attn_implementation(attention)
    start = tuple(model.tokenizer("Lily was a happy little", add_special_tokens=False).input_ids)
    method = type(method)(tokens=len(start), ids=start)
    expected = torch.cat([go_on([[*start, *row]]) for row in rows])
    plain = go_on(rows)
    beams = torch.cat([go_on([[*start, *row]], num_beams=3) for row in rows])
    assert not torch.equal(plain, expected)
    lt.adapt(model, method)
    assert torch.equal(torch.cat([go_on([row]) for row in rows]), expected)
    assert torch.equal(go_on(rows), expected)  # padded on the left
    assert torch.equal(go_on(rows, use_cache=False), expected)
    assert torch.equal(go_on(rows, cache_implementation="static"), expected)
    assert torch.equal(go_on(rows, prefill_chunk_size=4), expected)
    assert torch.equal(go_on(rows, num_beams=3), beams)
    guessed = torch.cat([go_on([row], prompt_lookup_num_tokens=3) for row in rows])  # crops the cache
    assert torch.equal(guessed, expected)
    with lt.disabled(model):
        assert torch.equal(go_on(rows), plain)


@both
def test_a_cache_goes_on_where_it_ended(telling, method):
    model, go_on, rows = telling
    lt.adapt(model, method)
    ids = torch.tensor(rows[1:2])
    first = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1  # real tokens only
    more = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    assert torch.equal(more[:, ids.shape[1] :], go_on(rows[1:2]))


def test_a_cache_of_another_prompt_is_refused():
    model = Case(llama, METHODS["prompt"]).adapted(name="a")
    lt.adapt(model, METHODS["prompt"], name="b")
    with lt.disabled(model):
        plain = model(IDS, use_cache=True).past_key_values
    of_b = model(IDS, use_cache=True).past_key_values
    model(IDS[:, :1], past_key_values=of_b)
    for cache in (plain, of_b):
        lt.use(model, "a")
        with pytest.raises(RuntimeError, match=r"filled without the active prompt.*empty cache"):
            model(IDS[:, :1], past_key_values=cache)


@both
@each_attention
@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
def test_a_row_in_two_pieces_is_a_whole_row(make, method, attention):
    model = Case(make, method).adapted()
    model.set_attn_implementation(attention)
    whole = outputs(model)
    one = model(IDS[:, :4], use_cache=True)
    two = model(IDS[:, 4:], past_key_values=one.past_key_values)
    close(torch.cat([one.logits, two.logits], 1), whole)
    assert two.past_key_values.get_seq_length() == IDS.shape[1]
    close(outputs(model, use_cache=False), whole)


@both
@each_attention
@pytest.mark.parametrize("make", BODIES.values(), ids=BODIES)
def test_padding_changes_nothing(make, method, attention):
    method = method if make in CAUSAL.values() else type(method)(tokens=3)
    model = Case(make, method).adapted()
    model.set_attn_implementation(attention)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    found, alone = outputs(model, attention_mask=mask)[1], outputs(model, IDS[1:, :5])[0]
    close(found[: len(alone)] if found.dim() == 2 else found, alone)


@both
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Llama", "GPT-2"])
def test_every_document_of_a_packed_row_sees_the_virtual_tokens(make, method):
    model = Case(make, method).adapted()
    documents = IDS[0, :4][None], IDS[1, :3][None]
    expected = torch.cat([outputs(model, d) for d in documents], 1)
    row = torch.cat(documents, 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    close(outputs(model, row, position_ids=positions, use_cache=False), expected)
    seen = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).tril().bool()
    for mask in (seen, torch.zeros(7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)):
        close(outputs(model, row, position_ids=positions, attention_mask=mask[None, None]), expected)
    with pytest.raises(RuntimeError, match=r"cu_seq_lens.*use a collator that pads"):
        model.base_model(row, cu_seq_lens_q=torch.tensor([0, 4, 7]))


@both
def test_outputs_are_as_long_as_the_text(method):
    model = Case(llama, method).adapted()
    model.set_attn_implementation("eager")
    labels = IDS.clone()
    labels[:, :2] = -100
    out = model(IDS, labels=labels, output_hidden_states=True, output_attentions=True)
    length = IDS.shape[1]
    assert out.logits.shape[1] == length
    assert {h.shape for h in out.hidden_states} == {(2, length, SIZES["hidden_size"])}
    assert {a.shape for a in out.attentions} == {(2, 4, length, length + 3)}
    close(out.loss, nn.functional.cross_entropy(out.logits[:, 1:-1].flatten(0, 1), labels[:, 2:].flatten()))
    assert torch.equal(model(IDS, return_dict=False)[0], out.logits)
    assert torch.equal(model.model(IDS, return_dict=False)[0], model.model(IDS).last_hidden_state)
    close(outputs(model, None, inputs_embeds=model.get_input_embeddings()(IDS)), out.logits)
    last = outputs(model, logits_to_keep=1)
    close(last, out.logits[:, -1:])


def test_a_mixture_of_experts_keeps_its_balance_to_real_tokens():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3, output_router_logits=True)
    model = Case(lambda: MixtralForCausalLM(config), METHODS["prompt"]).adapted()
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    out = model(IDS, attention_mask=mask, labels=IDS)
    assert {r.shape for r in out.router_logits} == {(IDS.numel(), 3)}
    assert bool(torch.isfinite(out.aux_loss))


def test_an_encoder_pools_the_first_real_token():
    model = Case(BODIES["bare BERT"], lt.PromptTuning(tokens=3)).adapted()
    types = torch.zeros_like(IDS)
    types[:, 3:] = 1
    out = model(IDS, token_type_ids=types)
    assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))
    assert not torch.equal(out.pooler_output, model(IDS).pooler_output)


def test_roberta_counts_positions_its_own_way():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(**SIZES, pad_token_id=1)
    for method in (lt.PromptTuning(tokens=3), lt.PrefixTuning(tokens=3)):
        model = Case(lambda: RobertaModel(config), method).adapted()
        seen = []
        model.embeddings.position_embeddings.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        model(IDS)
        model(inputs_embeds=model.get_input_embeddings()(IDS))
        first = 2 if isinstance(method, lt.PromptTuning) else 5
        assert all(p[0].tolist() == list(range(first, 12)) for p in seen)
        with pytest.raises(
            ValueError, match=r"40 tokens and 3 virtual ones need 43 positions.*has 38; shorten the text to 35"
        ):
            model(torch.full((1, 40), 4))


@pytest.mark.parametrize("method", [*METHODS.values(), lt.PrefixTuning(tokens=3, hidden=4)], ids=[*METHODS, "network"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Llama", "GPT-2"])
def test_gradient_checkpointing_gives_the_same_gradients(make, method):
    gradients = []
    for reentrant in (None, False, True):
        model = Case(make, method).adapted().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in lt.trained(model).values()])
    for found in gradients[1:]:
        for a, b in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(a, b)


@both
def test_trainer_trains_evaluates_and_saves(method, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = Case(llama, method).adapted()
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=0.1, gradient_checkpointing=True, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows).predictions.shape == (8, *outputs(model).shape[1:])
    trainer.save_model(tmp_path / "out")
    again = Case(llama, method).plain()
    lt.load(again, tmp_path / "out")
    assert torch.equal(outputs(again), outputs(model.eval()))


def test_a_classifier_trains_its_head_beside():
    model = Case(bert, lt.PrefixTuning(tokens=2)).plain()
    lt.adapt(model, "prefix-tuning", num_virtual_tokens=2, also_train="classifier")
    model(IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in lt.trained(model).values())
    assert {n.split("/")[0] for n in lt.trained(model)} == {"layers", "also_train"}


@both
def test_beside_a_low_rank_adapter(method):
    model = Case(llama, method).adapted(name="virtual")
    alone = outputs(model)
    lt.adapt(model, lt.LoRA(rank=2), name="low")
    move(model)
    low = outputs(model)
    lt.use(model, "virtual", "low")
    together = outputs(model)
    assert not torch.equal(together, low)
    assert not torch.equal(together, alone)
    lt.use(model, "virtual")
    assert torch.equal(outputs(model), alone)
    lt.use(model, "low")
    lt.merge(model)
    close(outputs(model), low)
    lt.unmerge(model)
    lt.merge(model, keep_base=False)
    assert not layers_of(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    close(outputs(model), low)


def test_a_bare_body_saves_and_exports_as_its_own_class(tmp_path):
    model = Case(BODIES["bare BERT"], lt.PromptTuning(tokens=3)).adapted(name="virtual")
    model.save_pretrained(tmp_path / "adapter")
    again = Case(BODIES["bare BERT"], lt.PromptTuning(tokens=3)).plain()
    lt.load(again, tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(model))
    lt.adapt(model, lt.LoRA(rank=2), name="low")
    move(model)
    lt.export(model, tmp_path / "merged")
    plain = type(Case(BODIES["bare BERT"], lt.LoRA()).plain()).from_pretrained(tmp_path / "merged").eval()
    close(outputs(plain), outputs(model))
    lt.detach(model)
    assert type(model) is type(plain)


def test_what_is_refused():
    model = Case(llama, METHODS["prompt"]).adapted(name="a")
    lt.adapt(model, METHODS["prefix"], name="b")
    with pytest.raises(ValueError, match="'a' and 'b' both put virtual tokens into the model; activate one"):
        lt.use(model, "a", "b")
    with pytest.raises(ValueError, match=r"mix holds 0.5 for adapter 'a', whose virtual tokens cannot be weighed"):
        lt.use(model, "a", mix=[0.5])
    assert lt.active(model) == ("b",)
    prompt = lt.PromptTuning(tokens=2)
    plain = Case(llama, prompt).plain()
    for error, options, message in (
        (ValueError, {"exclude": "q_proj"}, "acts on the whole model, so exclude= and blocks="),
        (ValueError, {"where": "q_proj"}, "acts on one body, but where='q_proj' names 2 modules"),
        (
            TypeError,
            {"where": "layers.0.self_attn.q_proj"},
            r"q_proj' \(Linear\) is no body of a transformers text model",
        ),
    ):
        with pytest.raises(error, match=message):
            lt.adapt(plain, prompt, **options)
    with pytest.raises(TypeError, match="the model is a Sequential, but the method puts virtual tokens"):
        lt.adapt(nn.Sequential(nn.Linear(3, 3)), prompt)
    with pytest.raises(TypeError, match="which has no matrix to adapt"):
        lt.adapt(plain, lt.LoRA(), where=lambda name, module: name == "model")
    assert not layers_of(plain)
    lt.adapt(plain, prompt, where="model")
    assert list(layers_of(plain)) == ["model"]


def test_models_that_are_refused():
    from transformers import (
        DistilBertConfig,
        DistilBertModel,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTModel,
    )

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(
        ValueError, match="is an encoder-decoder; virtual tokens are made for decoders and encoders alone"
    ):
        lt.adapt(t5, lt.PromptTuning(tokens=2))
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(TypeError, match="is no body of a transformers text model"):
        lt.adapt(vit, lt.PromptTuning(tokens=2))
    distil = DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, hidden_dim=8, n_layers=1, n_heads=2)).eval()
    with pytest.raises(ValueError, match=r"has no attention block that takes a cache.*use PromptTuning"):
        lt.adapt(distil, lt.PrefixTuning(tokens=2))
    lt.adapt(distil, lt.PromptTuning(tokens=2))
    assert distil(IDS.clamp(max=19)).last_hidden_state.shape == (2, 7, 8)


def test_a_learned_table_of_positions_has_an_end():
    for method in (lt.PromptTuning(tokens=3), lt.PrefixTuning(tokens=3)):
        model = Case(gpt2, method).adapted()
        assert outputs(model, torch.full((1, 37), 2)).shape[1] == 37
        for options in ({}, {"position_ids": torch.arange(38)[None]}):
            with pytest.raises(ValueError, match=r"text of 38 tokens and 3 virtual ones need 41 positions.*37 tokens"):
                outputs(model, torch.full((1, 38), 2), **options)


def test_attention_without_a_full_mask_is_refused():
    model = Case(llama, METHODS["prefix"]).adapted()
    block = model.model.layers[0].self_attn
    with pytest.raises(
        RuntimeError, match=r"block 0: PrefixTuning needs attention that takes a full mask.*'sdpa' or 'eager'"
    ):
        block(hidden_states=torch.zeros(1, 2, 16), attention_mask=torch.ones(1, 2))
    model = Case(llama, METHODS["prompt"]).adapted()
    with pytest.raises(
        RuntimeError, match="the attention mask is a Tensor for full_attention, which virtual tokens cannot"
    ):
        model.model(IDS, attention_mask=torch.ones(2, 7, 7))
