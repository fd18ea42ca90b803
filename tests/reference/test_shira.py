"""SHiRA against PEFT's."""

import torch
from torch import nn

import loratory as lt
from tests.reference.vectors import Vectors


class Net(nn.Module):
    def __init__(self, v: Vectors) -> None:
        super().__init__()
        inputs, hidden, out = v.settings["dims"]
        self.a, self.b = nn.Linear(inputs, hidden), nn.Linear(hidden, out, bias=False)
        self.load_state_dict({n: v.given(f"base/{n}") for n in ("a.weight", "a.bias", "b.weight")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_network():
    v = Vectors("shira")
    s, options = v.settings, dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    options.pop("params")
    x, y, net = v.given("x"), v.given("y"), Net(v)
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    v.compare("base_loss", loss.reshape(1))
    seen = lt.collect(net, [x], lambda model, batch: nn.functional.mse_loss(model(batch), y), {"gradient"})
    for name in "ab":
        gradient = seen.of(name).gradient * len(x)  # collected for each row of a batch
        v.compare(f"dense_grad/{name}.weight", gradient)
        torch.testing.assert_close(gradient, net.get_submodule(name).weight.grad)
    net.zero_grad()
    untouched = net(x).detach()
    lt.adapt(net, lt.SHiRA(rank=s["r"]), ["a", "b"])
    adapters = {name: net.get_submodule(name).loratory["default"] for name in "ab"}
    for name, t in adapters.items():
        rows, columns = v.given(f"indices/{name}")
        assert t.v.numel() == s["nnz"][name]
        t.places.copy_(rows * t.shape[1] + columns)
        mask = torch.zeros(t.shape).flatten()
        mask[t.places.long()] = 1
        v.compare(f"mask/{name}", mask.view(t.shape))
    v.compare("out_init", net(x))
    torch.testing.assert_close(net(x), untouched)
    optimizer = optimizer_class([t.v for t in adapters.values()], **options)
    for step in range(1, s["steps"] + 1):
        loss = nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        v.compare(f"step{step}/loss", loss.reshape(1))
        if step in s["grad_steps"]:
            for name, t in adapters.items():
                v.compare(f"step{step}/grad_{name}", t.v.grad)
        optimizer.step()
        for name, t in adapters.items():
            v.compare(f"step{step}/w_{name}", t.v)
    for name, t in adapters.items():
        v.compare(f"delta/{name}", t.method.delta(t))
    v.compare("out_final", net(x))
    lt.use(net, "default", mix=[s["half_scale"]])
    v.compare("out_scale_half", net(x))
    lt.use(net, "default")
    lt.merge(net, probe=x)
    for name in "ab":
        v.compare(f"merged/{name}.weight", net.get_submodule(name).weight)
    v.compare("out_merged", net(x))
    v.finish()
