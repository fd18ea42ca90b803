"""One adapter for each batch row: the same numbers as one adapter after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from tests.laws.kinds import Case, move
from tests.laws.table import CASES
from tests.runtime.models import IDS, Tiny, tiny_bert, tiny_gpt2

Names = list[str | None]


def close(a: Tensor, b: Tensor, *, tolerance: float = 1e-6) -> None:
    assert a.shape == b.shape
    span = float(b.detach().max() - b.detach().min())
    assert float((a - b).detach().abs().max()) <= tolerance * span


def alone(model: nn.Module, names: Names, run: Callable[[int], Tensor], dim: int = 0) -> Tensor:
    """run(row) with the row's adapter active, one row after the other."""
    out = []
    before = lt.active(model)
    for i, name in enumerate(names):
        lt.use(model, *([] if name is None else [name]))
        out.append(run(i))
    lt.use(model, *before)
    return torch.cat(out, dim)


def several(model: nn.Module) -> nn.Module:
    """Adapters of several methods, ranks and layers: rungs 1, 3 and 4."""
    for i, (name, method, where) in enumerate(
        [
            ("a", lt.LoRA(rank=2, alpha=3), "all-linear"),
            ("b", lt.DoRA(rank=3), "all-linear"),
            ("c", lt.LoRA(rank=5, rslora=True, alpha=4), "attention, embed"),
            ("d", lt.DoRA(rank=1), "mlp"),
        ]
    ):
        lt.adapt(model, method, where, name=name)
        move(model, seed=i)
    return model


BATCH_SECOND = ("MultiheadAttention",)  # kinds of the table whose network takes time first


@pytest.mark.parametrize("case", CASES)
def test_every_method_on_every_layer(case: Case, request: pytest.FixtureRequest):
    model = case.moved(torch.float64, name="a")
    lt.adapt(model, lt.LoRA(rank=1), case.kind.where[-1:], name="b")
    move(model, seed=5)
    first: dict[str, Any] = (
        {"parameters": case.kind.parameters} if case.kind.parameters else {"where": case.kind.where[:1]}
    )
    lt.adapt(model, lt.DoRA(rank=1), name="c", **first)
    move(model, seed=6)
    x = case.inputs(torch.float64)
    dim = int(request.node.callspec.id.endswith(BATCH_SECOND))
    x = torch.cat([x, x.flip(dim)], dim).narrow(dim, 0, min(6, 2 * x.shape[dim]))
    names: Names = ["a", None, "c", "b", "a", "c"][: x.shape[dim]]
    wanted = alone(model, names, lambda i: model(x.narrow(dim, i, 1)), dim)

    def gradients(out: Tensor) -> dict[str, Tensor]:
        out.square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    slow = gradients(wanted)
    with lt.rows(model, names, dim=dim):
        close(model(x), wanted)
        with torch.no_grad():
            close(model(x), wanted)
            close(model(x), wanted)
        fast = gradients(model(x))
    assert set(fast) == set(slow)
    for n in slow:
        if n.rpartition(".")[2] not in case.row.clipped:
            torch.testing.assert_close(fast[n], slow[n], rtol=1e-6, atol=1e-8)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "c", "d", None],
        ["c", "c", "a", "a", "c"],
        ["b", "d", "d", "b", "b"],
        [None, None, None, None, None],
        ["b", "b", "b", "b", "b"],
        ["a", None, "a", None, "a"],
    ],
)
def test_any_mix_of_methods(names: Names):
    model = several(Tiny().eval())
    ids = torch.arange(20).remainder(11).reshape(5, 4)
    wanted = alone(model, names, lambda i: model(ids[i : i + 1]))
    with lt.rows(model, names):
        close(model(ids), wanted)
    assert lt.active(model) == ("d",)


def test_a_row_without_adapter_is_the_base_bit_for_bit_and_a_broken_adapter_stays_alone():
    model = several(Tiny().eval())
    ids = torch.cat([IDS, IDS])
    with torch.no_grad():
        lt.trained(model)["layers/blocks.0.up_proj/B"].fill_(float("nan"))
        with lt.disabled(model):
            base = model(ids)
        with lt.rows(model, ["d", None, None, "a"]):
            out = model(ids)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:3], base[1:3], rtol=0, atol=0)
    assert out[3].isfinite().all()


