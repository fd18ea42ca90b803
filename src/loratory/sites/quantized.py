"""Quantised layers as sites: ours, those of bitsandbytes and those of torchao, found by their class without importing either.

Reading unpacks the weight anew, writing rounds it. The base product keeps no unpacked weight for the backward pass.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loratory.ops.recomputed import recomputed_linear
from loratory.sites.embedding import EmbeddingSite
from loratory.sites.linear import LinearSite
from loratory.sites.packed import PackedEmbedding, PackedLinear
from loratory.sites.site import Site

Base = Callable[[Tensor], Tensor]


class Quantized(Site):
    """What all quantised layers share: the tensors that hold the weight, and their bits as a snapshot."""

    rounds = True
    rounds_inputs: ClassVar[bool] = False  # its product quantises the input too
    drifts: ClassVar[bool] = False  # the library may round the scales when the layer first runs

    @property
    @abstractmethod
    def packing(self) -> str:
        """What the weight is stored as, in a word."""

    @abstractmethod
    def pieces(self) -> list[Tensor]:
        """The tensors that hold the weight."""

    def snapshot(self) -> Tensor:
        return torch.cat([_bytes(t) for t in self.pieces()])

    def restore(self, kept: Tensor) -> None:
        stored = self.pieces()
        with torch.no_grad():
            for t, part in zip(stored, kept.split([t.numel() * t.element_size() for t in stored]), strict=True):
                t.copy_(part.clone().view(t.dtype).view(t.shape))

    def read_snapshot(self, kept: Tensor) -> Float[Tensor, "*stack out in"]:
        now = self.snapshot()
        self.restore(kept)
        try:
            return self.read()
        finally:
            self.restore(now)

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.pieces())

    @property
    def device(self) -> torch.device:
        return self.pieces()[0].device


class QuantizedLinear(Quantized, LinearSite):
    """A quantised linear layer."""

    def product(self, x: Tensor) -> Tensor:
        return recomputed_linear(x, lambda rows: self.read()[rows], None, self.outputs)

    def low_rank(self, x: Tensor, base: Base, A: Tensor, B: Tensor, u: Tensor | None, scale: float = 1.0) -> Tensor:
        return Site.low_rank(self, x, base, A, B, u, scale)  # the fused form keeps the weight


class PackedSite(Quantized):
    """Our own layers: nf4, int8, and the formats of GGUF files."""

    @property
    def packing(self) -> str:
        return self.module.packing

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def pieces(self) -> list[Tensor]:
        return list(self.module.stored().values())


class PackedLinearSite(PackedSite, QuantizedLinear):
    """PackedLinear."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.module.outputs, self.module.inputs)

    def read(self) -> Float[Tensor, "*stack out in"]:
        return self.module.weight

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        self.module.write(W)

    def product(self, x: Tensor) -> Tensor:
        return self.module.product(x)


class PackedEmbeddingSite(PackedSite, EmbeddingSite):
    """PackedEmbedding."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.module.inputs, self.module.outputs)

    def read(self) -> Float[Tensor, "*stack out in"]:
        return self.module.weight.t()

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        self.module.write(W.t())


class Bnb4Site(QuantizedLinear):
    """bitsandbytes' Linear4bit: nf4 or fp4, with or without double quantisation."""

    drifts = True

    @property
    def packing(self) -> str:
        return f"bitsandbytes {self._state().quant_type}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._state().shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._state().dtype

    def pieces(self) -> list[Tensor]:
        state = self._state()
        return [self.module.weight.data, state.absmax] + ([state.offset, state.state2.absmax] if state.nested else [])

    def read(self) -> Float[Tensor, "*stack out in"]:
        from bitsandbytes.functional import dequantize_4bit

        state = self._state()
        return dequantize_4bit(self.module.weight.data, state).view(self.shape)

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        from bitsandbytes.functional import quantize_4bit

        state = self._state()
        data, new = quantize_4bit(
            W.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self.module.weight.dtype,
        )
        stored = [data, new.absmax] + ([new.offset, new.state2.absmax] if state.nested else [])
        with torch.no_grad():
            for old, tensor in zip(self.pieces(), stored, strict=True):
                old.copy_(tensor.view(old.shape))

    def _state(self) -> Any:
        """The quantiser's state, after switching off the path for inference on some CPUs: it reorders the weight, rounds its scales
        to bfloat16 for good and keeps no gradient.
        """
        weight = self.module.weight
        if getattr(weight, "quant_state", None) is None:
            raise RuntimeError(
                f"layer '{self.name}' is not quantised yet: bitsandbytes does that when the model is moved; call model.to(device) first"
            )
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            self.module.quant_state = weight.quant_state
        if getattr(self.module, "support_avx512bf16_for_cpu", False):
            self.module.support_avx512bf16_for_cpu = False
        return weight.quant_state


