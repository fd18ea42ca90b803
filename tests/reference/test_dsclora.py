"""ConvLoRA and SPAN against the numbers of their authors' code."""

import torch
from torch import nn

import loratory as lt
from loratory.transforms.span import MEAN, RANGE, SPAB, SPAN, Conv3XC, fold
from tests.reference.vectors import Vectors


def convolution(v: Vectors, case: str) -> None:
    s, options = v.settings[case], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    options.pop("params")
    layer = nn.Conv2d(s["in_channels"], s["out_channels"], s["kernel"], s["stride"], s["padding"])
    layer.load_state_dict({"weight": v.given(f"{case}/W0"), "bias": v.given(f"{case}/bias")})
    x, y, model = v.given(f"{case}/x"), v.given(f"{case}/y"), nn.Sequential(layer)
    lt.adapt(model, lt.ConvLoRA(rank=s["r"], alpha=s["alpha"]), "0")
    t = layer.loratory["default"]
    with torch.no_grad():
        t.A.copy_(v.given(f"{case}/A_init"))
        t.B.copy_(v.given(f"{case}/B_init"))
    v.compare(f"{case}/out_init", model(x))
    optimizer = optimizer_class(lt.trained(model).values(), lr=s["lr"], **options)
    for step in range(1, s["steps"] + 1):
        loss = nn.functional.l1_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        v.compare(f"{case}/step{step}/loss", loss.reshape(1))
        v.compare(f"{case}/step{step}/grad_A", t.A.grad)
        v.compare(f"{case}/step{step}/grad_B", t.B.grad)
        optimizer.step()
        v.compare(f"{case}/step{step}/A", t.A)
        v.compare(f"{case}/step{step}/B", t.B)
    v.compare(f"{case}/out_final", model(x))
    lt.merge(model, probe=x)
    v.compare(f"{case}/W_merged", layer.weight)
    v.compare(f"{case}/out_merged", model(x))
    lt.unmerge(model)
    v.compare(f"{case}/W_unmerged", layer.weight)


def under(v: Vectors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): v.given(name) for name in v.tensors if name.startswith(prefix)}


def test_convolutions_block_and_network():
    v = Vectors("dsclora")
    for case in ("conv3", "conv1"):
        convolution(v, case)
    s = v.settings["span"]
    assert (s["gain"], s["img_range"], tuple(s["rgb_mean"])) == (2, RANGE, MEAN)
    block = SPAB(s["channels"])
    block.load_state_dict({n: p for n, p in under(v, "span/spab/").items() if "eval_conv" not in n})
    x = v.given("span/x")
    out, first, attention = block(x)
    v.compare("span/train_out", out)
    v.compare("span/train_out1", first)
    v.compare("span/train_att", attention)
    assert fold(block) == 3
    assert not any(isinstance(m, Conv3XC) for m in block.modules())
    v.compare("span/eval_out", block(x)[0])
    for i in (1, 2, 3):
        v.compare(f"span/fused/c{i}.weight", block.get_submodule(f"c{i}_r").weight)
        v.compare(f"span/fused/c{i}.bias", block.get_submodule(f"c{i}_r").bias)
    net = SPAN(s["channels"], s["scale"])
    assert fold(net) == 20
    net.load_state_dict({n.replace(".eval_conv", ""): p for n, p in under(v, "span/span/").items()})
    v.compare("span/span_sr", net(v.given("span/span_lr")))
    v.finish()
