"""Small bases in every quantised kind: ours always, those of other libraries where they are installed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.sites.packed import pack_linear
from tests.laws.kinds import KINDS, Case, Row
from tests.laws.table import TABLE
from tests.methods.test_wara import TOKENS

WIDTH = 64


class Net(nn.Module):
    """Two layers under a nonlinearity, and a plain one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))


def inputs() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2))


def ours(packing: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net().eval()
        for name in ("first", "second"):
            setattr(net, name, pack_linear(net.get_submodule(name), packing))
        return net

    return make


def bnb4(double: bool) -> nn.Module:
    nn_of = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    net = Net().eval()
    for name in ("first", "second"):
        old: Any = net.get_submodule(name)
        new = nn_of.Linear4bit(old.in_features, old.out_features, old.bias is not None, torch.float32, double, "nf4")
        new.load_state_dict(old.state_dict())
        setattr(net, name, new.to("cpu").eval())
    return net


def bnb8() -> nn.Module:
    nn_of = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    net = Net().eval()
    for name in ("first", "second"):
        old: Any = net.get_submodule(name)
        new = nn_of.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        setattr(net, name, new.to("cpu").eval())
    return net


def torchao(bits: int) -> nn.Module:
    q = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerGroup

    net = Net().eval()
    config = q.Int8WeightOnlyConfig() if bits == 8 else q.IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32))
    q.quantize_(net, config, lambda module, name: name in ("first", "second"))
    return net


WRITABLE: dict[str, Callable[[], nn.Module]] = {
    **{name: ours(name) for name in ("nf4", "int8", "BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "bitsandbytes int8": bnb8,
    "bitsandbytes nf4": lambda: bnb4(False),
    "bitsandbytes nf4 double": lambda: bnb4(True),
    "torchao int4": lambda: torchao(4),
    "torchao int8": lambda: torchao(8),
}
METHODS: dict[str, lt.Method] = {
    "lora": lt.LoRA(rank=3, alpha=5),
    "lora dropout": lt.LoRA(rank=3, dropout=0.2),
    "dora": lt.DoRA(rank=3, alpha=5),
    "dora dropout": lt.DoRA(rank=3, dropout=0.2),
    "lamda": lt.LaMDA(rank=3, alpha=5),
}
WHERE = ("first", "second")
FORMS: dict[str, tuple[Row, lt.Method]] = {  # with another path through the layer than those of their rows
    "LoCA sparse": (TABLE["loca"], lt.LoCA(n_frequency=16, dct_mode="sparse")),
    "LoRA-SB projected": (TABLE["lora-sb"], lt.LoRASB(rank=2, alpha=3, gradient="projected")),
    "LoRA-XS projected": (TABLE["lora-xs"], lt.LoRAXS(rank=2, alpha=3, gradient="projected")),
    "SALT diagonal": (TABLE["salt"], lt.SALT(ratio=0.4, rank=2, relu="diagonal")),
    "SHiRA products": (TABLE["shira"], lt.SHiRA(mask="snip", fraction=0.25, accumulate="abs")),
    "SNELLA dropped": (TABLE["snella"], lt.SNELLA(rank=4, sparsity=0.3, dropout=0.2, drop_path=0.2)),
    "TLoRA of low rank": (TABLE["tlora"], lt.TLoRA(rank=2, residual="lora")),
}
LINEAR_CASES: dict[str, Case] = {  # every method for linear layers, on the small network of the laws
    label: Case(KINDS["Linear"], method, row)
    for row in (*TABLE.values(), TOKENS)
    if "Linear" in row.served
    for label, method in row.made(KINDS["Linear"].rank).items()
} | {label: Case(KINDS["Linear"], method, row) for label, (row, method) in FORMS.items()}


def move(model: nn.Module, size: float = 0.1) -> None:
    """Take the trained tensors away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += size * torch.randn(p.shape, generator=generator)
