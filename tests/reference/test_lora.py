"""LoRA, rsLoRA, DoRA and the merged projection against the numbers of their authors' code."""

import torch
from torch import nn

import loratory as lt
from tests.reference.vectors import Vectors


class Net(nn.Module):
    def __init__(self, v: Vectors) -> None:
        super().__init__()
        self.fc1 = linear(v.given("base.fc1.weight"), v.given("base.fc1.bias"))
        self.fc2 = linear(v.given("base.fc2.weight"), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def put(module: nn.Module, **tensors: torch.Tensor) -> lt.Method:
    """Give an adapted layer these tensors; returns the holder of its tensors."""
    adapter = module.loratory["default"]
    for name, value in tensors.items():
        setattr(adapter, name, nn.Parameter(value))
    return adapter


def test_single_layers():
    v = Vectors("lora")
    alpha = v.settings["alpha"]

    net = Net(v)
    lt.adapt(net, lt.LoRA(alpha=alpha), where="fc1")
    t = put(net.fc1, A=v.given("fc1.A"), B=v.given("fc1.B"))
    x = v.given("x").requires_grad_()
    out = net.fc1(x)
    out.square().sum().backward()
    v.compare("loralib.linear.out", out)
    v.compare("loralib.linear.gradA", t.A.grad)
    v.compare("loralib.linear.gradB", t.B.grad)
    v.compare("loralib.linear.gradx", x.grad)

    holder = nn.ModuleDict({"qkv": linear(v.given("loralib.merged.weight"), v.given("loralib.merged.bias"))})
    lt.adapt(holder, lt.MergedLoRA(groups=v.settings["merged_groups"], alpha=alpha), where="qkv")
    t = put(holder["qkv"], A=v.given("loralib.merged.lora_A"), B=v.given("loralib.merged.lora_B"))
    out = holder["qkv"](v.given("x"))
    out.square().sum().backward()
    v.compare("loralib.merged.out", out)
    v.compare("loralib.merged.gradA", t.A.grad)
    v.compare("loralib.merged.gradB", t.B.grad)

    table = v.given("loralib.embedding.weight")
    holder = nn.ModuleDict({"embed": nn.Embedding.from_pretrained(table)})
    lt.adapt(holder, lt.LoRA(alpha=alpha), where="embed")
    t = put(holder["embed"], A=v.given("loralib.embedding.lora_A"), B=v.given("loralib.embedding.lora_B"))
    out = holder["embed"](v.given("loralib.embedding.ids"))
    out.square().sum().backward()
    v.compare("loralib.embedding.out", out)
    v.compare("loralib.embedding.gradA", t.A.grad)
    v.compare("loralib.embedding.gradB", t.B.grad)

    v.unused = {name for name in v.unused if name.startswith("loralib.")}  # the others belong to the test below
    v.finish()


def test_trained_network():
    v = Vectors("lora")
    alpha, options = v.settings["alpha"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    variants = {
        "plain": lt.LoRA(alpha=alpha),
        "rslora": lt.LoRA(alpha=alpha, rslora=True),
        "dora": lt.DoRA(alpha=alpha),
        "rsdora": lt.DoRA(alpha=alpha, rslora=True),
    }
    x, y = v.given("x"), v.given("y")
    for variant, method in variants.items():
        net = Net(v)
        lt.adapt(net, method, where=["fc1", "fc2"])
        adapters = {}
        for name in ("fc1", "fc2"):
            layer = net.get_submodule(name)
            if isinstance(method, lt.DoRA):
                v.compare(f"{variant}.{name}.m_start", layer.loratory["default"].m)
            adapters[name] = put(layer, A=v.given(f"{name}.A"), B=v.given(f"{name}.B"))
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
                    for tensor in t.tensors():
                        v.compare(f"{variant}.{name}.grad{tensor}", getattr(t, tensor).grad)
            optimizer.step()
        v.compare(f"{variant}.out_end", net(x))
        for name, t in adapters.items():
            for tensor in t.tensors():
                v.compare(f"{variant}.{name}.{tensor}_end", getattr(t, tensor))
        lt.merge(net, probe=x)
        for name in adapters:
            v.compare(f"{variant}.{name}.merged_weight", net.get_submodule(name).weight)
    v.unused = {name for name in v.unused if not name.startswith("loralib.")}
    v.finish()
