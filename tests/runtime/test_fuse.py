"""Layers that share their input run as one, and cheap results are made again: outputs and all gradients are those of the plain path."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import loratory as lt
from loratory.catalogue.properties import kept_bytes
from loratory.ops.low_rank import unfused
from loratory.ops.made_again import origin
from loratory.runtime.layer import layers_of
from tests.families import SIZES
from tests.laws.kinds import move
from tests.runtime.models import Tiny

ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
QUIET = {"bos_token_id": 1, "eos_token_id": 2}
# model, groups in each block, modules whose outputs are made again
FAMILIES = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), 2, 7),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)), 2, 7),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8)), 2, 11),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=8)), 2, 7),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, head_dim=8)), 2, 11),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=97, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **QUIET
            )
        ),
        0,
        7,
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=97, **ENCODER)), 1, 9),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, **ENCODER)), 1, 7),
    "bart": (
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=97,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                dropout=0.0,
                pad_token_id=0,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
                **QUIET,
            )
        ),
        1,
        9,
    ),
}


def built(name: str, method: lt.Method | None = None, **options):
    torch.manual_seed(0)
    model = FAMILIES[name][0]().train()
    lt.adapt(model, method or lt.LoRA(rank=4), **options)
    move(model)
    return model


def batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1, 0])}
    ids = torch.randint(3, 97, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def results(model, name: str):
    """Logits, loss, and the gradient of every trained tensor."""
    model.zero_grad()
    out = model(**batch(name))
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | grads


def assert_same(ours, theirs, tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: {error}"


def groups(model) -> list[list[str]]:
    """Names of the layers that run as one."""
    found: dict[int, list[str]] = {}
    for name, layer in layers_of(model).items():
        if (args := getattr(layer.route, "args", None)) is not None:
            found.setdefault(id(args[0]), []).append(name)
    return list(found.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_all_gradients(name):
    model = built(name)
    with unfused():
        theirs = results(model, name)
    assert len(groups(model)) == 2 * FAMILIES[name][1]
    assert_same(results(model, name), theirs)
    with lt.lean_activations(model) as lean:
        assert len(lean.modules) == FAMILIES[name][2]
        assert_same(results(model, name), theirs)
    assert len(groups(model)) == 2 * FAMILIES[name][1]  # all were called with their siblings' input


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_with_gradient_checkpointing(name, reentrant):
    model = built(name)
    theirs = results(model, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    lt.lean_activations(model)
    assert_same(results(model, name), theirs)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_in_bfloat16_and_under_autocast(name):
    model = built(name)
    with torch.autocast("cpu", torch.bfloat16):
        with unfused():
            theirs = results(model, name)
        with lt.lean_activations(model):
            assert_same(results(model, name), theirs, 0.15)
    model = model.to(torch.bfloat16)
    with unfused():
        theirs = results(model, name)
    with lt.lean_activations(model):
        assert_same(results(model, name), theirs, 0.15)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert", "vit"])
def test_what_is_kept_is_less(name):
    model = built(name)

    def run():
        return model(**batch(name)).loss

    plain = kept_bytes(model, run)
    with lt.lean_activations(model):
        assert kept_bytes(model, run) < 0.9 * plain
    assert kept_bytes(model, run) == plain


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_no_more_is_kept_than_with_peft(bf16):
    from peft import LoraConfig, get_peft_model

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(**batch("llama")).loss

    torch.manual_seed(0)
    theirs = get_peft_model(FAMILIES["llama"][0]().train(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    ours = built("llama", lt.LoRA(rank=4, alpha=8))
    assert kept_bytes(ours, lambda: run(ours)) <= kept_bytes(theirs, lambda: run(theirs))


def test_lean_activations_narrow_weights_again_under_autocast():
    model = built("llama", lt.LoRA(rank=4, alpha=8))
    shapes = {tuple(layer.site.shape) for layer in layers_of(model).values()}

    def narrow_weights() -> int:
        kept = []

        def pack(t):
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(**batch("llama"))
        return sum(t.dtype == torch.bfloat16 and tuple(t.shape) in shapes for t in kept)

    count = narrow_weights()
    assert count >= len(layers_of(model)) - 3  # q, k and v of the first block take an input without gradient
    with lt.lean_activations(model):
        assert narrow_weights() == 0
    assert narrow_weights() == count


def test_a_gated_mlp_keeps_gate_and_up_alone():
    model = built("llama")
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32, requires_grad=True)
    with lt.lean_activations(model):
        size = kept_bytes(mlp, lambda: mlp(x))
    assert size == x.nbytes + 2 * 5 * 48 * 4 + 5 * 4 * 4 * 3  # x, gate, up, and x A^T of three layers
    assert kept_bytes(mlp, lambda: mlp(x)) == size + 2 * 5 * 48 * 4  # act(gate), act(gate) up


@pytest.mark.parametrize(
    "method",
    [lt.LoRA(rank=4, dropout=0.3), lt.DoRA(rank=4), lt.LoRAXS(rank=4), lt.MoS(rank=3)],
    ids=lambda m: type(m).__name__ + str(getattr(m, "dropout", "")),
)
def test_other_methods_and_dropout(method):
    model = built("llama", method)
    assert bool(groups(model)) == (method.rung == 1 and not method.input_dropout)
    torch.manual_seed(7)
    with unfused():
        theirs = results(model, "llama")
    torch.manual_seed(7)
    with lt.lean_activations(model):
        assert_same(results(model, "llama"), theirs)


def test_some_of_the_siblings():
    model = built("llama", where=["q_proj", "v_proj"])
    assert groups(model) == [[f"model.layers.{i}.self_attn.{n}_proj" for n in "qv"] for i in range(2)]
    with unfused():
        theirs = results(model, "llama")
    assert_same(results(model, "llama"), theirs)


def test_ranks_of_their_own():
    model = built("llama", per_layer={"q_proj": {"rank": 2}, "v_proj": {"rank": 7}})
    with unfused():
        theirs = results(model, "llama")
    assert_same(results(model, "llama"), theirs)


def test_norms_that_are_trained():
    model = built("bert", also_train=["bert.encoder.layer.0.output.LayerNorm"])
    theirs = results(model, "bert")
    assert any("LayerNorm" in name for name in theirs)
    with lt.lean_activations(model):
        assert_same(results(model, "bert"), theirs)


def test_generation_is_the_same():
    model = built("llama").eval()
    ids = batch("llama")["input_ids"][:1]
    with unfused():
        theirs = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), theirs)


def test_after_merging_and_switching():
    model = built("llama")
    before, which = results(model, "llama"), groups(model)
    lt.merge(model)
    assert not groups(model)
    lt.unmerge(model)
    assert groups(model) == which
    assert_same(results(model, "llama"), before)
    with lt.disabled(model):
        assert not groups(model)
    assert groups(model) == which
    lt.adapt(model, lt.LoRA(rank=2), name="second")
    assert groups(model) == which
    lt.use(model, "default", "second")
    assert not groups(model)


# -- layers that are not called with the same input --------------------------------------------------------------------


class Apart(nn.Module):
    """Named like an attention, whose k and v see another tensor than q; whole=False leaves v out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, memory, whole: bool = True):
        y = self.q_proj(x) + self.k_proj(memory)
        return y + self.v_proj(memory) if whole else y


