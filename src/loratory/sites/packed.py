"""Frozen layers whose weight stays packed: nf4 and int8 (ours, see `ops.blockwise`) and the block formats of GGUF files.

The packed tensors are parameters without gradient, so that two layers can share them (a tied head) and moves keep the tie.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loratory.ops import blockwise, ggml
from loratory.ops.recomputed import recomputed_linear


class Packing(NamedTuple):
    """A way to store a matrix. unpack(tensors, rows, in) gives chosen rows in float32; pack is None where there is no way back."""

    unpack: Callable[[Mapping[str, Tensor], slice | Tensor, int], Tensor]
    pack: Callable[[Tensor], dict[str, Tensor]] | None


def _of_gguf(name: str) -> Packing:
    def unpack(stored: Mapping[str, Tensor], rows: slice | Tensor, columns: int) -> Tensor:
        return ggml.unpack(name, stored["blocks"][rows])

    def pack(W: Tensor) -> dict[str, Tensor]:
        return {"blocks": ggml.pack(name, W)}

    return Packing(unpack, pack if ggml.FORMATS[name].pack is not None else None)


QUANTISERS = ("nf4", "int8")  # what lt.quantize offers; the others come out of files
PACKINGS: dict[str, Packing] = {
    "nf4": Packing(blockwise.unpack_nf4, blockwise.pack_nf4),
    "int8": Packing(blockwise.unpack_int8, blockwise.pack_int8),
    **{name: _of_gguf(name) for name in ggml.FORMATS},
}


class Packed(nn.Module):
    """A matrix (outputs, inputs) stored in a packing; `dtype` is what reading it gives, and follows `model.to`."""

    like: Tensor

    def __init__(self, packing: str, stored: Mapping[str, Tensor], inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.packing, self.inputs = packing, inputs
        for name, tensor in stored.items():
            self.register_parameter(
                name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
        self.names = tuple(stored)
        device = next(iter(stored.values())).device
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def outputs(self) -> int:
        return self.stored()[self.names[0]].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def weight(self) -> Tensor:
        """The whole weight, unpacked anew at every reading; products do not need it."""
        return self.read(slice(None))

    def stored(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def read(self, rows: slice | Tensor) -> Tensor:
        """Chosen rows of the weight."""
        return PACKINGS[self.packing].unpack(self.stored(), rows, self.inputs).to(self.dtype)

    def write(self, W: Tensor) -> None:
        """Round W into the packed tensors, in place."""
        pack = PACKINGS[self.packing].pack
        if pack is None:
            able = ", ".join(name for name, each in PACKINGS.items() if each.pack is not None)
            raise TypeError(
                f"a weight stored as {self.packing} cannot be written, only read; writable are {able}: keep the adapter unmerged, "
                "or write a full-precision model with loratory.export(model, folder, dequantize=True)"
            )
        with torch.no_grad():
            for name, tensor in pack(W.float()).items():
                getattr(self, name).copy_(tensor)

    def shares(self, other: nn.Module) -> bool:
        """Whether another packed layer reads the same tensors."""
        return isinstance(other, Packed) and all(
            getattr(self, name) is getattr(other, name, None) for name in self.names
        )

    def share(self, other: "Packed") -> None:
        """Read another packed layer's tensors from now on."""
        for name in self.names:
            setattr(self, name, getattr(other, name))

    def part(self) -> None:
        """Take copies of the packed tensors, so that nothing else shares them."""
        for name in self.names:
            setattr(self, name, nn.Parameter(getattr(self, name).clone(), requires_grad=False))


class PackedLinear(Packed):
    """A frozen linear layer: y = x W^T + bias, with W unpacked piece by piece for the product and again in the backward pass."""

    def __init__(
        self, packing: str, stored: Mapping[str, Tensor], inputs: int, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(packing, stored, inputs, dtype)
        self.bias: Tensor | None
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return self.inputs

    @property
    def out_features(self) -> int:
        return self.outputs

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T."""
        return recomputed_linear(x, self.read, None, self.outputs)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return recomputed_linear(x, self.read, self.bias, self.outputs)

    def extra_repr(self) -> str:
        return f"in_features={self.inputs}, out_features={self.outputs}, bias={self.bias is not None}, packing={self.packing}"


class PackedEmbedding(Packed):
    """A frozen embedding table, of which only the rows that are looked up are unpacked."""

    scale_grad_by_freq = False
    max_norm = None

    def __init__(
        self, packing: str, stored: Mapping[str, Tensor], inputs: int, padding_idx: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(packing, stored, inputs, dtype)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.outputs

    @property
    def embedding_dim(self) -> int:
        return self.inputs

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(ids.reshape(-1)).view(*ids.shape, self.inputs)

    def extra_repr(self) -> str:
        return f"{self.outputs}, {self.inputs}, packing={self.packing}"


def pack_linear(layer: nn.Linear, packing: str) -> PackedLinear:
    """A linear layer with its weight packed; the layer itself is not changed."""
    pack: Any = PACKINGS[packing].pack
    W = layer.weight.detach()
    return PackedLinear(packing, pack(W), W.shape[1], layer.bias, W.dtype).train(layer.training)
