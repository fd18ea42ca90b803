"""NOLA against the numbers of the authors' layers."""

import math

import torch
from torch import nn

import loratory as lt
from loratory.ops.codes import coded, decoded
from tests.reference.test_lora import linear, put
from tests.reference.vectors import Vectors


def test_layers_and_codes():
    v = Vectors("nola")
    settings = v.settings
    r, k = settings["rank"], settings["num_basis"]
    options = dict(settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    x, y, W0 = v.given("x"), v.given("y"), v.given("W0")

    def adapted(**fields) -> nn.Module:
        net = nn.ModuleDict({"fc": linear(W0, None)})
        lt.adapt(net, lt.NOLA(rank=r, basis="memory", **fields), "fc")
        return net

    net = adapted(bases=k, alpha=settings["alpha"])
    t = net["fc"].loratory["default"]
    t.MA, t.MB, t.A0 = v.given("lang.basis_A"), v.given("lang.basis_B"), v.given("lang.A_frozen")
    assert not v.given("lang.B_frozen").any()
    out = net["fc"](x)
    v.compare("lang.start.out", out)
    nn.functional.mse_loss(out, y).backward()
    v.compare("lang.start.grad_alpha", t.alpha.grad)
    v.compare("lang.start.grad_beta", t.beta.grad)

    put(net["fc"], alpha=v.given("lang.alpha"), beta=v.given("lang.beta"))
    v.compare("lang.delta", t.method.delta(t))
    optimizer = optimizer_class(lt.trained(net).values(), **options)
    for step in range(settings["steps"]):
        out = net["fc"](x)
        optimizer.zero_grad()
        nn.functional.mse_loss(out, y).backward()
        if step == 0:
            v.compare("lang.out", out)
            v.compare("lang.grad_alpha", t.alpha.grad)
            v.compare("lang.grad_beta", t.beta.grad)
        optimizer.step()
    v.compare("lang.alpha_end", t.alpha)
    v.compare("lang.beta_end", t.beta)
    v.compare("lang.out_end", net["fc"](x))

    net = adapted(bases=settings["vis_ka"], bases_B=settings["vis_kb"], form="vision")
    t = net["fc"].loratory["default"]
    v.compare("vis.alpha_start", t.alpha)
    v.compare("vis.beta_start", t.beta)
    A, B = v.given("vis.basis_A").mT.contiguous(), v.given("vis.basis_B").mT.contiguous()
    for own, theirs in ((t.MA, A), (t.MB, B)):  # as wide as theirs
        assert own.shape == theirs.shape
        assert max(own.abs().max(), theirs.abs().max()) <= 1 / math.sqrt(own[0].numel())
    t.MA, t.MB = A, B
    out = net["fc"](x)
    v.compare("vis.out", out)
    nn.functional.mse_loss(out, y).backward()
    v.compare("vis.grad_alpha", t.alpha.grad)
    v.compare("vis.grad_beta", t.beta.grad)

    c = v.given("quant.c")
    for bits in settings["quant_bits"]:
        q, most = coded(c, bits)
        v.compare(f"quant{bits}.int", q.float())
        v.compare(f"quant{bits}.dequant", decoded(q, most, bits))
    v.finish()