def test_gradients_reach_each_adapter_from_its_own_rows():
    model = several(Tiny())
    ids = torch.arange(20).remainder(11).reshape(5, 4)
    names: Names = ["a", "b", None, "c", "a"]

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    alone(model, names, lambda i: model(ids[i : i + 1])).square().sum().backward()
    wanted = gradients()
    with lt.rows(model, names):
        model(ids).square().sum().backward()
        assert {n.split("/")[0] for n in lt.trained(model)} == {"a", "b", "c"}
    found = gradients()
    assert set(found) == set(wanted)
    assert any(".a." in n for n in found)
    assert not any(".d." in n for n in found)
    for n in wanted:
        close(found[n], wanted[n], tolerance=1e-5)


def test_padding_ids_of_an_embedding_get_no_gradient():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=0))
    for name in ("a", "b"):
        lt.adapt(model, lt.LoRA(rank=2), "0", name=name)
    ids = torch.tensor([[0, 1], [0, 2]])
    with lt.rows(model, ["a", "b"]):
        model(ids).sum().backward()
    for name, own in (("a", 1), ("b", 2)):
        A = model[0].loratory[name].A.grad
        assert A.abs().sum(0).nonzero().flatten().tolist() == [own]


def test_dropout_falls_on_the_rows_that_have_it():
    model = nn.Sequential(nn.Linear(400, 400, bias=False))
    nn.init.zeros_(model[0].weight)
    for name, p in (("some", 0.5), ("none", 0.0), ("most", 0.9)):
        lt.adapt(model, lt.LoRA(rank=400, dropout=p), "0", name=name)
        with torch.no_grad():
            for factor in lt.trained(model).values():
                factor.copy_(torch.eye(400))
    model.train()
    x = torch.ones(4, 400)
    with lt.rows(model, ["some", "none", "most", None]):
        some, none, most, base = model(x)
    assert set(some.tolist()) == {0.0, 2.0}
    assert 120 < int((some == 0).sum()) < 280
    assert most.unique().numel() == 2
    torch.testing.assert_close(float(most.detach().max()), 10.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(none, x[1])
    torch.testing.assert_close(base, torch.zeros(400))
    with lt.rows(model.eval(), ["some", "none", "most", None]):
        torch.testing.assert_close(model(x)[:3], x[:3])


def test_factors_kept_between_calls_follow_what_is_written_to_them():
    model = several(Tiny().eval())
    names: Names = ["a", "c"]
    with torch.no_grad(), lt.rows(model, names):
        first = model(IDS)
        for p in lt.trained(model).values():
            p.mul_(1.5)
        second = model(IDS)
    assert not torch.equal(first, second)
    close(second, alone(model, names, lambda i: model(IDS[i : i + 1])).detach())


def test_inference_mode_and_bfloat16():
    model = several(Tiny().eval()).to(torch.bfloat16)
    names: Names = ["a", "b"]
    with torch.inference_mode():
        wanted = alone(model, names, lambda i: model(IDS[i : i + 1]))
        with lt.rows(model, names):
            out = model(IDS)
            close(out.float(), wanted.float(), tolerance=2e-2)
    assert out.dtype == torch.bfloat16


def test_under_autocast():
    model = several(Tiny().eval())
    names: Names = ["a", "c"]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = alone(model, names, lambda i: model(IDS[i : i + 1]))
        with lt.rows(model, names):
            close(model(IDS).float(), wanted.float(), tolerance=2e-2)


def test_one_compiled_graph(compiling: None):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for name, method in (("a", lt.LoRA(rank=2)), ("b", lt.DoRA(rank=2)), ("c", lt.LoRA(rank=3))):
        lt.adapt(model, method, name=name)
        move(model, seed=ord(name))
    x = torch.randn(4, 3, 6)
    names: Names = ["a", "b", None, "c"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with lt.rows(compiled, names):
        out = compiled(x)
    close(out, alone(model, names, lambda i: model(x[i : i + 1])))


# transformers models


def left_padded(model: Any, texts: list[str]) -> dict[str, Tensor]:
    model.tokenizer.pad_token = model.tokenizer.eos_token
    return dict(model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))


def served(model: Any) -> Any:
    for i, (name, method, where) in enumerate(
        [
            ("french", lt.LoRA(rank=4), "all-linear"),
            ("legal", lt.DoRA(rank=2), "attention"),
            ("short", lt.LoRA(rank=2), "mlp, embed_tokens"),
        ]
    ):
        lt.adapt(model, method, where, name=name)
        move(model, seed=i)
    return model


TEXTS = ["Once upon a time", "Lily and Tom", "The big dog ran", "One day"]
SERVED: Names = ["french", None, "legal", "short"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "several beams returned", "without cache"],
)
def test_generate(options: dict[str, Any], stories: Callable[[], Any]):
    model = served(stories())
    batch = left_padded(model, TEXTS)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    with torch.no_grad():
        wanted = alone(
            model,
            SERVED,
            lambda i: model.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **settings),
        )
        logits = alone(model, SERVED, lambda i: model(**{k: v[i : i + 1] for k, v in batch.items()}).logits)
        with lt.rows(model, SERVED):
            assert torch.equal(model.generate(**batch, **settings), wanted)
            close(model(**batch).logits, logits)
        assert "generate" not in model.__dict__


