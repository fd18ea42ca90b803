"""LoCA against the numbers of its authors' operator and schedule."""

import torch
from torch import nn

import loratory as lt
from loratory.ops.dct import cosine_delta
from tests.reference.test_lora import linear
from tests.reference.vectors import Vectors


class Late(Vectors):
    """Iterations after `early_until` are compared at the tolerance `late`."""

    def _rule(self, name: str) -> dict:
        rule = super()._rule(name)
        number = name.split("/")[0].removeprefix("it")
        if number.isdigit() and int(number) > self.settings["early_until"]:
            return rule | {"tolerance": "late"}
        return rule


def test_operator():
    v = Late("loca")
    a, location = v.given("op/coef").requires_grad_(), v.given("op/loc").requires_grad_()
    G = v.given("op/upstream_grad")
    D = cosine_delta(a, location, *G.shape)
    D.backward(G)
    v.compare("op/delta", D)
    v.compare("op/grad_coef", a.grad)
    v.compare("op/grad_loc", location.grad)
    v.unused = {name for name in v.unused if name.startswith("op/")}
    v.finish()


def test_schedule():
    v = Late("loca")
    s, options = v.settings, dict(v.settings["optimizer"])
    net = nn.ModuleDict(
        {"a": linear(v.given("base/a.weight"), v.given("base/a.bias")), "b": linear(v.given("base/b.weight"), None)}
    )
    x, y = v.given("x"), v.given("y")

    def run() -> torch.Tensor:
        return net["b"](torch.tanh(net["a"](x)))

    counts = dict(zip("ab", s["n_frequency"], strict=True))
    method = lt.LoCA(scale=s["scale"], location_steps=s["learn_location_iter"], n_frequency=counts["a"])
    lt.adapt(net, method, ["a", "b"], per_layer={"b": {"n_frequency": counts["b"]}})
    layers = {name: net[name].loratory["default"] for name in "ab"}
    for name, t in layers.items():
        t.u.data.copy_(v.given(f"init/{name}.loc"))
    v.compare("out_init", run())
    cls = getattr(torch.optim, options.pop("name"))
    coefficients, places = ({"params": [getattr(t, n) for t in layers.values()], "lr": options.pop(lr)} for n, lr in (("a", "lr_coef"), ("u", "lr_loc")))  # fmt: skip
    options.pop("params")
    optimizer = cls([coefficients, places], **options)
    lt.drive(net, optimizer, steps=max(s["steps"], s["learn_location_iter"]))
    losses, phases = [], []
    for step in range(s["steps"]):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(run(), y)
        loss.backward()
        losses.append(loss.detach())
        phases.append(layers["a"].phase.clone())
        for name, t in layers.items():
            if step in s["kept_iterations"]:
                trained = ("grad_spec", t.a.grad) if t.phase[0] else ("grad_loc", t.u.grad)
                v.compare(f"it{step}/{name}.{trained[0]}", trained[1])
        optimizer.step()
        for name, t in layers.items():
            if step in s["kept_iterations"]:
                v.compare(f"it{step}/{name}.spec", t.a)
                v.compare(f"it{step}/{name}.loc", t.u)
    v.compare("losses", torch.stack(losses))
    v.compare("phase", torch.stack(phases).to(v.tensors["phase"].dtype))
    v.compare("out_final", run())
    for name, t in layers.items():
        v.compare(f"delta_final/{name}", t.method.delta(t))
        sides = torch.tensor([net[name].out_features - 1, net[name].in_features - 1]).unsqueeze(1)
        v.compare(f"final_int_loc/{name}", (t.u.clamp(0, 0.999) * sides).round().long())
    v.unused = {name for name in v.unused if not name.startswith("op/")}
    v.finish()
