"""Bare parameters of real models: expert stacks under each of transformers' kernels, MultiheadAttention, what names mean."""

import copy

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime import parameter
from loratory.runtime.layer import layers_of
from loratory.runtime.where import select
from tests.laws.kinds import move
from tests.runtime.models import Tiny
from tests.runtime.moe import IDS, moe

STACKS = [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")]
FAMILIES = ["mixtral", "qwen2", "qwen3", "gpt-oss", "llama4"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", [lt.LoRA(rank=2), lt.DoRA(rank=2)], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_family(family: str, method: lt.Method, tmp_path):
    model = moe(family)
    keys, base = list(model.state_dict()), logits(model)
    lt.adapt(model, method, "experts")
    experts = list(layers_of(model))
    assert len(experts) == 4
    assert all(n.split(".")[-1] in ("gate_up_proj", "down_proj") for n in experts)
    width = {n: layer.site.inputs for n, layer in layers_of(model).items()}
    assert {width[n] for n in experts if "gate" in n} == {16}  # experts read the hidden size
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
    assert [k for k in model.state_dict() if "loratory" not in k] == keys
    move(model)
    adapted = logits(model)
    assert float((adapted - base).abs().max()) > 0.1
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer = torch.optim.AdamW(lt.param_groups(model))
    optimizer.step()  # every stack was read
    assert all(p.grad is not None and bool(p.grad.any()) for p in lt.trained(model).values())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n in dict(model.named_parameters()) if "loratory" in n
    }
    trained = logits(model.eval())
    check = lt.merge(model)
    assert check.relative <= check.tolerance
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    lt.save(model, tmp_path / "a")  # while it is merged
    lt.detach(model)
    assert torch.equal(logits(model), base)
    fresh = moe(family)
    lt.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), trained)
    lt.export(fresh, tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_every_expert_kernel_reads_the_adapted_stack(family: str, kernel: str):
    model = moe(family, kernel)
    assert model.config._experts_implementation == kernel
    lt.adapt(model, lt.LoRA(rank=2), "experts")
    move(model)
    eager = moe(family)
    lt.adapt(eager, lt.LoRA(rank=2), "experts")
    move(eager)
    torch.testing.assert_close(logits(model), logits(eager))
    for each in (model, eager):
        each.train()(IDS, labels=IDS).loss.backward()
    theirs = lt.trained(eager)
    for name, p in lt.trained(model).items():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_a_stack_is_computed_once_in_a_forward(monkeypatch):
    model = moe("mixtral")
    lt.adapt(model, lt.LoRA(rank=2), "experts")
    calls = []
    plain = parameter._compute
    monkeypatch.setattr(parameter, "_compute", lambda layer: calls.append(layer.site.name) or plain(layer))
    logits(model)
    assert sorted(calls) == sorted(STACKS)  # however many experts were hit
    model(IDS)
    assert len(calls) == 8  # nothing is kept from one forward to the next
    assert not any("_loratory_kept" in m.__dict__ for m in model.modules())


def test_bf16_autocast_and_checkpointing_and_generate():
    model = moe("qwen3").bfloat16()
    lt.adapt(model, lt.LoRA(rank=2), ["experts", "q_proj"])
    move(model)
    assert logits(model).dtype == torch.bfloat16
    layer = layers_of(model)[STACKS[0]]
    assert layer.site.module.gate_up_proj.dtype == torch.bfloat16
    model = moe("qwen3")
    lt.adapt(model, lt.LoRA(rank=2), ["experts", "q_proj"])
    move(model)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers_of(model)[STACKS[0]].site.module.gate_up_proj.dtype == torch.float32  # the weight is not rounded
        assert float((logits(model) - exact).abs().max()) < 0.1 * float(exact.abs().max())
    model.train()(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad.clone() for n, p in lt.trained(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    for n, p in lt.trained(model).items():
        torch.testing.assert_close(p.grad, grads[n])
    model.gradient_checkpointing_disable()
    out = model.eval().generate(IDS, max_new_tokens=4, do_sample=False)
    lt.merge(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), out)


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("experts", STACKS),
        ("gate_up_proj", STACKS[::2]),
        ("experts.down_proj", STACKS[1::2]),
        (STACKS[2], STACKS[2:3]),
        (
            ["experts", "k_proj"],
            ["model.layers.0.self_attn.k_proj", *STACKS[:2], "model.layers.1.self_attn.k_proj", *STACKS[2:]],
        ),
        (r".*\.experts\..*", STACKS),
    ],
    ids=str,
)
def test_names(where, chosen):
    assert list(select(moe("mixtral"), where)) == chosen
    assert list(select(moe("mixtral"), where, blocks=1)) == [n for n in chosen if ".1." in n]
    rest = [n for n in chosen if n != STACKS[2]]
    if rest:
        assert list(select(moe("mixtral"), where, exclude=STACKS[2])) == rest


