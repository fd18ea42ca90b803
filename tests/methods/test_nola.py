"""NOLA: both forms, bases that are made from a seed and dropped, its files, and coefficients of a few bits."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratory as lt
from loratory.methods import nola
from loratory.ops.random_basis import uniform
from loratory.runtime.layer import layers_of
from tests.laws.kinds import Row, adapters_of, move, stacked

ROW = Row(
    made=lambda rank: {
        "NOLA": lt.NOLA(rank=rank, bases=5, bases_B=4, alpha=3),
        "NOLA kept": lt.NOLA(rank=rank, bases=5, basis="memory"),
        "NOLA vision": lt.NOLA(rank=rank, bases=128, bases_B=96, form="vision", chunks=2),
    },
    count=lambda site, rank: stacked(site) * (5 + 4),
    start=lambda method: 0.3 if method.form == "vision" else 1e-6,
)

PLANTED = [
    ("no root of k", "c / math.sqrt(c.shape[-1])", "c / 1.0"),
    ("root of k in the vision form", 'if self.form == "vision" else c / math', 'if False else c / math'),
    ("scale of the language form", "return B / r, A", "return B, A"),
    ("frozen start left out", "t.A0.to(A.dtype) + A", "A"),
    ("vision bases as wide as those of text", "1 / math.sqrt(entries) if", "1.0 if"),
    ("vision coefficients start at 1", "beta.fill_(1 / kB)", "beta.fill_(1.0)"),
    ("one seed for all layers", '{seed} {side} {layer}"', '{seed} {side}"'),
    ("one seed for both sides", '{seed} {side} {layer}"', '{seed} {layer}"'),
    ("field seed ignored", '{seed} {side} {layer}"', '{side} {layer}"'),
    ("start in the file", 'rebuilt = self.basis != "file"', "rebuilt = False"),
    ("basis not checked", "frozen(probe.to(alpha.dtype), rebuilt=True)", "frozen(probe.to(alpha.dtype))"),
    ("A's number of bases for B", "*site.stack, kB)", "*site.stack, kA)"),
    ("decay of the update", "trained(alpha, decay=False)", "trained(alpha)"),
]  # fmt: skip

X = torch.linspace(-1, 1, 28).reshape(4, 7)


def adapted(inputs: int = 7, outputs: int = 9, moved: bool = True, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(1)
    model = nn.ModuleDict({"fc": nn.Linear(inputs, outputs).to(dtype)})
    lt.adapt(model, lt.NOLA(**{"rank": 3, "bases": 6} | options), "fc")
    if moved:
        move(model)
    return model, model["fc"].loratory["default"]


def summed(t, side: int, shape: tuple[int, int], bound: float = 1.0) -> torch.Tensor:
    """The sum of the docstring, one matrix at a time."""
    c = (t.alpha, t.beta)[side].detach()
    return sum(
        c[i] * bound * uniform(t.seeds[side], i, 1, math.prod(shape)).view(shape).double() for i in range(len(c))
    )


@pytest.mark.parametrize("options", [{}, {"alpha": 12}, {"bases_B": 4}, {"basis": "memory"}, {"basis": "file"}])
def test_language_form(options):
    model, t = adapted(**options)
    A = t.A0 + summed(t, 0, (3, 7)) / math.sqrt(len(t.alpha))
    B = summed(t, 1, (9, 3)) / math.sqrt(len(t.beta))
    W = model["fc"].weight + options.get("alpha", 3) / 3 * B @ A
    x = X.double()
    torch.testing.assert_close(model["fc"](x), nn.functional.linear(x, W, model["fc"].bias))


@pytest.mark.parametrize("options", [{}, {"bases_B": 4}, {"basis": "memory"}])
def test_vision_form(options):
    model, t = adapted(form="vision", **options)
    assert "A0" not in t.tensors()
    A, B = summed(t, 0, (3, 7), 21**-0.5), summed(t, 1, (9, 3), 27**-0.5)
    x = X.double()
    torch.testing.assert_close(
        model["fc"](x), nn.functional.linear(x, model["fc"].weight + B @ A / 3, model["fc"].bias)
    )


def test_the_start_moves_beta_alone():
    model, t = adapted(moved=False)
    model["fc"](X.double()).square().sum().backward()
    assert not torch.cat([t.alpha, t.beta, t.alpha.grad]).any()
    assert t.beta.grad.all()
    assert t.A0.abs().max() <= 7**-0.5
    assert t.A0.std().item() == pytest.approx((7 * 3) ** -0.5, rel=0.3)


def test_the_vision_form_starts_near_the_base():
    model, t = adapted(40, 30, moved=False, form="vision", bases=64, bases_B=32)
    torch.testing.assert_close(t.alpha.detach(), torch.full((64,), 1 / 64).double())
    torch.testing.assert_close(t.beta.detach(), torch.full((32,), 1 / 32).double())
    change = t.method.delta(t).norm() / model["fc"].weight.norm()
    assert 0 < change < 0.05


def test_each_layer_side_and_seed_has_a_basis_of_its_own():
    model = nn.ModuleDict({"a": nn.Linear(7, 7), "b": nn.Linear(7, 7)})
    lt.adapt(model, lt.NOLA(rank=7, bases=6), ["a", "b"])
    lt.adapt(model, lt.NOLA(rank=7, bases=6, seed=1), ["a", "b"], name="other")
    found = [uniform(key, 0, 6, 49) for layer in layers_of(model).values() for t in layer.adapters() for key in t.seeds]
    assert len(found) == 12
    for i, one in enumerate(found):
        for other in found[:i]:
            assert abs(float((one * other).mean())) < 0.1  # 1/3 where they are the same


def test_weight_decay_would_shrink_the_update_so_there_is_none():
    model, _ = adapted()
    assert [(g["weight_decay"], len(g["params"])) for g in lt.param_groups(model, weight_decay=0.1)] == [(0.0, 2)]


def test_on_a_base_of_4_bits_the_coefficients_stay_whole():
    torch.manual_seed(1)
    model = nn.ModuleDict({"fc": nn.Linear(64, 32)})
    lt.quantize(model, "nf4", "fc")
    x = torch.randn(3, 64)
    before = model["fc"](x)
    lt.adapt(model, lt.NOLA(rank=4, bases=20), "fc")
    move(model)
    t = model["fc"].loratory["default"]
    assert {t.alpha.dtype, t.beta.dtype} == {torch.float32}
    torch.testing.assert_close(model["fc"](x), before + x @ t.method.delta(t).T)


def test_an_embeddings_start_is_as_large_as_its_one_hot_input_asks():
    model = nn.ModuleDict({"e": nn.Embedding(4000, 8)})
    lt.adapt(model, lt.NOLA(rank=2, bases=3), "e")
    assert 0.99 < model["e"].loratory["default"].A0.max() <= 1


def test_counts_depend_on_neither_shape_nor_rank():
    for inputs, outputs, rank in ((7, 9, 1), (40, 30, 5), (12, 300, 12)):
        model, _ = adapted(inputs, outputs, rank=rank, bases=7, bases_B=5)
        assert lt.summary(model).trained == 12


def test_the_precision_of_the_model_does_not_change_the_basis():
    wide, _ = adapted(dtype=torch.float32)
    narrow, t = adapted(dtype=torch.float32)
    narrow.bfloat16()
    assert t.alpha.dtype == torch.bfloat16
    error = (narrow["fc"](X.bfloat16()).float() - wide["fc"](X)).abs().max()
    assert error < 0.02 * wide["fc"](X).abs().max()


def test_other_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    layer = nn.Linear(7, 9, device="meta").to_empty(device="cpu")
    nn.init.constant_(layer.weight, 0.1), nn.init.zeros_(layer.bias)
    model = nn.ModuleDict({"fc": layer})
    lt.adapt(model, lt.NOLA(rank=3, bases=6), "fc")
    model["fc"](X).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_basis_survives_the_forward_pass():
    """What is kept: x and the base's weight, as without the adapter, x A^T, the factors on their way, and the seeds."""
    torch.manual_seed(0)
    r, k, width = 4, 64, 96
    model = nn.ModuleDict({"fc": nn.Linear(width, width)})
    lt.adapt(model, lt.NOLA(rank=r, bases=k), "fc")
    x, kept = torch.randn(5, width, requires_grad=True), {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model["fc"](x)
    numbers = sum(t.numel() for t in kept.values() if t.numel() not in (x.numel(), width**2))
    assert numbers <= 2 * k + r * (width + width) + 5 * r + 6
    assert max(t.numel() for t in kept.values()) == width**2 < k * r * width
    move(model)
    y.sum().backward()
    assert all(p.grad is not None for p in lt.trained(model).values())


@pytest.mark.parametrize("basis", ["memory", "seed"])
def test_files_hold_seeds_and_checksums(basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, t = adapted(basis=basis, dtype=torch.float32)
    lt.save(model, tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert set(load_file(tmp_path / "adapter.safetensors")) == {f"layers/fc/{n}" for n in ("alpha", "beta", "seeds")}
    made = {"A0", "MA", "MB"} if basis == "memory" else {"A0", "probe"}
    assert set(record["rebuilt"]) == {f"layers/fc/{n}" for n in made}
    assert record["hyperparameters"] == t.method.hyperparameters()
    again, _ = adapted(moved=False, dtype=torch.float32)
    lt.detach(again)
    lt.load(again, tmp_path)
    assert torch.equal(again["fc"](X), model["fc"](X))
    monkeypatch.setattr(nola, "uniform", lambda *a: uniform(*a) * (1 + 2**-20))
    lt.detach(again)
    with pytest.raises(
        ValueError,
        match=r"\(\w{12}\) in place .* makes others of seed 0 \(\w{12}\); .*a file that holds the tensor itself",
    ):
        lt.load(again, tmp_path)


def test_a_file_with_the_basis_loads_where_another_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = adapted(basis="file", dtype=torch.float32)
    lt.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {
        f"layers/fc/{n}" for n in ("alpha", "beta", "seeds", "A0", "MA", "MB")
    }
    again, _ = adapted(moved=False, dtype=torch.float32)
    lt.detach(again)
    monkeypatch.setattr(nola, "uniform", lambda *a: 1 - uniform(*a))
    lt.load(again, tmp_path)
    assert torch.equal(again["fc"](X), model["fc"](X))


def test_a_file_without_a_seed_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    from loratory.store.native import _digest

    model, _ = adapted(dtype=torch.float32)
    lt.save(model, tmp_path)
    file, record = tmp_path / "adapter.safetensors", json.loads((tmp_path / "adapter.json").read_text())
    save_file({n: t for n, t in load_file(file).items() if "seeds" not in n}, file)
    (tmp_path / "adapter.json").write_text(json.dumps(record | {"sha256": _digest(file)}))
    lt.detach(model)
    with pytest.raises(ValueError, match="lacks tensor 'layers/fc/seeds'"):
        lt.load(model, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_coefficients_of_a_few_bits(bits, tmp_path: Path):
    x, sizes = torch.linspace(-1, 1, 80).reshape(2, 40), {"inputs": 40, "outputs": 30, "dtype": torch.float32}
    model, t = adapted(bases=64, **sizes)
    exact, before = model["fc"](x), t.alpha.detach().clone()
    lt.save(model, tmp_path, bits=bits)
    assert torch.equal(t.alpha, before)  # what is in memory stays
    found = load_file(tmp_path / "adapter.safetensors")
    assert found["layers/fc/alpha"].dtype == torch.uint8
    assert found["layers/fc/alpha"].numel() == 64 * bits / 8
    again, _ = adapted(moved=False, **sizes)
    lt.detach(again)
    lt.load(again, tmp_path)
    loaded = again["fc"].loratory["default"]
    step = before.abs().max() / (2 ** (bits - 1) - 1)
    assert (loaded.alpha - before).abs().max() <= 0.5001 * step
    assert len(loaded.alpha.unique()) <= 2**bits - 1
    assert (again["fc"](x) - exact).abs().max() > 0
    assert lt.inspect(tmp_path).tensors["layers/fc/alpha"] == ((64,), "float32")
    lt.save(again, tmp_path / "again", bits=bits)
    lt.load(again, tmp_path / "again", name="again")
    torch.testing.assert_close(again["fc"].loratory["again"].alpha, loaded.alpha)


def test_untrained_coefficients_stay_zero(tmp_path: Path):
    model, _ = adapted(moved=False, dtype=torch.float32)
    lt.save(model, tmp_path, bits=4)
    lt.detach(model)
    lt.load(model, tmp_path)
    assert not model["fc"].loratory["default"].beta.any()


def test_each_expert_has_a_scale_of_its_own(tmp_path: Path):
    from tests.laws.kinds import KINDS, Case

    case = Case(KINDS["experts"], lt.NOLA(rank=2, bases=5), ROW)
    model = case.moved()
    for t in adapters_of(model).values():
        t.beta.data[0] *= 1000
    lt.save(model, tmp_path, bits=8)
    again = case.plain()
    lt.load(again, tmp_path)
    for layer, t in adapters_of(model).items():
        assert (adapters_of(again)[layer].beta - t.beta)[1:].abs().max() <= t.beta[1:].abs().max() / 250


def test_codes_that_the_record_does_not_fit_are_refused(tmp_path: Path):
    model, _ = adapted(dtype=torch.float32)
    lt.save(model, tmp_path, bits=4)
    lt.detach(model)
    record = json.loads((tmp_path / "adapter.json").read_text())
    for change in ({"shape": [4]}, {"bits": 9}, {"dtype": "float33"}, {"shape": [2, 3]}):
        coded = {"layers/fc/alpha": record["coded"]["layers/fc/alpha"] | change}
        (tmp_path / "adapter.json").write_text(json.dumps(record | {"coded": record["coded"] | coded}))
        with pytest.raises(
            ValueError, match=r"adapter.json' holds codes of coefficients that .* does not have .*take another copy"
        ):
            lt.load(model, tmp_path)


def test_export_is_exact(tmp_path: Path):
    model, t = adapted(dtype=torch.float32)
    assert lt.export(model, tmp_path, to="peft") is None  # nothing was left out
    expected = t.method.delta(t)
    assert expected.norm() > 0.1
    again, _ = adapted(moved=False, dtype=torch.float32)
    lt.detach(again)
    lt.load(again, tmp_path)
    t = again["fc"].loratory["default"]
    torch.testing.assert_close(t.method.delta(t), expected)


def test_more_coefficients_than_entries_are_warned_of():
    model = nn.ModuleDict({"fc": nn.Linear(7, 9)})
    with pytest.warns(
        UserWarning, match="NOLA: k exceeds the number of entries of A or B in 1 layers, first 'fc'; use LoRA"
    ):
        lt.adapt(model, lt.NOLA(rank=2, bases=15), "fc")
    assert "use LoRA" in str(lt.summary(model))
    lt.adapt(model, lt.NOLA(rank=2, bases=14, bases_B=18), "fc", name="fits")  # rank in, out rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"bases": 0}, "bases is 0; it must be a positive integer"),
        ({"bases_B": 0}, "bases_B is 0; it must be a positive integer"),
        ({"bases": 6, "chunks": 4}, "chunks is 4, which does not divide the 6 bases; give a divisor or None"),
        ({"bases": 6, "bases_B": 8, "chunks": 3}, "chunks is 3, which does not divide the 8 bases"),
        ({"form": "vit"}, "form is 'vit'; it must be one of language, vision"),
        ({"basis": "disk"}, "basis is 'disk'; it must be one of seed, memory, file"),
        ({"form": "vision", "alpha": 8}, "alpha is 8.0, but the vision form's scale is 1 / rank; leave alpha out"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.NOLA(**options)


def test_bits_that_there_are_not_are_refused(tmp_path: Path):
    model, _ = adapted(dtype=torch.float32)
    for bits in (1, 9, 0):
        with pytest.raises(ValueError, match=f"bits is {bits}; it must be from 2 to 8"):
            lt.save(model, tmp_path / "n", bits=bits)
    with pytest.raises(TypeError, match=r"bits is 4\.0; it must be an integer from 2 to 8"):
        lt.save(model, tmp_path / "n", bits=4.0)
    with pytest.raises(TypeError, match="seed is 'x'; it must be an integer"):
        lt.NOLA(seed="x")
    lt.detach(model)
    lt.adapt(model, lt.LoRA(rank=2), "fc")
    with pytest.raises(
        ValueError, match=r"adapter 'default' \(LoRA\) has no coefficients that a file could hold in 4 bits"
    ):
        lt.save(model, tmp_path / "n", bits=4)
    assert not (tmp_path / "n").exists()