def apart():
    model = Apart()
    lt.adapt(model, lt.LoRA(rank=1), allow_unused=True)
    move(model)
    return model


def test_another_input_gives_its_own_output_and_the_layers_part():
    model, x, memory = apart(), torch.randn(2, 6), torch.randn(2, 6)
    with unfused():
        wanted = model(x, memory)
    for _ in range(3):
        torch.testing.assert_close(model(x, memory), wanted)
    assert groups(model) == [["k_proj", "v_proj"]]


def test_a_layer_that_is_left_out_gets_no_gradient():
    model, x = apart(), torch.randn(2, 6)
    model(x, x, whole=False).sum().backward()
    assert model.q_proj.loratory["default"].B.grad is not None
    assert model.v_proj.loratory["default"].B.grad is None
    for _ in range(2):
        model(x, x, whole=False)
    assert groups(model) == [["q_proj", "k_proj"]]


def test_an_input_that_changed_in_place_counts_as_another():
    model, x = apart(), torch.randn(2, 6)
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1)
        ours = model.k_proj(x)
        with unfused():
            torch.testing.assert_close(ours, model.k_proj(x))


def test_an_output_made_without_gradient_is_not_handed_out_with_one():
    model, x = apart(), torch.randn(2, 6)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


def test_one_interrupted_forward_does_not_part_them():
    model, x = apart(), torch.randn(2, 6)
    for _ in range(3):
        model.q_proj(x)  # as if an error came then
        model(x, x)
    assert groups(model) == [["q_proj", "k_proj", "v_proj"]]


def test_inference_mode():
    model, x = apart(), torch.randn(2, 6)
    with torch.no_grad(), unfused():
        wanted = model(x, x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, x), wanted)
        y = x.clone()
        torch.testing.assert_close(model(y, y), wanted)