def test_sampled_sequences_keep_their_rows_adapter(stories: Callable[[], Any]):
    """With top_k=1 every sampled sequence of a row is its adapter's greedy one."""
    from transformers import GenerationConfig

    model = served(stories())
    batch = left_padded(model, TEXTS)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    with torch.no_grad(), lt.rows(model, SERVED):
        greedy = model.generate(**batch, do_sample=False, **settings)
        config = GenerationConfig(num_return_sequences=3, do_sample=True, top_k=1, pad_token_id=0, **settings)
        sampled = model.generate(**batch, generation_config=config)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in greedy[:, -6:]}) == 4


def test_an_encoder_and_a_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=30,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    model = T5ForConditionalGeneration(config).eval()
    for i, (name, method) in enumerate([("a", lt.LoRA(rank=2)), ("b", lt.DoRA(rank=2))]):
        lt.adapt(model, method, name=name)
        move(model, seed=i)
    ids = torch.arange(1, 13).reshape(3, 4)
    names: Names = ["a", None, "b"]
    settings = {"num_beams": 2, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        wanted = alone(model, names, lambda i: model.generate(ids[i : i + 1], **settings))
        with lt.rows(model, names):
            assert torch.equal(model.generate(ids, **settings), wanted)
            assert torch.equal(model.generate(ids, **settings), wanted)


def test_positions_shared_by_all_rows_and_transposed_layers():
    model = tiny_gpt2()
    for i, (name, where) in enumerate([("a", "all-linear, wpe, wte"), ("b", "c_attn, wpe")]):
        lt.adapt(model, lt.LoRA(rank=2), where, name=name)
        move(model, seed=i)
    names: Names = ["a", "b", None]
    ids = torch.arange(18).reshape(3, 6)
    with torch.no_grad():
        wanted = alone(model, names, lambda i: model(ids[i : i + 1]).logits)
        with lt.rows(model, names):
            close(model(ids).logits, wanted)


def test_inputs_of_two_dimensions():
    model = tiny_bert()
    for i, (name, method) in enumerate([("a", lt.LoRA(rank=2)), ("b", lt.DoRA(rank=2))]):
        lt.adapt(model, method, "dense, query, classifier, embedding", name=name)
        move(model, seed=i)
    names: Names = ["b", "a", None]
    ids = torch.arange(18).reshape(3, 6)
    with torch.no_grad():
        wanted = alone(model, names, lambda i: model(ids[i : i + 1]).logits)
        with lt.rows(model, names):
            close(model(input_ids=ids).logits, wanted)


# refusals, and leaving


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (["a", "z"], ValueError, r"there is no adapter 'z'; the model has: "),
        ([], ValueError, r"names is empty; give one adapter name \(or None\) for each row"),
        ("ab", TypeError, r"names is a str; give a list with one adapter name"),
        (None, TypeError, r"names is a NoneType; give a list"),
    ],
)
def test_wrong_names(names: Any, kind: type[Exception], message: str):
    model = several(Tiny())
    before = model(IDS)
    with pytest.raises(kind, match=message), lt.rows(model, names):
        pass
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("names", [["a", "b", None], ["a"], ["a"] * 4, [None] * 3])
def test_a_batch_of_another_length(names: Names):
    model = several(Tiny())
    before = model(IDS)
    message = rf"the batch has 2 rows, but rows\(\) names {len(names)} adapters; give one name \(or None\) for each row"
    with pytest.raises(ValueError, match=message), lt.rows(model, names):
        model(IDS)
    assert torch.equal(model(IDS), before)
    assert not model._forward_pre_hooks


