"""WaRA against PyWavelets' transforms."""

import torch
from torch import nn

import loratory as lt
from loratory.ops.wavelet import analyse, matrix, synthesise
from tests.reference.vectors import Vectors

BANDS = {"cA": "LL", "cH": "HL", "cV": "LH", "cD": "HH"}  # output side, input side


def delta(method: lt.Method, out: int, inputs: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W' - W of a layer whose weight is zero."""
    layer = nn.Linear(inputs, out, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    lt.adapt(model, method, "0")
    found = layer.loratory["default"].tensors()
    assert set(found) == set(tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            found[name].copy_(tensor)
    x = torch.eye(inputs).double()
    forward = model(x).T
    lt.merge(model, probe=x)
    torch.testing.assert_close(layer.weight, forward)
    return layer.weight.detach()


def on_grid(image: torch.Tensor, wavelet: str, band: int) -> torch.Tensor:
    """What WaRA over tokens adds to an image with one feature, where A and B are 1 and the gains 0 but for one band's."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False).double())
    nn.init.zeros_(model[0].weight)
    method = lt.WaRA(bands="tokens", rank=1, wavelet=wavelet, grid=tuple(image.shape))
    lt.adapt(model, method, "0")
    t = model[0].loratory["default"]
    with torch.no_grad():
        t.A.fill_(1)
        t.B.fill_(1)
        t.g.zero_()[band] = 1
        return model(image.reshape(1, -1, 1)).view(image.shape)


def test_transforms_and_products():
    v = Vectors("wara")
    for case, s in v.settings["cases"].items():
        out, inputs, wavelet, rank = s["out"], s["in"], s["wavelet"], s["r"]
        assert s["mode"] == "periodization"
        W = v.given(f"{case}/dwt2/W")
        for name, (a, b) in BANDS.items():
            v.compare(f"{case}/dwt2/{name}", analyse(analyse(W, wavelet, b).mT, wavelet, a).mT)
        for name, (a, b) in BANDS.items():  # W as a grid of tokens with one feature, one band let through
            y = on_grid(W, wavelet, ("LL", "LH", "HL", "HH").index(a + b))
            v.compare(f"{case}/dwt2/{name}", analyse(analyse(y, wavelet, b).mT, wavelet, a).mT)
        for side, n in (("out", out), ("in", inputs)):
            for band in "LH":
                v.compare(f"{case}/mat/{band}_{side}", matrix(n, wavelet, band))
                torch.testing.assert_close(
                    synthesise(torch.eye(n // 2).double(), wavelet, band), matrix(n, wavelet, band)
                )
        B, A = v.given(f"{case}/per_band/B"), v.given(f"{case}/per_band/A")
        tensors = {}
        for i, band in enumerate(BANDS.values()):
            tensors |= {f"A_{band}1": A[i], f"B_{band}1": B[i]}
        v.compare(f"{case}/per_band/idwt2", delta(lt.WaRA(rank=rank, wavelet=wavelet), out, inputs, tensors))
        shared = {"A_all1": v.given(f"{case}/shared/A"), "B_all1": v.given(f"{case}/shared/B")}
        D = delta(lt.WaRA(bands="shared", rank=rank, wavelet=wavelet), out, inputs, shared)
        X = v.given(f"{case}/shared/X")
        v.compare(f"{case}/shared/Y", D @ X)
        M, Y = shared["B_all1"] @ shared["A_all1"], torch.zeros(out, s["tokens"]).double()
        for a in "LH":  # the product on all four bands of X
            for b in "LH":
                c = M @ analyse(analyse(X.mT, wavelet, a).mT, wavelet, b)
                Y += synthesise(synthesise(c, wavelet, b).mT, wavelet, a).mT
        v.compare(f"{case}/shared/Y", Y)
    v.finish()
