"""Kinds of layers, with a small network for each, and what a method promises about them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.runtime.layer import Layer, layers_of
from loratory.sites import Site


class Kind(NamedTuple):
    layers: Callable[[], dict[str, nn.Module]]  # the network, layer by layer; `first` and `second` are adapted
    inputs: Callable[[], Tensor]
    where: tuple[str, ...] = ("first", "second")
    rank: int | None = 2
    parameters: dict[str, str] | None = None  # of adapt; `where` is then left out


class Experts(nn.Module):
    """Expert stacks in transformers' form, with every expert used: `kernel` gives the product over an indexed or a whole stack."""

    def __init__(self, is_transposed: bool, whole: bool) -> None:
        super().__init__()
        self.is_transposed, self.num_experts, self.whole = is_transposed, 3, whole
        up, down = (3, 8, 6), (3, 6, 4)  # (experts, out, in)
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(0.4 * torch.randn(e, i, o) if is_transposed else 0.4 * torch.randn(e, o, i))
            for e, o, i in (up, down)
        )

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(x[..., :3], -1)
        if self.whole:
            up, down = (W if self.is_transposed else W.mT for W in (self.gate_up_proj, self.down_proj))
            gate, h = (x.unsqueeze(-3) @ up).chunk(2, -1)
            return ((torch.tanh(gate) * h) @ down * share.mT.unsqueeze(-1)).sum(-3)
        y = torch.zeros_like(x)
        for e in range(3):
            up, down = (W[e] if self.is_transposed else W[e].mT for W in (self.gate_up_proj, self.down_proj))
            gate, h = (x @ up).chunk(2, -1)
            y = y + (torch.tanh(gate) * h) @ down * share[..., e : e + 1]
        return y


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(
            6, 3
        )  # odd heads, tokens first: torch then runs one path, whoever needs gradients

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.4 * torch.randn(6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


def experts(is_transposed: bool, whole: bool) -> Kind:
    return Kind(
        lambda: {"first": Experts(is_transposed, whole), "act": nn.Tanh()},
        lambda: torch.randn(2, 5, 6),
        where=("first.gate_up_proj", "first.down_proj"),
    )


def conv(cls: type[nn.Module], *size: int, **options: Any) -> Kind:
    def layers() -> dict[str, nn.Module]:
        groups = options.get("groups", 1)
        last = cls(6, 6, 3, groups=groups, padding=1, bias=False)
        return {"first": cls(6, 6, 3, **options), "act": nn.Tanh(), "second": last}

    rank = 1 if options.get("groups") == 6 else 2
    return Kind(layers, lambda: torch.randn(3, 6, *size), rank=rank)


def transposed() -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    layers = {"first": Conv1D(12, 9), "act": nn.Tanh(), "second": Conv1D(6, 12)}
    for name in ("first", "second"):
        nn.init.normal_(layers[name].weight, std=0.3)
        nn.init.normal_(layers[name].bias)
    return layers


KINDS: dict[str, Kind] = {
    "Linear": Kind(
        lambda: {"first": nn.Linear(9, 12), "act": nn.Tanh(), "second": nn.Linear(12, 6, bias=False)},
        lambda: torch.randn(4, 5, 9),
    ),
    "Conv1D of transformers": Kind(transposed, lambda: torch.randn(4, 5, 9)),
    "Embedding": Kind(
        lambda: {"first": nn.Embedding(15, 12, padding_idx=0), "act": nn.Tanh(), "head": nn.Linear(12, 6)},
        lambda: torch.arange(16).remainder(14).add(1).reshape(4, 4),
        where=("first",),
    ),
    "Conv1d": conv(nn.Conv1d, 9),
    "Conv1d strided, circular": conv(nn.Conv1d, 9, stride=2, padding=2, padding_mode="circular"),
    "Conv2d": conv(nn.Conv2d, 7, 6),
    "Conv2d grouped": conv(nn.Conv2d, 7, 6, groups=2),
    "Conv2d depthwise": conv(nn.Conv2d, 7, 6, groups=6),
    "Conv2d strided, dilated": conv(nn.Conv2d, 9, 8, stride=(2, 1), dilation=2, padding=(2, 1)),
    "Conv2d same": conv(nn.Conv2d, 7, 6, padding="same"),
    "Conv2d reflect": conv(nn.Conv2d, 7, 6, padding=1, padding_mode="reflect"),
    "Conv2d replicate": conv(nn.Conv2d, 7, 6, padding=1, padding_mode="replicate"),
    "Conv3d": conv(nn.Conv3d, 4, 5, 4, padding=1),
    "Conv3d grouped": conv(nn.Conv3d, 4, 5, 4, groups=3, stride=2, padding=2),
    "experts": experts(is_transposed=False, whole=False),
    "experts transposed": experts(is_transposed=True, whole=True),
    "MultiheadAttention": Kind(
        lambda: {"first": SelfAttention(), "act": nn.Tanh()},
        lambda: torch.randn(2, 5, 6),
        where=("first.mha.in_proj_weight", "first.mha.out_proj"),
    ),
    "bare parameter": Kind(
        lambda: {"first": Kernel(), "act": nn.Tanh(), "second": nn.Linear(9, 4)},
        lambda: torch.randn(2, 5, 6),
        parameters={"first.kernel": "in out"},
    ),
}
EVERY = tuple(KINDS)
LINEAR = ("Linear", "Conv1D of transformers", "MultiheadAttention", "bare parameter")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method promises; each test file of a method holds its own as ROW."""

    made: Callable[[int | None], dict[str, lt.Method]]  # rank -> instances to test, by label
    count: Callable[[Site, int], int]  # trained numbers of a layer, by the formula of the docstring
    served: tuple[str, ...] = EVERY  # kinds of layers; the others must be refused
    refusal: str = ""  # message of the refusal
    sloped: tuple[str, ...] | None = None  # tensors whose gradient is the slope of the loss; None: all
    slope: Callable[[lt.Method], float] = lambda _: 1.0  # of a method: its gradient over the slope
    clipped: tuple[str, ...] = ()  # tensors whose gradient is clipped, so that those of single rows do not add up
    stepped: tuple[str, ...] | None = None  # tensors that the first optimizer step moves; None: all
    far: float = 0.2  # deviation of the changes that take the trained tensors away from their start
    start: float | Callable[[lt.Method], float] = (
        1e-6  # how far the function may be from the base's at the start, relative to its range
    )


def stacked(site: Site) -> int:
    return torch.Size(site.stack).numel()


class Case(NamedTuple):
    """One cell of the table: a method on a kind of layer."""

    kind: Kind
    method: lt.Method
    row: Row

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network before anything is attached; the same weights at every call."""
        torch.manual_seed(1)
        return nn.Sequential(OrderedDict(self.kind.layers())).to(dtype).eval()

    def attach(self, model: nn.Module, name: str = "default") -> None:
        place = {"where": self.kind.where} if self.kind.parameters is None else {"parameters": self.kind.parameters}
        options: dict[str, Any] = dict(place)
        if self.method.needs:
            x = self.inputs(next(model.parameters()).dtype)
            options["seen"] = lt.collect(model, [x], square, self.method.needs, **place)
        lt.adapt(model, self.method, name=name, **options)

    def adapted(self, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Sequential:
        model = self.plain(dtype)
        self.attach(model, name)
        return model

    def moved(self, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Sequential:
        """Adapted, and its trained tensors away from their start."""
        model = self.adapted(dtype, name)
        move(model, far=self.row.far)
        return model

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(2)
        x = self.kind.inputs()
        return x.to(dtype) if x.is_floating_point() else x


def square(model: nn.Module, x: Tensor) -> Tensor:
    """A loss without labels."""
    return (model(x) ** 2).sum()


def move(model: nn.Module, seed: int = 3, far: float = 0.2) -> None:
    """Change every trained tensor of the active adapters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += (far * torch.randn(p.shape, generator=generator)).to(p.dtype)


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, Any]:
    return {layer: holder[name] for layer, holder in layers_of(model).items() if name in holder}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "loratory" not in k}


def layer_of(model: nn.Module, name: str) -> Layer:
    return layers_of(model)[name]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
