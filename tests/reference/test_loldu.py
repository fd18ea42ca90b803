"""LoLDU against the numbers of its authors' code."""

import torch
from torch import nn

import loratory as lt
from loratory.ops.ldu import ldu
from tests.reference.test_lora import Net
from tests.reference.vectors import Vectors

LAYERS = ("fc1", "fc2")


def test_network():
    v = Vectors("loldu")
    rank, alpha, options = v.settings["rank"], v.settings["alpha"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    x, y = v.given("x"), v.given("y")
    plain = Net(v)
    v.compare("base.out", plain(x))
    s = alpha / rank
    for name in LAYERS:
        W = plain.get_submodule(name).weight.detach()
        order, L, D, U = ldu(W)
        P = torch.eye(len(W), dtype=W.dtype)[order].mT
        for letter, factor in zip("PLDU", (P, L, D, U), strict=True):
            v.compare(f"{name}.full.{letter}", factor)
        torch.testing.assert_close(P @ L @ torch.diag(D) @ U, W)
        v.compare(f"{name}.P", P)
        v.compare(f"{name}.L_r", L[:, :rank])
        v.compare(f"{name}.U_r", U[:rank])
        v.compare(f"{name}.residual", W - s * P @ L[:, :rank] @ torch.diag(D[:rank]) @ U[:rank])
        v.compare(f"{name}.scaling", torch.tensor(s))
    for start in sorted({name.split(".")[0] for name in v.tensors} - {"x", "y", "base", *LAYERS}):
        net = Net(v)
        lt.adapt(net, lt.LoLDU(rank=rank, alpha=alpha, start=start), list(LAYERS))
        adapters = {name: net.get_submodule(name).loratory["default"] for name in LAYERS}
        for name, t in adapters.items():
            v.compare(f"{start}.{name}.z_start", t.z)
        optimizer = optimizer_class(lt.trained(net).values(), **options)
        for step in range(v.settings["steps"]):
            out = net(x)
            loss = nn.functional.mse_loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                v.compare(f"{start}.out", out)
                v.compare(f"{start}.loss0", loss)
                for name, t in adapters.items():
                    v.compare(f"{start}.{name}.grad_z", t.z.grad)
            optimizer.step()
        v.compare(f"{start}.out_end", net(x))
        for name, t in adapters.items():
            v.compare(f"{start}.{name}.z_end", t.z)
        lt.merge(net, probe=x)
        for name in LAYERS:
            v.compare(f"{start}.{name}.merged_weight", net.get_submodule(name).weight)
    v.finish()
