"""WaRA: its equivalences, ranks and padding."""

import dataclasses

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.ops.wavelet import matrix
from tests.laws.kinds import KINDS, Case, Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "WaRA": lt.WaRA(rank=max(1, (rank or 2) // 2), odd="pad"),
        "WaRA shared": lt.WaRA(bands="shared", rank=1, alpha=3, odd="pad"),
        "WaRA tiny": lt.WaRA(bands="tiny", rank=1, alpha=6, odd="pad"),
    },
    count=lambda site, rank: stacked(site) * 4 * (-(-site.inputs // 2) + -(-site.outputs // 2)),
)

TOKENS = Row(  # what is fed to the layers are 5 tokens
    made=lambda rank: {
        "WaRA tokens": lt.WaRA(bands="tokens", rank=rank, alpha=3, grid=(2, 2), class_tokens=1),
        "WaRA tokens, curved": lt.WaRA(bands="tokens", rank=rank, grid=(1, 5), odd="pad", activation="tanh", wavelet="haar"),
        "WaRA tokens, no gains": lt.WaRA(bands="tokens", rank=rank, grid=(2, 2), class_tokens=1, gains=False, activation="gelu"),
    },
    count=lambda site, rank: rank * (site.inputs + site.outputs) + 4,
    served=("Linear", "Conv1D of transformers"),
    refusal="is not a linear layer that is called with tokens",
)  # fmt: skip

PLANTED = [
    ("scale of tokens left out", "(s * t.B).to(dtype)", "t.B.to(dtype)"),
    ("gains left out", "act(c) * t.g[i] if self.gains", "act(c) if self.gains"),
    ("gain before the activation", "act(c) * t.g[i] if self.gains", "act(c * t.g[i]) if self.gains"),
    ("class tokens without activation", "[act(first), changed", "[first, changed"),
    ("class tokens last", "h.split([self.class_tokens, rows * columns], -2)", "h.split([rows * columns, self.class_tokens], -2)[::-1]"),
    ("grid of the other order", "unflatten(-1, (rows, columns))", "unflatten(-1, (columns, rows)).mT"),
    ("scale left out", "scale(self.alpha, low.shape[-2], False) * getattr", "getattr"),
    ("bands of the two sides exchanged", "for a, b in (", "for b, a in ("),
    ("one band of two", '("LL", "HH") if', '("LL",) if'),
    ("core transposed", "s * t.R,", "s * t.R.mT,"),
]  # fmt: skip


def delta(n_out, n_in, method, **fixed):
    model, t = adapted(nn.Linear(n_in, n_out, bias=False), method)
    W = model[0].weight.detach().clone()
    with torch.no_grad():
        for name, value in fixed.items():
            model[0].loratory["default"].tensors()[name].copy_(value)
            t[name] = value
    lt.merge(model, probe=torch.randn(2, n_in).double())
    return model[0].weight.detach() - W, t


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3"])
def test_separate_is_the_sum_over_bands(wavelet, levels):
    D, t = delta(8, 12, lt.WaRA(rank=2, alpha=6, wavelet=wavelet, levels=levels))

    def side(n, band, level):
        M = matrix(n, wavelet, band if level == 1 else "L")
        return M if level == 1 else side(n // 2, band, level - 1) @ M

    expected = torch.zeros(8, 12).double()
    names = [f"LL{levels}", *[f"{b}{level}" for level in range(1, levels + 1) for b in ("LH", "HL", "HH")]]
    assert set(t) == {f"{f}_{n}" for n in names for f in "AB"}
    for name in names:
        a, b, level = name[0], name[1], int(name[2])
        expected += 3 * side(8, a, level).T @ t[f"B_{name}"] @ t[f"A_{name}"] @ side(12, b, level)
    torch.testing.assert_close(D, expected)


def test_ranks_reach_four_and_two_times_the_rank():
    assert torch.linalg.matrix_rank(delta(16, 12, lt.WaRA(rank=2))[0]) == 8
    assert torch.linalg.matrix_rank(delta(16, 12, lt.WaRA(rank=2, bands="shared"))[0]) == 4
    D, t = delta(16, 12, lt.WaRA(ranks=(3, 0, 1, 0)))
    assert set(t) == {"A_LL1", "B_LL1", "A_HL1", "B_HL1"}
    assert torch.linalg.matrix_rank(D) == 4


def test_shared_haar_is_a_kronecker_product():
    M = torch.tensor([[1.0, 2], [3, 4]]).double()
    D, _ = delta(4, 4, lt.WaRA(rank=2, bands="shared", wavelet="haar"), B_all1=M, A_all1=torch.eye(2).double())
    expected = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2], [3, 0, 4, 0], [0, 3, 0, 4]]).double()
    torch.testing.assert_close(D, expected)