class Bnb8Site(QuantizedLinear):
    """bitsandbytes' Linear8bitLt: int8 with one scale a row."""

    packing = "bitsandbytes int8"  # type: ignore[assignment]
    rounds_inputs = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.bias is None else self.bias.dtype

    def pieces(self) -> list[Tensor]:
        weight, state = self.module.weight, self.module.state
        scales = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
        if weight.dtype != torch.int8 or scales is None:
            raise RuntimeError(
                f"layer '{self.name}' is not quantised yet: bitsandbytes does that when the model is moved; call model.to(device) first"
            )
        return [weight.data, scales]

    def read(self) -> Float[Tensor, "*stack out in"]:
        codes, scales = self.pieces()
        return codes.to(self.dtype) * (scales.to(self.dtype) / 127).unsqueeze(1)

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        largest = W.abs().amax(1)
        codes, scales = self.pieces()
        with torch.no_grad():
            scales.copy_(largest)
            codes.copy_((W * (127 / largest.where(largest > 0, 1)).unsqueeze(1)).round())


class TorchaoSite(QuantizedLinear):
    """A torch.nn.Linear whose weight is one of torchao's quantised tensors."""

    @property
    def packing(self) -> str:
        w = self.module.weight
        return f"torchao {type(w).__name__} {getattr(w, 'target_dtype', None) or self.pieces()[0].dtype}"

    @property
    def own_forward(self) -> Base | None:
        """torchao unpacks the weight and lets autograd keep it; ours does not. None for a subclass with a forward of its own."""
        return self._forward if type(self.module).__mro__[1] is nn.Linear else None

    def _forward(self, x: Tensor) -> Tensor:
        return recomputed_linear(x, lambda rows: self.read()[rows], self.bias, self.outputs)

    def pieces(self) -> list[Tensor]:
        w = self.module.weight.data
        names, _ = w.__tensor_flatten__()
        return [t for name in names if isinstance(t := getattr(w, name), Tensor)]

    def read(self) -> Float[Tensor, "*stack out in"]:
        return self.module.weight.data.dequantize()

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        w = self.module.weight.data
        W = W.to(w.dtype)
        if type(w).__name__ == "IntxUnpackedToInt8Tensor":
            new = type(w).from_hp(W, w.block_size, w.target_dtype)
        elif type(w).__name__ == "Int8Tensor":
            from torchao.quantization.granularity import PerRow

            if list(w.block_size) != [1, W.shape[1]]:
                self._refuse()
            new = type(w).from_hp(W, PerRow())
        else:
            self._refuse()
        names, _ = w.__tensor_flatten__()
        fresh = [t for name in names if isinstance(t := getattr(new, name), Tensor)]
        with torch.no_grad():
            for old, tensor in zip(self.pieces(), fresh, strict=True):
                old.copy_(tensor)

    def _refuse(self) -> None:
        raise TypeError(
            f"layer '{self.name}' is stored as {self.packing}, which can only be read; writable are torchao's int8 weights with a scale "
            "a row and its intx weights: keep the adapter unmerged, or write a full-precision model with "
            "loratory.export(model, folder, dequantize=True)"
        )


QUANTIZED: dict[tuple[str, str], type[Quantized]] = {  # (package, class) -> site
    ("bitsandbytes", "Linear4bit"): Bnb4Site,
    ("bitsandbytes", "Linear8bitLt"): Bnb8Site,
    ("loratory", PackedEmbedding.__name__): PackedEmbeddingSite,
    ("loratory", PackedLinear.__name__): PackedLinearSite,
}


def quantized_site_class(module: nn.Module) -> type[Quantized] | None:
    """The site class of a quantised layer; None for all others."""
    for cls in type(module).__mro__:
        found = QUANTIZED.get((cls.__module__.split(".")[0], cls.__name__))
        if found is not None:
            return found
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and type(weight).__module__.split(".")[0] == "torchao":
        return TorchaoSite
    return None


def quantized_sites(model: nn.Module) -> dict[str, Quantized]:
    """The quantised layers of a model by name, those that share a module under each of its names."""
    return {
        name: cls(name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if (cls := quantized_site_class(module)) is not None
    }


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
