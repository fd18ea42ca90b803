"""RandLoRA against the numbers of PEFT and of the authors' layer."""

import math

import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import pools_of
from tests.reference.test_lora import Net, put
from tests.reference.vectors import Vectors


def test_two_layers_share_bases():
    v = Vectors("randlora")
    r, alpha, options = v.settings["r"], v.settings["alpha"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    x, y = v.given("x"), v.given("y")
    for variant in ("dense", "sparse", "very_sparse"):
        net = Net(v)
        method = lt.RandLoRA(
            rank=r, alpha=alpha, bases=variant.replace("_", "-"), order="released", scaling="rank", seed=v.settings["prng_key"]
        )  # fmt: skip
        lt.adapt(net, method, ["fc1", "fc2"])
        pool = pools_of(net)["default"]
        pool.PA.copy_(v.given(f"{variant}.basis_A"))
        pool.PB.copy_(v.given(f"{variant}.basis_B"))
        adapters = {}
        for name in ("fc1", "fc2"):
            layer = net.get_submodule(name)
            v.compare(f"{variant}.{name}.gamma_start", layer.loratory["default"].gamma)
            t = adapters[name] = put(layer, lam=v.given(f"{variant}.{name}.lambda"))
            v.compare(f"{variant}.{name}.delta", t.method.delta(t))
        optimizer = optimizer_class(lt.trained(net).values(), **options)
        for step in range(v.settings["steps"]):
            out = net(x)
            loss = nn.functional.mse_loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                v.compare(f"{variant}.out", out)
                v.compare(f"{variant}.loss0", loss)
                for name, t in adapters.items():
                    v.compare(f"{variant}.{name}.grad_lambda", t.lam.grad)
                    v.compare(f"{variant}.{name}.grad_gamma", t.gamma.grad)
            optimizer.step()
        for name, t in adapters.items():
            v.compare(f"{variant}.{name}.lambda_end", t.lam)
            v.compare(f"{variant}.{name}.gamma_end", t.gamma)
        v.compare(f"{variant}.out_end", net(x))
    v.unused = {name for name in v.unused if not name.startswith("gpt2.")}
    v.finish()


def test_the_authors_layer():
    """Its weight is (D, d), used as x @ weight, and it has floor(d / r) + 1 bases."""
    v = Vectors("randlora")
    r, alpha = v.settings["r"], v.settings["alpha"]
    weight, x = v.given("gpt2.weight"), v.given("gpt2.x")
    net = nn.ModuleDict({"fc": nn.Linear(*weight.shape, bias=False)})
    net["fc"].weight = nn.Parameter(weight.T.contiguous())
    lt.adapt(net, lt.RandLoRA(rank=r, alpha=alpha, order="released"), "fc")
    pool = pools_of(net)["default"]
    basis_A, basis_B = v.given("gpt2.basis_A"), v.given("gpt2.basis_B")
    pool.PA, pool.PB = basis_A.permute(1, 0, 2).contiguous(), basis_B.permute(1, 0, 2).contiguous()
    lam, gamma = v.given("gpt2.lambda"), v.given("gpt2.gamma")
    n, d = gamma.shape
    assert n == d // r + 1
    t = put(net["fc"], lam=lam.T.contiguous(), gamma=torch.full((n, d), 1 / max(n, d)))
    v.compare("gpt2.gamma_start", t.gamma)
    v.compare("gpt2.scaling", torch.tensor(alpha / (r * math.sqrt(n))))
    put(net["fc"], gamma=gamma)
    v.compare("gpt2.delta", t.method.delta(t).T)
    out = net["fc"](x)
    v.compare("gpt2.out", out)
    out.square().mean().backward()
    v.compare("gpt2.grad_lambda", t.lam.grad.T)
    v.compare("gpt2.grad_gamma", t.gamma.grad)
    v.unused = {name for name in v.unused if name.startswith("gpt2.")}
    v.finish()
