"""SNELLA against the numbers of its authors' kernels and allocator."""

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.ops.kernel_matrix import at_start, kernel_matrix, size_quantile
from tests.reference.test_lora import linear
from tests.reference.vectors import Vectors

CASES = {  # settings, kernel, whether there is a threshold
    "klora": ("klora", "distance", False),
    "snell_p1": ("snell", "distance", True),
    "snell_p2": ("snell", "distance", True),
    "mixk": ("mixk", "mix", False),
    "snella": ("snella", "mix", True),
}
SCALARS = ("alpha", "gamma", "beta")
NAMES = {"In": "P", "Out": "Q"}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str, kept: bool):
    v = Vectors("snella")
    settings, kernel, sparse = CASES[case]
    s = v.settings[settings]
    ins, outs, q = s["in"], s["out"], s["q"]
    method = lt.SNELLA(
        rank=q, kernel=kernel, norm=v.settings["distance"][case], sparsify=sparse, sparsity=s.get("sparsity", 0.0), target=None,
        cache_delta=kept,
    )  # fmt: skip
    net = nn.ModuleDict({"a": linear(torch.zeros(outs, ins), None)})
    lt.adapt(net, method)
    t = net["a"].loratory["default"]
    for name, own in NAMES.items():
        start, points = v.given(f"{case}/{name}_init"), getattr(t, own)
        bound = (start.shape[1] * start.shape[2]) ** -0.5
        for drawn in (start, points.detach()):
            assert drawn.shape == start.shape
            assert 0 < float(drawn.abs().max()) <= bound
        points.data.copy_(v.given(f"{case}/{name}"))
    mixing = SCALARS if kernel == "mix" else ()
    for name in mixing:
        getattr(t, name).data.copy_(v.given(f"{case}/{name}"))
    K = kernel_matrix(t.P, t.Q, t.c, [getattr(t, name) for name in mixing], method.rule)
    v.compare(f"{case}/delta_dense_in_by_out", K)
    if sparse:
        v.compare(f"{case}/threshold", size_quantile(K.detach(), t.sparsity))
        v.compare(f"{case}/delta_sparse_in_by_out", method.delta(t).mT)
    else:
        torch.testing.assert_close(method.delta(t).mT, K)
    x, y = v.given(f"{case}/x").requires_grad_(), v.given(f"{case}/y")
    out = net["a"](x)
    loss = nn.functional.mse_loss(out, y)
    loss.backward()
    v.compare(f"{case}/out", out)
    v.compare(f"{case}/loss", loss.reshape(1))
    v.compare(f"{case}/grad_x", x.grad)
    for name, own in NAMES.items():
        v.compare(f"{case}/grad_{name}", getattr(t, own).grad)
    for name in mixing:
        v.compare(f"{case}/grad_{name}", getattr(t, name).grad)
    v.unused = {name for name in v.unused if name.startswith(f"{case}/")}
    v.finish()


def test_run():
    v = Vectors("snella")
    s = v.settings["train"]
    numbers = [str(i + 1) for i in range(len(s["dims"]) - 1)]
    net = nn.ModuleDict(
        {n: linear(v.given(f"train/init/w{n}.weight"), v.given(f"train/init/w{n}.bias")) for n in numbers}
    )
    method = lt.SNELLA(
        rank=s["q"], sparsity=s["init"], target=s["target"], importance_beta=s["b1"], uncertainty_beta=s["b2"],
        warmup_initial=s["warmup_initial"], warmup_final=s["warmup_final"], interval=s["interval"],
    )  # fmt: skip
    lt.adapt(net, method)
    layers = {n: net[n].loratory["default"] for n in numbers}
    for n, t in layers.items():
        assert tuple(t.shape) == (s["dims"][int(n)], s["dims"][int(n) - 1])
        for name, own in NAMES.items():
            getattr(t, own).data.copy_(v.given(f"train/init/d{n}.{name}_Qs"))
        for name, start in zip(SCALARS, at_start([t.alpha, t.gamma, t.beta]), strict=True):
            given = v.given(f"train/init/d{n}.{name}")
            assert torch.equal(given, start)
            getattr(t, name).data.copy_(given)
        coefficients = v.given(f"train/init/d{n}.shared_coeff_fc").flatten()
        torch.testing.assert_close(t.c, coefficients)
        t.c.copy_(coefficients)
    X, Y = v.given("train/X"), v.given("train/Y")

    def run(x: Tensor) -> Tensor:
        for n in numbers[:-1]:
            x = torch.tanh(net[n](x))
        return net[numbers[-1]](x)

    v.compare("train/out_init", run(X[0]))
    options = dict(s["optimizer"])
    cls, decay = getattr(torch.optim, options.pop("name")), options.pop("weight_decay")
    lr = options.pop("lr")
    options.pop("params")
    groups = lt.param_groups(net, lr=lr, weight_decay=decay)
    for group in groups:
        for name in group["names"]:
            assert group["weight_decay"] == (decay if name.rpartition("/")[2] in NAMES.values() else 0)
    optimizer = cls(groups, lr=lr, **options)
    epochs, iters = s["epochs"], s["iters"]
    drive = lt.drive(net, optimizer, steps=epochs * iters, epoch_steps=iters)
    (_, progress), *_ = drive.runs.values()
    entries = [t.shape[0] * t.shape[1] for t in layers.values()]
    sparsity, volumes, scores, losses = [], [], [torch.zeros(len(layers))], []
    for epoch in range(epochs):
        volume, shared_out = method.volume(epoch, epochs, entries)
        if epoch:
            found = torch.tensor(method.scores(progress)) if shared_out else scores[-1]
            scores.append(found)
        volumes.append([float(volume), float(shared_out and epoch > 0)])
        sparsity.append(torch.cat([t.sparsity.clone() for t in layers.values()]))
        for i in range(iters):
            loss = nn.functional.mse_loss(run(X[i]), Y[i])
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            if epoch == 0 and i in s["state_iterations"]:
                for n, t in layers.items():
                    for name, own in NAMES.items():
                        v.compare(f"train/it{i}/d{n}.{name}_Qs", getattr(t, own))
                        state = optimizer.state[getattr(t, own)]
                        v.compare(f"train/it{i}/d{n}.ipt_avg_{name}", state["importance"])
                        v.compare(f"train/it{i}/d{n}.unc_avg_{name}", state["uncertainty"])
                    for name in SCALARS:
                        v.compare(f"train/it{i}/d{n}.{name}", getattr(t, name))
    tables = {
        "sparsity": torch.stack(sparsity),
        "volume_and_flag": torch.tensor(volumes),
        "scores": torch.stack(scores),
    }
    for name, table in tables.items():
        v.compare(f"train/{name}_per_epoch", table.to(v.tensors[f"train/{name}_per_epoch"].dtype))
    v.compare("train/losses", torch.stack(losses))
    v.compare("train/out_final", run(X[0]))
    for n, t in layers.items():
        for name, own in NAMES.items():
            v.compare(f"train/final/d{n}.{name}_Qs", getattr(t, own))
        for name in SCALARS:
            v.compare(f"train/final/d{n}.{name}", getattr(t, name))
    v.unused = {name for name in v.unused if name.startswith("train/")}
    v.finish()
