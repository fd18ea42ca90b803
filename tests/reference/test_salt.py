"""SALT against the numbers of its authors' code."""

from typing import Any

import torch
from torch import Tensor, nn

import loratory as lt
from tests.reference.vectors import Vectors


def adapted(v: Vectors, group: str, layer: Any, **options: Any) -> tuple[nn.Sequential, Any]:
    """The layer with a SALT adapter in the stored basis."""
    layer.weight, layer.bias = nn.Parameter(v.given(f"{group}/W0")), nn.Parameter(v.given(f"{group}/bias"))
    model = nn.Sequential(layer)
    lt.adapt(model, lt.SALT(regularizer=v.settings["reg_multiplier"], decay=True, **options), "0")
    t = layer.loratory["default"]
    v.compare(f"{group}/S", t.S)
    torch.testing.assert_close(t.U @ torch.diag(t.S) @ t.V, layer.weight.detach().flatten(1), rtol=1e-4, atol=1e-5)
    U, V = v.given(f"{group}/U"), v.given(f"{group}/Vt")
    t.U, t.V, t.S = U, V, torch.diagonal(U.T @ layer.weight.detach().flatten(1) @ V.T).clone()
    return model, t


def put(v: Vectors, t: Any, group: str) -> None:
    for name in "ABXY":
        setattr(t, name, nn.Parameter(v.given(f"{group}/{name}")))


def measured(v: Vectors, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(x)
    reg = lt.penalty(model) / v.settings["reg_multiplier"]
    return out, reg, nn.functional.mse_loss(out, y) + lt.penalty(model)


def test_linear_layer():
    v = Vectors("salt")
    about, options = v.settings["lin2"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    trained = [name.strip() for name in options.pop("params").split(",")]
    layer = nn.Linear(about["in_features"], about["out_features"])
    model, t = adapted(v, "lin2", layer, ratio=about["ratio_salt"], rank=about["r_lora"])
    x, y = v.given("lin2/x"), v.given("lin2/y")
    v.compare("lin2/k", torch.tensor([float(t.A.numel())]).to(v.tensors["lin2/k"].dtype))
    t.X, t.Y = nn.Parameter(v.given("lin2/X_init")), nn.Parameter(v.given("lin2/Y_init"))
    out, reg, _ = measured(v, model, x, y)
    v.compare("lin2/out_init", out)
    v.compare("lin2/reg_init", reg.reshape(v.tensors["lin2/reg_init"].shape))
    optimizer = optimizer_class([getattr(t, name) for name in trained], **options)
    for step in range(1, v.settings["steps"] + 1):
        optimizer.zero_grad()
        loss = measured(v, model, x, y)[2]
        loss.backward()
        v.compare(f"lin2/step{step}/loss", loss.reshape(v.tensors[f"lin2/step{step}/loss"].shape))
        for name in trained:
            v.compare(f"lin2/step{step}/grad_{name}", getattr(t, name).grad)
        optimizer.step()
        for name in trained:
            v.compare(f"lin2/step{step}/{name}", getattr(t, name))
    out, reg, _ = measured(v, model, x, y)
    v.compare("lin2/out_final", out)
    v.compare("lin2/reg_final", reg.reshape(v.tensors["lin2/reg_final"].shape))
    v.compare("lin2/core_before_relu", t.method.core(t))
    v.compare("lin2/W_eff", t.method.weight(t, layer.weight.detach()))

    put(v, t, "gen2")
    x.requires_grad_()
    out, reg, loss = measured(v, model, x, y)
    loss.backward()
    for name, found in (("out", out), ("reg", reg), ("loss", loss), ("grad_x", x.grad)):
        v.compare(f"gen2/{name}", found.reshape(v.tensors[f"gen2/{name}"].shape))
    for name in "ABXY":
        v.compare(f"gen2/grad_{name}", getattr(t, name).grad)

    about = v.settings["conv1"]
    conv = nn.Conv2d(about["cin"], about["cout"], about["kernel"], padding=about["padding"])
    model, t = adapted(v, "conv1", conv, top=about["rank"], rank=about["r_lora"])
    put(v, t, "conv1")
    x = v.given("conv1/x").requires_grad_()
    out, reg, loss = measured(v, model, x, v.given("conv1/y"))
    loss.backward()
    for name, found in (("out", out), ("reg", reg), ("loss", loss), ("grad_x", x.grad)):
        v.compare(f"conv1/{name}", found.reshape(v.tensors[f"conv1/{name}"].shape))
    for name in "ABXY":
        v.compare(f"conv1/grad_{name}", getattr(t, name).grad)
    v.finish()
