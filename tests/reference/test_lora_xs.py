"""LoRA-XS against the numbers of its authors' code."""

import torch
from torch import nn

import loratory as lt
from tests.reference.test_lora import Net, put
from tests.reference.vectors import Vectors


def same_vectors(v: Vectors, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The sign of each row that turns the found vectors into the expected ones, after checking that they are the same."""
    sign = (found * expected).sum(1).sign()
    limit = v.about["tolerance"]["factors"]["rtol"]
    error = (found * sign[:, None] - expected).abs().amax(1) / expected.abs().amax(1)
    assert bool((error <= limit).all()), error
    return sign


def test_network():
    v = Vectors("lora-xs")
    alpha, r, options = v.settings["alpha"], v.settings["r"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    net, x, y = Net(v), v.given("x"), v.given("y")
    v.compare("base.out", net(x))
    lt.adapt(net, lt.LoRAXS(rank=r, alpha=alpha), ["fc1", "fc2"])
    assert alpha / r == v.settings["scaling"]
    adapters = {}
    for name in ("fc1", "fc2"):
        layer = net.get_submodule(name)
        v.compare(f"{name}.svd_exact", torch.linalg.svdvals(layer.weight))
        t, A, B = layer.loratory["default"], v.given(f"{name}.A"), v.given(f"{name}.B")
        assert torch.equal(same_vectors(v, t.A, A), same_vectors(v, t.B.T, B.T))
        t.A, t.B = A, B
        adapters[name] = put(layer, R=v.given(f"{name}.R_start"))
    v.compare("start.out", net(x))
    for name, t in adapters.items():
        t.R = nn.Parameter(v.given(f"{name}.R"))
    optimizer = optimizer_class([t.R for t in adapters.values()], **options)
    for step in range(v.settings["steps"]):
        out = net(x)
        loss = nn.functional.mse_loss(out, y)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            v.compare("out", out)
            v.compare("loss0", loss)
            for name, t in adapters.items():
                v.compare(f"{name}.grad_R", t.R.grad)
                v.compare(f"{name}.delta", t.method.delta(t))
        optimizer.step()
    for name, t in adapters.items():
        v.compare(f"{name}.R_end", t.R)
    v.compare("out_end", net(x))
    v.finish()