def test_hooks_of_each_layer_run():
    model, x, seen = apart(), torch.randn(2, 6), []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model, name).register_forward_hook(lambda m, args, y, name=name: seen.append(name))
    model(x, x)
    assert seen == ["q_proj", "k_proj", "v_proj"]


def test_a_hook_that_changes_the_input_is_obeyed():
    model, x = apart(), torch.randn(2, 6)
    with unfused():
        wanted = model(x, 2 * x)
    for name in ("k_proj", "v_proj"):
        getattr(model, name).register_forward_pre_hook(lambda m, args: (2 * args[0],))
    torch.testing.assert_close(model(x, x), wanted)


def test_ranks_as_large_as_the_layer_run_alone():
    model, x = Apart(), torch.randn(2, 6)
    lt.adapt(model, lt.LoRA(rank=3))
    with unfused():
        wanted = model(x, x)
    torch.testing.assert_close(model(x, x), wanted)
    assert not groups(model)


def test_offloaded_weights_run_each_in_its_own_turn():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, x = apart(), torch.randn(2, 6)
    with unfused():
        wanted = model(x, x)
    for name in ("q_proj", "k_proj", "v_proj"):
        add_hook_to_module(getattr(model, name), AlignDevicesHook(execution_device="cpu", offload=True))
    assert model.k_proj.weight.is_meta  # until it runs
    torch.testing.assert_close(model(x, x), wanted)


# -- copies, files, and what is left behind ----------------------------------------------------------------------------


def test_copies_are_independent_also_with_outputs_waiting():
    model, x = apart(), torch.randn(2, 6)
    lean = lt.lean_activations(model)
    model.q_proj(x)
    twin = copy.deepcopy(model)
    assert groups(twin) == groups(model)
    with torch.no_grad():
        twin.k_proj.loratory["default"].B.zero_()
    assert not torch.equal(model(x, x), twin(x, x))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x, x), model(x, x))
    lean.close()


def test_nothing_of_a_step_outlives_it():
    model, x = apart(), torch.randn(2, 6)
    y = model(x, x)
    ref = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        y.sum().backward()
        del y, x
        assert ref() is None
    finally:
        gc.enable()


def test_lean_activations_twice_closed_and_copied():
    model = built("llama")
    classes = {name: type(module) for name, module in model.named_modules()}
    first, second = lt.lean_activations(model), lt.lean_activations(model)
    assert first.modules.keys() == second.modules.keys()
    twin = copy.deepcopy(model)
    with unfused():
        wanted = results(model, "llama")
    first.close()
    second.close()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert_same(results(twin, "llama"), wanted)
    less, plain = (kept_bytes(m, lambda m=m: m(**batch("llama")).loss) for m in (twin, model))
    assert less < plain


def test_closed_beneath_another_class():
    model = built("llama")
    lean = lt.lean_activations(model)
    norm, x = model.model.norm, torch.randn(2, 32, requires_grad=True)
    assert origin(norm(x)) is not None
    norm.__class__ = type("Above", (type(norm),), {})
    lean.close()
    assert origin(norm(x)) is None


def test_what_writes_into_its_input_or_keeps_its_output_stays():
    model = nn.Sequential(nn.SiLU(inplace=True), nn.SiLU(), nn.ReLU(), nn.BatchNorm1d(4), nn.LayerNorm(4))
    body = nn.ModuleDict({"body": model})
    assert lt.lean_activations(body).modules.keys() == {"body.1", "body.4"}


def test_state_dict_and_isinstance_are_untouched():
    model = built("llama")
    keys = set(model.state_dict())
    with lt.lean_activations(model):
        assert set(model.state_dict()) == keys
        assert isinstance(model.model.norm, tf.models.llama.modeling_llama.LlamaRMSNorm)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)


@pytest.mark.usefixtures("compiling")
def test_under_the_compiler_layers_run_as_they_are():
    model = built("llama")
    lt.lean_activations(model)
    theirs = results(model, "llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    assert_same(results(model, "llama"), theirs)


def test_tiny_attention_in_a_dict():
    """Siblings in a ModuleDict, each looked up and called by name."""
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    move(model)
    assert len(groups(model)) == 2
    ids = torch.tensor([[1, 2, 3]])
    with unfused():
        wanted = model(ids)
    torch.testing.assert_close(model(ids), wanted)
    assert F.mse_loss(model(ids), wanted) < 1e-10