def test_all_linear_leaves_stacks_out_and_says_so():
    model = moe("mixtral")
    lt.adapt(model, lt.LoRA(rank=2))
    assert not set(layers_of(model)) & set(STACKS)
    assert "4 expert stacks (model.layers.0.mlp.experts.gate_up_proj ...) stay frozen" in str(lt.summary(model))
    model = moe("mixtral")
    lt.adapt(model, lt.LoRA(rank=2), ["all-linear", "experts"])
    assert set(STACKS) <= set(layers_of(model))
    assert "stay frozen" not in str(lt.summary(model))
    row = next(r for r in lt.summary(model).rows if r.layer == STACKS[0])
    assert (row.shape, row.trained) == ((4, 48, 16), 4 * 2 * (48 + 16))


def test_peft_spelling_and_per_layer_settings():
    model = moe("mixtral")
    lt.adapt(
        model,
        "lora",
        r=2,
        target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"down_proj": 3},
    )
    assert {n: layer["default"].A.shape[-2] for n, layer in layers_of(model).items()} == dict(
        zip(STACKS, (2, 3, 2, 3), strict=True)
    )


def test_two_adapters_on_different_parameters_of_one_module(tmp_path):
    model = moe("mixtral")
    base = logits(model)
    lt.adapt(model, lt.LoRA(rank=2), "gate_up_proj", name="up")
    move(model, 1)
    up = logits(model)
    lt.adapt(model, lt.LoRA(rank=2), "down_proj", name="down")
    move(model, 2)
    down = logits(model)
    lt.use(model, "up", "down")
    both = logits(model)
    assert not torch.equal(both, up)
    assert not torch.equal(both, down)
    lt.use(model, "up")
    assert torch.equal(logits(model), up)
    lt.detach(model, "down")
    assert torch.equal(logits(model), up)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    lt.detach(model)
    assert torch.equal(logits(model), base)
    assert "_loratory_swapped" not in type(model.model.layers[0].mlp.experts).__dict__


def test_a_stack_trained_in_full_beside_an_adapted_one():
    model = moe("mixtral")
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.0.mlp.experts.gate_up_proj' is chosen both by where= and by also_train="
    ):
        lt.adapt(model, lt.LoRA(rank=2), "experts", also_train="gate_up_proj")
    lt.adapt(model, lt.LoRA(rank=2), "down_proj", also_train="gate_up_proj")
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in lt.trained(model).values())
    assert any("also_train" in n and "gate_up_proj" in n for n in lt.trained(model))


def test_dropout_and_more_than_a_weight_are_refused():
    model = moe("mixtral")
    with pytest.raises(
        ValueError, match=r"gate_up_proj' is a bare parameter: its input is not seen.*per_layer=\{'gate_up_proj'"
    ):
        lt.adapt(model, lt.LoRA(rank=2, dropout=0.1), "experts")
    off = {"gate_up_proj": {"dropout": 0.0}, "down_proj": {"dropout": 0.0}}
    lt.adapt(model, lt.LoRA(rank=2, dropout=0.1), ["experts", "q_proj"], per_layer=off)

    class Gate(lt.LoRA):
        """Gate: acts on the output."""

        factors = lt.Method.factors

        def forward(self, t, x, base, site):
            return base(x)

    with pytest.raises(
        ValueError, match=r"is a bare parameter, for which only a weight can be changed, and Gate changes more"
    ):
        lt.adapt(moe("mixtral"), Gate(rank=2), "experts")


