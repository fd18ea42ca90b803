"""LaMDA's released form and released freezing rule against the numbers of its authors' code."""

import torch
from torch import nn

import loratory as lt
from tests.reference.test_lora import Net, put
from tests.reference.vectors import Vectors


def test_network():
    v = Vectors("lamda")
    s, options = v.settings, dict(v.settings["optimizer"])
    assert s["alpha"] / s["r"] == s["scaling"]
    assert s["grad_accumulation"] == 1
    net, x, y = Net(v), v.given("x"), v.given("y")
    method = lt.LaMDA(rank=s["r"], alpha=s["alpha"], eta=s["eta"], start="released", schedule="released")
    lt.adapt(net, method, ["fc1", "fc2"])
    adapters = {}
    for name in ("fc1", "fc2"):
        t = put(net.get_submodule(name), S=v.given(f"{name}.S"), B=v.given(f"{name}.B"))
        t.A.copy_(v.given(f"{name}.A"))
        adapters[name] = t
    optimizer_class = getattr(torch.optim, options.pop("name"))
    out = net(x)
    loss = nn.functional.mse_loss(out, y)
    loss.backward()
    v.compare("out", out)
    v.compare("loss0", loss)
    for name, t in adapters.items():
        v.compare(f"{name}.grad_S", t.S.grad)
        v.compare(f"{name}.grad_B", t.B.grad)
    optimizer = optimizer_class([p for t in adapters.values() for p in (t.S, t.B)], **options)
    drive = lt.drive(net, optimizer, steps=s["max_steps"])
    (_, run), counts = drive.runs["default"], []
    for _ in range(s["max_steps"]):
        optimizer.zero_grad()
        counts.append(run.kept["columns"]["fc1"])
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    v.compare("frozen_columns", torch.tensor(counts))
    for name, t in adapters.items():
        v.compare(f"{name}.S_end", t.S)
        v.compare(f"{name}.B_end", t.B)
    v.compare("out_end", net(x))
    v.finish()
