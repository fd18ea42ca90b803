"""Vision sites: the body of a vision transformer, for methods that put virtual tokens among the patches of an image.

A method for such bodies has a field `tokens`, the number n of virtual tokens, and states

    inserted(t, block, x)  (batch, n, width)  rows put behind the class token of the block's input x (batch, length, width);
                                              after block 0 they take the places of those that came out of the block before,
                                              which stay where the method gives None

and `runtime/vision.py` keeps the contract, so that from outside the body looks as it did:

    positions  virtual tokens have none, and patches keep theirs
    outputs    those of virtual tokens are cut off behind the last block: hidden states are as long as without them
    training   while such an adapter is attached, the frozen body drops nothing (dropout, drop path), as in evaluation
"""

from typing import Any

import torch
from torch import Tensor, nn

from loratory.sites.block import parameters
from loratory.sites.body import BodySite

CLASS_TOKENS = ("cls_token", "class_embedding")  # names of a class token's parameter


class VisionSite(BodySite):
    """The body of a vision transformer (ViTModel, DeiTModel, Dinov2Model, CLIPVisionModel ...): a class token, patches, equal blocks."""

    @property
    def blocks(self) -> list[nn.Module]:
        return list(blocks_of(self.module).values())

    @property
    def width(self) -> int:
        return int(self.projection.weight.shape[0])

    @property
    def patch(self) -> int:
        """Numbers of one patch of an image: channels * height * width."""
        return self.projection.weight[0].numel()

    @property
    def projection(self) -> nn.Conv2d:
        """The layer that makes a row of each patch."""
        return next(m for m in self.module.modules() if isinstance(m, nn.Conv2d))

    @property
    def weight(self) -> Tensor:
        return self.projection.weight


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a vision transformer's body by name and in order, none where it has another form."""
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    for name, found in module.named_modules():
        if isinstance(found, nn.ModuleList) and len(found) == count and parameters(found[0])[:1] == ("hidden_states",):
            return {f"{name}.{i}": block for i, block in enumerate(found)}
    return {}


def find_vision(name: str, module: Any, generator: torch.Generator | None = None) -> VisionSite:
    """The vision site of a model's body, or an error that says why it has none."""
    called = f"'{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    if not reads_images(module):
        raise TypeError(
            f"{called} is no body of a transformers vision model (it takes no pixel_values); leave where= out to take the model's own, "
            "or use a method that acts on layers"
        )
    if hasattr(module, "out_features"):
        raise ValueError(
            f"{called} gives the feature maps of single blocks, in which virtual tokens have no place; adapt its layers with another method"
        )
    inside = [n for n, _ in module.named_parameters()]
    has_class = any(n.rpartition(".")[2] in CLASS_TOKENS for n in inside)
    patches = any(isinstance(m, nn.Conv2d) for m in module.modules())
    if not (has_class and patches and blocks_of(module)) or hasattr(module.config, "num_frames"):
        raise ValueError(
            f"{called} is no vision transformer with a class token, patches of one image and equal blocks, as virtual tokens need; adapt its "
            "layers with another method"
        )
    relative = [n for n, _ in module.named_modules() if "relative_position" in n]
    if relative:
        raise ValueError(
            f"{called} has a table of relative positions ('{relative[0]}'), in which virtual tokens have no row; adapt its layers with "
            "another method"
        )
    return VisionSite(name, module, generator)


def reads_images(module: Any) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "config") and "pixel_values" in parameters(module)