def test_names_for_the_sequences_of_a_row(stories: Callable[[], Any]):
    model = served(stories())
    batch = left_padded(model, TEXTS[:2])
    names: Names = ["french", "french", None, None]
    with (
        pytest.raises(
            ValueError, match=r"the batch has 4 rows, but rows\(\) names 4 .*, not for each of the 2 sequences"
        ),
        lt.rows(model, names),
    ):
        model.generate(**batch, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"the batch has 4 rows, but rows\(\) names 2"), lt.rows(model, names[1:3]):
        model(torch.ones(4, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "options",
    [
        {"also_train": "head"},
        {"also_train": "embed, norm, o_proj"},
        {"bias": "adapted"},
        {"bias": "all"},
        {"method": lt.DoRA(rank=2), "bias": "adapted"},
        {"method": lt.Full()},
    ],
    ids=["head", "embedding and norms", "adapted biases", "all biases", "biases of DoRA", "whole model"],
)
def test_modules_trained_in_full_serve_their_rows(options: dict[str, Any]):
    model = Tiny().double().eval()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj, up_proj", name="plain")
    move(model, seed=1)
    method = options.pop("method", lt.LoRA(rank=2))
    for name, seed in (("whole", 2), ("other", 3)):
        if method.trains == "all":
            lt.adapt(model, method, name=name)
        else:
            lt.adapt(model, method, "q_proj, v_proj", name=name, **options)
        move(model, seed=seed)
    ids = torch.arange(20).remainder(11).reshape(5, 4)
    names: Names = ["whole", "plain", None, "other", "whole"]

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    wanted = alone(model, names, lambda i: model(ids[i : i + 1]))
    wanted.square().sum().backward()
    slow = gradients()
    with lt.rows(model, names):
        out = model(ids)
        close(out, wanted)
        out.square().sum().backward()
        with lt.rows(model, ["whole"] * 5):
            close(model(ids)[:1], wanted[:1])
        with lt.disabled(model):
            assert torch.equal(model(ids), Tiny().double().eval()(ids))
        close(model(ids), wanted)
    fast = gradients()
    assert any("loratory_copies.whole" in n for n in fast)
    for n in slow:
        torch.testing.assert_close(fast[n], slow[n])
    with lt.disabled(model):
        assert torch.equal(model(ids), Tiny().double().eval()(ids))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_tied_head_trained_in_full_serves_its_rows(stories: Callable[[], Any]):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="a", also_train="embed_tokens")
    move(model, seed=1)
    lt.adapt(model, lt.DoRA(rank=2), "q_proj", name="b")
    move(model, seed=2)
    batch, names = left_padded(model, TEXTS[:3]), ["a", None, "b"]
    settings = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        wanted = alone(
            model, names, lambda i: model.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **settings)
        )
        with lt.rows(model, names):
            assert torch.equal(model.generate(**batch, **settings), wanted)


def test_trained_modules_that_may_mix_rows_run_in_groups():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    x = torch.randn(4, 4)
    names: Names = ["whole", "plain", None, "whole"]

    def answers(model: nn.Module, first: int, last: int) -> Tensor:
        return alone(model, names[first:last], lambda i: model(x[first + i : first + i + 1]))

    for last in (Pool(), nn.BatchNorm1d(4)):
        model = nn.Sequential(nn.Linear(4, 4), last)
        lt.adapt(model, lt.LoRA(rank=2), "0", name="plain")
        lt.adapt(model, lt.LoRA(rank=2), "0", name="whole", also_train="1")
        move(model)
        lt.use(model, "whole")
        wanted = model(x[[0, 3]])
        lt.use(model, "plain")
        with lt.rows(model, names):
            out = model(x)
        close(out[[0, 3]], wanted)
        close(out[1:3], answers(model, 1, 3))
        wanted = answers(model.eval(), 0, 4)
        with lt.rows(model, names):
            close(model(x), wanted)


def test_blocks_nest_and_end_even_after_an_error():
    model = several(Tiny().eval())
    lt.use(model, "a", "b", mix=[0.3, 0.9])
    mixed = model(IDS)
    with lt.rows(model, ["a", "b"]):
        outer = model(IDS)
        assert lt.active(model) == ("a", "b")
        with lt.rows(model, ["c", None]):
            inner = model(IDS)
        assert torch.equal(model(IDS), outer)
        with lt.disabled(model):
            assert torch.equal(model(IDS), Tiny().eval()(IDS))
        assert torch.equal(model(IDS), outer)
    assert not torch.equal(inner, outer)
    assert torch.equal(model(IDS), mixed)
    with pytest.raises(ZeroDivisionError), lt.rows(model, ["a", None]):
        _ = 1 / 0
    assert torch.equal(model(IDS), mixed)
    assert lt.active(model) == ("a", "b")