def test_tiny_trains_a_core_on_the_low_band_of_the_weight():
    layer = nn.Linear(12, 8, bias=False).double()
    L_out, L_in = matrix(8, "db2", "L"), matrix(12, "db2", "L")
    U, _, Vh = torch.linalg.svd(L_out @ layer.weight.detach() @ L_in.T)
    W, model = layer.weight.detach().clone(), nn.Sequential(layer)
    lt.adapt(model, lt.WaRA(bands="tiny", rank=2, alpha=4), "0")
    t = layer.loratory["default"]
    assert lt.summary(model).trained == 4
    with torch.no_grad():
        t.R.copy_(torch.tensor([[1.0, 2], [-3, 4]]))
    torch.testing.assert_close(t.U @ t.U.T, U[:, :2] @ U[:, :2].T)
    lt.merge(model, probe=torch.randn(2, 12).double())
    torch.testing.assert_close(layer.weight - W, 2 * L_out.T @ t.U @ t.R.detach() @ t.V @ L_in)
    torch.testing.assert_close(t.V.T @ t.V, Vh[:2].T @ Vh[:2])


def test_odd_sides_are_padded_with_zeros():
    D, t = delta(7, 9, lt.WaRA(rank=2, odd="pad"))
    whole = sum(
        matrix(8, "db2", a).T @ t[f"B_{a}{b}1"] @ t[f"A_{a}{b}1"] @ matrix(10, "db2", b) for a in "LH" for b in "LH"
    )
    torch.testing.assert_close(D, whole[:7, :9])


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("grid", "wavelet"), [((4, 6), "db2"), ((6, 2), "haar"), ((3, 5), "db2")])
def test_tokens_are_changed_band_by_band(grid, wavelet, activation):
    (h, w), c, act = grid, 2, torch.relu if activation == "relu" else lambda v: v
    layer = nn.Linear(5, 7).double()
    base, model = nn.Linear(5, 7).double(), nn.Sequential(layer)
    base.load_state_dict(layer.state_dict())
    options = {"rank": 3, "alpha": 6, "wavelet": wavelet, "grid": grid, "class_tokens": c, "odd": "pad"}
    lt.adapt(model, lt.WaRA(bands="tokens", activation=activation, **options), "0")
    t = layer.loratory["default"]
    with torch.no_grad():
        t.B.normal_()
        t.g.copy_(torch.tensor([1.0, -2, 0.5, 3]))
    x = torch.randn(2, c + h * w, 5).double()
    z = x @ t.A.T
    image = torch.zeros(2, h + h % 2, w + w % 2, 3).double()
    image[:, :h, :w] = z[:, c:].view(2, h, w, 3)
    changed = 0
    for g, (a, b) in zip(t.g, ("LL", "LH", "HL", "HH"), strict=True):
        R, C = matrix(h + h % 2, wavelet, a), matrix(w + w % 2, wavelet, b)
        band = torch.einsum("ih,jw,nhwr->nijr", R, C, image)
        changed = changed + torch.einsum("ih,jw,nijr->nhwr", R, C, g * act(band))
    z = torch.cat([act(z[:, :c]), changed[:, :h, :w].reshape(2, h * w, 3)], 1)
    torch.testing.assert_close(model(x), base(x) + 2 * z @ t.B.T)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3"])
def test_over_tokens_with_equal_gains_it_is_lora(wavelet):
    layer, x = nn.Linear(5, 7), torch.randn(3, 1 + 35, 5)
    model = nn.Sequential(layer)
    lt.adapt(
        model,
        lt.WaRA(bands="tokens", rank=2, grid=(5, 7), class_tokens=1, odd="pad", wavelet=wavelet),
        "0",
        name="wara",
    )
    lt.adapt(model, lt.LoRA(rank=2, alpha=2), "0", name="lora")
    wara, lora = layer.loratory["wara"], layer.loratory["lora"]
    with torch.no_grad():
        wara.B.normal_()
        lora.A.copy_(wara.A)
        lora.B.copy_(wara.B)
    expected = model(x)
    lt.use(model, "wara")
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        wara.g[3] = 0.5
    assert not torch.allclose(model(x)[:, 1:], expected[:, 1:])
    torch.testing.assert_close(model(x)[:, :1], expected[:, :1])


