"""MoS against the numbers of its authors' functions."""

import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of, pools_of
from tests.reference.vectors import Vectors


class Stack(nn.Module):
    def __init__(self, v: Vectors) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for k in range(v.settings["num_blocks"]):
            block = nn.ModuleDict()
            for p, (inputs, outputs) in v.settings["projections"].items():
                block[p] = nn.Linear(inputs, outputs, bias=False)
                block[p].weight = nn.Parameter(v.given(f"block{k}.{p}.W0"))
            self.blocks.append(block)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = h + block["down"](torch.tanh(block["up"](h)))
        return h


def test_stack():
    v = Vectors("mos")
    r, e, p, parts = (v.settings[key] for key in "repl")
    blocks, options = v.settings["num_blocks"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    net, x, y = Stack(v), v.given("x"), v.given("y")
    lt.adapt(net, lt.MoS(rank=r, budget=e, private=p, shards=parts, alpha=v.settings["alpha"]))
    assert v.settings["alpha"] / r == v.settings["scaling"]
    pool, public = pools_of(net)["default"], (e - p) * blocks * parts
    held = {f"{name}.{side}": f"blocks-*-{name}-{side}" for name in v.settings["projections"] for side in "AB"}
    with torch.no_grad():
        for key, tensor in held.items():
            name, side = key.split(".")
            getattr(pool, tensor).copy_(v.given(f"{name}.pool_{side}"))
    for layer_name, layer in layers_of(net).items():
        _, k, name = layer_name.split(".")
        t = layer["default"]
        for side, index in (("A", t.ia), ("B", t.ib)):
            stored = v.given(f"block{k}.{name}.idx_{side}")
            own = torch.arange(p * parts) + public + int(k) * p * parts
            for each in (stored, index):
                assert len(each) == r * parts
                assert torch.equal(each[(r - p) * parts :], own)
                drawn = each[: (r - p) * parts].tolist()
                assert len(set(drawn)) == len(drawn)
                assert max(drawn, default=-1) < public
            index.copy_(stored)
        B, A = t.method.factors(t)
        v.compare(f"block{k}.{name}.A", A)
        v.compare(f"block{k}.{name}.B", B / v.settings["scaling"])
    optimizer = optimizer_class(lt.trained(net).values(), **options)
    for step in range(v.settings["steps"]):
        out = net(x)
        loss = nn.functional.mse_loss(out, y)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            v.compare("out", out)
            v.compare("loss0", loss)
            for key, tensor in held.items():
                name, side = key.split(".")
                v.compare(f"{name}.grad_pool_{side}", getattr(pool, tensor).grad)
        optimizer.step()
    for key, tensor in held.items():
        name, side = key.split(".")
        v.compare(f"{name}.pool_{side}_end", getattr(pool, tensor))
    v.compare("out_end", net(x))
    v.finish()