def test_adapters_stay_as_they_are_inside_the_block(tmp_path: Any):
    model = several(Tiny().eval())
    lt.save(model, tmp_path / "d")
    changes: dict[str, Callable[[], Any]] = {
        "switching adapters": lambda: lt.use(model, "a"),
        "adding an adapter": lambda: lt.adapt(model, lt.LoRA(rank=2), name="e"),
        "detaching an adapter": lambda: lt.detach(model, "a"),
        "merging": lambda: lt.merge(model, probe=IDS),
    }
    with lt.rows(model, ["a", "b"]):
        before = model(IDS)
        for what, change in changes.items():
            with pytest.raises(RuntimeError, match=rf"inside `with loratory.rows\(...\)` .*so {what} must wait"):
                change()
        with pytest.raises(RuntimeError, match="adding an adapter must wait"):
            lt.load(model, tmp_path / "d", name="e")
        assert torch.equal(model(IDS), before)
    lt.merge(model, probe=IDS)
    with (
        pytest.raises(RuntimeError, match=r"merged with d; call loratory.unmerge\(model\) before serving rows"),
        lt.rows(model, ["a", "b"]),
    ):
        pass


def test_adapters_come_and_go_on_a_live_model(tmp_path: Any):
    """Loading, training and unloading one adapter leaves the bits of the others, and what they answer."""
    model = several(Tiny().eval())
    lt.use(model, "d")
    lt.save(model, tmp_path / "d")
    with torch.no_grad(), lt.rows(model, ["a", "b"]):
        answers = model(IDS)
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if ".a." in n or ".b." in n}
    lt.load(model, tmp_path / "d", name="new", trainable=True)
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    both = IDS[:1].repeat(2, 1)
    with torch.no_grad(), lt.rows(model, ["new", "d"]):
        trained, old = model(both)
    assert not torch.allclose(trained, old)
    lt.detach(model, "d")
    with torch.no_grad():
        with lt.rows(model, ["a", "b"]):
            assert torch.equal(model(IDS), answers)
        with lt.rows(model, ["new", None]):
            close(model(both)[0], trained)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in kept.items())
    assert lt.adapters(model) == ("a", "b", "c", "new")
    lt.detach(model)
    assert torch.equal(model(IDS), Tiny().eval()(IDS))


def test_adapters_trained_in_turn_and_together():
    """Three adapters trained one after the other, or in one batch with one optimizer, end with the same numbers."""
    targets = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [9, 9, 9, 9]])
    ids = torch.arange(12).remainder(11).reshape(3, 4)

    def fresh() -> nn.Module:
        model = Tiny()
        for seed, (name, method) in enumerate([("a", lt.LoRA(rank=2)), ("b", lt.DoRA(rank=2)), ("c", lt.LoRA(rank=3))]):
            lt.adapt(model, method, name=name, seed=seed)
        return model

    def loss(out: Tensor, i: slice) -> Tensor:
        return nn.functional.cross_entropy(out.flatten(0, 1), targets[i].flatten(), reduction="sum")

    turns, together = fresh(), fresh()
    losses = []
    for i, name in enumerate("abc"):
        lt.use(turns, name)
        optimizer = torch.optim.SGD(lt.param_groups(turns, lr=0.05))
        for _ in range(3):
            optimizer.zero_grad()
            value = loss(turns(ids[i : i + 1]), slice(i, i + 1))
            value.backward()
            losses.append(float(value.detach()))
            optimizer.step()
    with lt.rows(together, ["a", "b", "c"]):
        optimizer = torch.optim.SGD(lt.param_groups(together, lr=0.05))
        for _ in range(3):
            optimizer.zero_grad()
            loss(together(ids), slice(None)).backward()
            optimizer.step()
    assert losses[2] < losses[0]
    wanted = dict(turns.named_parameters())
    for n, p in together.named_parameters():
        torch.testing.assert_close(p, wanted[n], rtol=1e-4, atol=1e-5)
