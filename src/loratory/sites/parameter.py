"""Bare parameters: weights that code reads from a module by name, instead of calling a layer.

Expert stacks (one 3-D parameter for all experts), the fused q, k, v of torch.nn.MultiheadAttention, and whatever the user names.
There is no input to act on, so an adapter changes what is read: W' in place of W, computed when it is read.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loratory.sites.site import Site

# transformers' experts that do not say their own orientation (the others have `is_transposed`), by class name
EXPERTS = {
    "AriaGroupedExpertsGemm": "experts in out",
    "JetMoeParallelExperts": "experts out in",
    "Llama4TextExperts": "experts in out",
    "LongcatFlashExperts": "experts out in",
    "Step3p7Experts": "experts out in",
}
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Bare(NamedTuple):
    """A parameter `leaf` of a module, and what its axes are: "out in", "experts in out" and so on."""

    module: nn.Module
    leaf: str
    axes: str

    @property
    def tensor(self) -> Tensor:
        return self.module._parameters[self.leaf]  # type: ignore[return-value]


class ParameterSite(Site):
    """A bare parameter: W is a view of it with its stack axes first, then out, in. A rank is per stack entry."""

    kind = "parameter"
    called = False
    can_drop = False

    def __init__(self, name: str, bare: Bare, generator: torch.Generator | None = None) -> None:
        super().__init__(name, bare.module, generator)
        self.leaf, self.axes = bare.leaf, bare.axes
        words = bare.axes.split()
        stack = [i for i, word in enumerate(words) if word not in ("out", "in")]
        self._order = (*stack, words.index("out"), words.index("in"))
        self._back = tuple(self._order.index(i) for i in range(len(words)))

    @property
    def weight(self) -> Tensor:
        return self.module._parameters[self.leaf]

    @property
    def weight_name(self) -> str:
        return f"{self.name}.{self.leaf}" if self.is_whole else self.name

    @property
    def is_whole(self) -> bool:
        """Whether the layer is named after its module (an output projection that is never called), not after the parameter."""
        return self.name.rpartition(".")[2] != self.leaf

    @property
    def bias(self) -> Tensor | None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[i] for i in self._order)

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "*stack out in"]:
        return stored.permute(self._order)

    def stored(self, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return W.permute(self._back)

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        with torch.no_grad():
            self.weight.copy_(self.stored(W))

    def plus(self, B: Float[Tensor, "*stack out rank"], A: Float[Tensor, "*stack rank in"]) -> Tensor:
        """W + B A as the parameter is stored, in its precision and without a second tensor of its size."""
        B, A = B.to(self.dtype), A.to(self.dtype)
        W = self.weight
        left, right = (B, A) if self._order[-2] < self._order[-1] else (A.mT, B.mT)
        if W.dim() == 2:
            return torch.addmm(W, left, right)
        if W.dim() == 3 and self._order[0] == 0:
            return torch.baddbmm(W, left, right)
        return W + self.stored(B @ A)

    def apply(self, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return x @ W.mT.to(x.dtype)

    def down(self, x: Tensor, A: Float[Tensor, "*stack rank in"]) -> Tensor:
        return x @ A.mT

    def up(self, h: Tensor, B: Float[Tensor, "*stack out rank"]) -> Tensor:
        return h @ B.mT

    def along_out(self, v: Float[Tensor, "*stack out"]) -> Tensor:
        return v.unsqueeze(-2)

    def run(self, x: Tensor) -> Tensor:
        W: Tensor = getattr(self.module, self.leaf)
        return self.apply(x, W.permute(self._order))

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        end = self.name.split(".")[-1]
        raise ValueError(
            f"layer '{self.name}' is a bare parameter: its input is not seen, so dropout {p} cannot apply to it; "
            f"set per_layer={{'{end}': {{'dropout': 0.0}}}}, or leave the layer out with exclude="
        )


def known_axes(module: nn.Module) -> dict[str, str]:
    """The parameters of a module that are matrices to adapt, with their axes, where these are known."""
    own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
    if isinstance(module, nn.MultiheadAttention):
        return {leaf: "out in" for leaf in ATTENTION if leaf in own}
    stacks = [leaf for leaf, p in own.items() if p.dim() == 3]
    for cls in type(module).__mro__ if stacks else ():
        if cls.__module__.startswith("transformers.") and cls.__name__ in EXPERTS:
            return dict.fromkeys(stacks, EXPERTS[cls.__name__])
    transposed, experts = getattr(module, "is_transposed", None), getattr(module, "num_experts", None)
    if not isinstance(transposed, bool):
        return {}
    return {leaf: "experts in out" if transposed else "experts out in" for leaf in stacks if len(own[leaf]) == experts}


def check_axes(name: str, axes: object, tensor: Tensor) -> str:
    """The axes as one string: a word for each dimension, "out" and "in" among them."""
    words = axes.replace(",", " ").split() if isinstance(axes, str) else []
    if sorted(w for w in words if w in ("in", "out")) != ["in", "out"] or len(words) != tensor.dim():
        raise ValueError(
            f"parameters gives '{name}' the axes {axes!r}, but it is {tuple(tensor.shape)}; name each dimension once, with 'out' and 'in' "
            "for the two of the matrix and any word for a stack of them, for example 'out in' or 'experts in out'"
        )
    return " ".join(words)