class Reader(nn.Module):
    """Reads `used` and never `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.used, self.unused = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) @ self.used


def test_a_parameter_that_is_never_read_is_reported():
    model = Reader()
    lt.adapt(model, lt.LoRA(rank=2), parameters={"used": "in out", "unused": "in out"})
    assert list(layers_of(model)) == ["used", "unused"]
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"layer 'unused' got no gradient in the first step: it was not called or read"
    ):
        torch.optim.SGD(lt.param_groups(model)).step()


def test_parameters_of_the_root_itself(tmp_path):
    model = Reader()
    x, base, state = (
        torch.randn(2, 4),
        model.used.detach().clone(),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    lt.adapt(model, lt.LoRA(rank=2), "fc", parameters={"used": "in out"})
    assert set(layers_of(model)) == {"used", "fc"}
    move(model)
    y = model(x)
    torch.testing.assert_close(model._parameters["used"], nn.Parameter(base, requires_grad=False))
    assert not torch.equal(model.used, base)
    lt.save(model, tmp_path)
    twin = copy.deepcopy(model)
    again = Reader()
    again.load_state_dict(state)
    lt.load(again, tmp_path)  # the orientation is in the file
    assert torch.equal(again(x), y)
    lt.merge(twin)  # without a probe: entry by entry
    torch.testing.assert_close(twin(x), y)
    lt.detach(model)
    assert type(model) is Reader
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    model.load_state_dict(again.state_dict(), strict=False)


def test_wrong_names_of_parameters():
    with pytest.raises(
        ValueError, match=r"parameters names 'usde', which no parameter of the model is called; nearest names: used"
    ):
        lt.adapt(Reader(), lt.LoRA(rank=2), parameters={"usde": "in out"})
    with pytest.raises(
        ValueError,
        match=r"'used' is a bare parameter \(4, 4\) whose orientation is not known.*parameters=\{'used': 'out in'\}",
    ):
        lt.adapt(Reader(), lt.LoRA(rank=2), "used")
    with pytest.raises(ValueError, match=r"'fc.weight' is the weight of a Linear; name the layer, 'fc', in where="):
        lt.adapt(Reader(), lt.LoRA(rank=2), parameters={"fc.weight": "out in"})
    with pytest.raises(ValueError, match=r"exclude= and blocks= choose among the layers of where=, which is not given"):
        lt.adapt(Reader(), lt.LoRA(rank=2), parameters={"used": "out in"}, exclude="fc")
    with pytest.raises(ValueError, match=r"no layer matches where='experts'"):
        lt.adapt(Tiny(), lt.LoRA(rank=2), "experts")


def test_a_module_is_adapted_as_a_layer_or_by_its_parameters():
    class Extra(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.extra = nn.Parameter(torch.randn(4, 4))

    model = nn.Sequential(Extra())
    with pytest.raises(ValueError, match=r"layer '0' and its parameter '0.extra' are both chosen"):
        lt.adapt(model, lt.LoRA(rank=2), "0", parameters={"extra": "out in"})
    lt.adapt(model, lt.LoRA(rank=2), "0")
    with pytest.raises(ValueError, match=r"layer '0.extra' is adapted already as a layer"):
        lt.adapt(model, lt.LoRA(rank=2), parameters={"extra": "out in"}, name="b")
    lt.detach(model)
    lt.adapt(model, lt.LoRA(rank=2), parameters={"extra": "out in"})
    with pytest.raises(ValueError, match=r"layer '0' is adapted already by its parameters"):
        lt.adapt(model, lt.LoRA(rank=2), "0", name="b")


def test_a_failing_method_is_no_silent_base_weight():
    class Broken(lt.LoRA):
        """Broken: asks for what is not there."""

        def factors(self, t):
            return t.missing

    model = nn.Sequential(Reader())
    lt.adapt(model, Broken(rank=2), parameters={"used": "in out"})
    with pytest.raises(RuntimeError, match=r"layer '0.used': the adapted weight cannot be computed: .*missing"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("kdim", [None, 4])
def test_multihead_attention(kdim):
    torch.manual_seed(1)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)}).eval()
    query, key = torch.randn(2, 5, 8), torch.randn(2, 3, kdim or 8)
    run = lambda: model["attention"](query, key, key)[0]  # noqa: E731
    base = run()
    lt.adapt(model, lt.LoRA(rank=2))
    names = ["in_proj_weight"] if kdim is None else [f"{p}_proj_weight" for p in "qkv"]
    assert set(layers_of(model)) == {f"attention.{n}" for n in [*names, "out_proj"]}
    assert set(select(model, "attention")) == set(layers_of(model))
    torch.testing.assert_close(run(), base)
    move(model)
    adapted = run()
    (adapted**2).sum().backward()
    torch.optim.SGD(lt.param_groups(model, lr=0.0)).step()
    assert all(bool(p.grad.any()) for p in lt.trained(model).values())
    with torch.no_grad():
        torch.testing.assert_close(run(), adapted)
        if kdim is None:  # self-attention takes torch's own fused path, which reads the weights too
            x = query
            fused = model["attention"](x, x, x, need_weights=False)[0]
            torch.testing.assert_close(fused, model["attention"].train()(x, x, x, need_weights=False)[0])
            model.eval()
    lt.merge(model)
    torch.testing.assert_close(run(), adapted)
    lt.detach(model)
    torch.testing.assert_close(run(), base)
    assert repr(model) == repr(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim)}))


def test_biases_of_an_output_projection_that_is_never_called():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    lt.adapt(model, lt.LoRA(rank=2), bias="adapted")
    assert [n for n in lt.trained(model) if "also_train" in n] == ["also_train/attention.out_proj.bias"]
    x = torch.randn(5, 2, 8)
    model["attention"](x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in lt.trained(model).values())


def test_a_tied_parameter_is_not_merged_unasked():
    model = nn.ModuleDict({"a": Reader(), "b": Reader()})
    model["b"].used = model["a"].used
    lt.adapt(model, lt.LoRA(rank=2), parameters={"a.used": "in out"})
    move(model)
    with pytest.raises(ValueError, match=r"layer 'a.used' shares its weight with 'b.used'"):
        lt.merge(model)
    x = torch.randn(2, 4)
    y, other = model["a"](x), model["b"](x)
    lt.merge(model, untie=True)
    torch.testing.assert_close(model["a"](x), y)
    assert torch.equal(model["b"](x), other)


def test_accelerates_hook_on_the_owner():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = nn.Sequential(Reader())
    add_hook_to_module(model[0], Double())
    x, base = torch.ones(2, 4), model(torch.ones(2, 4))
    lt.adapt(model, lt.LoRA(rank=2), parameters={"used": "in out"})
    torch.testing.assert_close(model(x), base)
    move(model)
    hooked = model(x)
    remove_hook_from_module(model[0])
    torch.testing.assert_close(2 * model(x), hooked)
    assert not torch.allclose(hooked, base)
    lt.detach(model)
    torch.testing.assert_close(2 * model(x), base)


def test_a_parameter_list_and_a_state_dict_assigned():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for W in self.weights:
                x = x @ W
            return x

    model, x = Steps(), torch.randn(2, 4)
    lt.adapt(model, lt.LoRA(rank=2), parameters={"weights.0": "in out", "weights.1": "in out"})
    move(model)
    y = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), y)
    state["weights.0"] *= 2
    model.load_state_dict(state)
    assert not torch.equal(model(x), y)
    W = [
        state[f"weights.{i}"] + (state[f"weights.loratory.{i}.default.B"] @ state[f"weights.loratory.{i}.default.A"]).T
        for i in (0, 1)
    ]
    torch.testing.assert_close(model(x), x @ W[0] @ W[1])


def test_a_replaced_tensor_in_a_functional_call():
    model, x = nn.Sequential(Reader()), torch.randn(2, 4)
    lt.adapt(model, lt.LoRA(rank=2), parameters={"used": "in out"})
    move(model)
    used = torch.eye(4)
    out = torch.func.functional_call(model, {"0.used": used}, (x,))
    t = layers_of(model)["0.used"]["default"]
    torch.testing.assert_close(out, model[0].fc(x) @ (used + (t.B @ t.A).T))