@pytest.mark.parametrize("kind", TOKENS.served)
@pytest.mark.parametrize("label", TOKENS.made(2))
def test_the_form_over_tokens_keeps_the_laws(label, kind, tmp_path):
    from tests.laws import test_laws as laws

    case = Case(KINDS[kind], TOKENS.made(2)[label], TOKENS)
    laws.test_function_is_unchanged_at_the_start(case)
    laws.test_gradients_reach_exactly_the_declared_tensors(case)
    laws.test_gradients_are_those_of_finite_differences(case)
    laws.test_save_and_load_give_the_same_bits(case, tmp_path)
    laws.test_two_adapters_do_not_disturb_each_other(case)
    laws.test_training_lowers_a_toy_loss(case)
    if case.method.gains:
        laws.test_stated_count_is_the_counted_one(case)
    x, model = case.inputs(), case.moved()
    full, base = model(x), case.plain()(x)
    lt.use(model, "default", mix=[0.5])
    with torch.no_grad():
        layers = [model[0], model[2]]
        h = torch.tanh(case.plain()[0](x))
        torch.testing.assert_close(layers[0](x), (case.plain()[0](x) + case.moved()[0](x)) / 2)
        torch.testing.assert_close(layers[1](h), (case.plain()[2](h) + case.moved()[2](h)) / 2)
    with lt.rows(model, ["default", None, "default", None]):
        y = model(x)
    torch.testing.assert_close(y, torch.stack([full[0], base[1], full[2], base[3]]))
    half = case.moved(torch.bfloat16)
    y = half(case.inputs(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert laws.close(y, full, 5e-2)


@pytest.mark.usefixtures("compiling")
def test_over_tokens_it_is_one_compiled_graph():
    case = Case(KINDS["Linear"], TOKENS.made(2)["WaRA tokens"], TOKENS)
    x, model = case.inputs(), case.moved()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_in_bfloat16_the_taps_are_not_rounded():
    model, x = nn.Sequential(nn.Linear(6, 6)).bfloat16(), torch.randn(1, 16, 6).bfloat16()
    lt.adapt(model, lt.WaRA(bands="tokens", rank=2, grid=(4, 4), wavelet="db3"), "0")
    t = model[0].loratory["default"]
    z = torch.randn(1, 16, 2).bfloat16()
    torch.testing.assert_close(t.method._over_grid(t, z, "0"), z.float())
    assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "experts", "bare parameter"])
def test_the_form_over_tokens_is_refused_on_other_layers(kind):
    from tests.laws.test_laws import test_other_layers_are_refused_and_left_alone as law

    bare = kind in ("experts", "bare parameter")
    refusal = "is a bare parameter, for which only a weight can be changed" if bare else TOKENS.refusal
    law(Case(KINDS[kind], TOKENS.made(2)["WaRA tokens"], dataclasses.replace(TOKENS, refusal=refusal)))


def test_the_form_over_tokens_has_no_weight(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 5, 6)
    lt.adapt(model, lt.WaRA(bands="tokens", rank=2, grid=(2, 2), class_tokens=1), "0")
    with pytest.raises(ValueError, match="layer '0': WaRA changes more than a weight, so it cannot be merged"):
        lt.merge(model, probe=x)
    with pytest.raises(ValueError, match="WaRA changes more than weights, which PEFT's format has no place for"):
        lt.export(model, tmp_path / "a", to="peft")
    with pytest.raises(ValueError, match="layer '0': WaRA changes more than a weight, so it has no update"):
        lt.export(model, tmp_path / "a", to="peft", rank=2)
    with pytest.raises(ValueError, match=r"layer '0' is given 4 tokens, but grid \(2, 2\) and 1 class tokens are 5"):
        model(x[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"ranks": (0, 0, 0, 0)}, "ranks is .*not all of them 0"),
        ({"ranks": (1, 2)}, "it must hold the ranks of LL, LH, HL and HH"),
        ({"ranks": (1, 1, 1, 1), "rank": 2}, "leave one of them out"),
        ({"bands": "all"}, "bands is 'all'; it must be one of separate, shared, tiny, tokens"),
        ({"bands": "tokens"}, r"needs to know how tokens stand: give grid=\(rows, columns\)"),
        ({"bands": "tokens", "grid": (4, 0)}, r"grid is \(4, 0\); it must be two positive integers"),
        ({"bands": "tokens", "grid": (4, 7)}, r"grid is \(4, 7\); both sides must be even"),
        ({"bands": "tokens", "grid": (4, 4), "class_tokens": -1}, "class_tokens is -1; it must be an integer"),
        ({"bands": "tokens", "grid": (4, 4), "gains": False}, "is exactly LoRA, whatever the wavelet"),
        ({"bands": "tokens", "grid": (4, 4), "levels": 2}, "levels is 2, but bands='tokens'"),
        (
            {"bands": "tokens", "grid": (4, 4), "activation": "sine"},
            "activation is 'sine'; it must be one of none, relu",
        ),
        ({"grid": (4, 4)}, "are for bands='tokens', but bands is 'separate'"),
        ({"bands": "shared", "levels": 2}, "levels is 2, but bands='shared'"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.WaRA(**options)


def test_names_of_wavelets():
    pytest.importorskip("pywt")
    with pytest.raises(ValueError, match="which is biorthogonal: its inverse is not its transpose"):
        lt.WaRA(wavelet="bior2.2")
    with pytest.raises(ValueError, match="wavelet is 'ricker'; it must be an orthogonal one"):
        lt.WaRA(wavelet="ricker")


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"layer '0': wavelet rank needs even in/out features \(got 51865 x 576\)"):
        lt.adapt(nn.Sequential(nn.Linear(51865, 576, device="meta")), lt.WaRA(), "0")
    with pytest.raises(ValueError, match=r"bands of 4 inputs and 3 outputs, so rank 4 is too large \(at most 3\)"):
        lt.adapt(nn.Sequential(nn.Linear(8, 6)), lt.WaRA(rank=4), "0")
