"""The body of a vision transformer as a site."""

import pytest
import torch

from loratory.sites import VisionSite, find_vision
from tests.laws.bodies import VISION


@pytest.mark.parametrize("name", VISION)
def test_what_a_site_tells(name):
    model = VISION[name]()
    body = model if name == "DINOv3" else model.base_model  # whose base_model is its encoder
    site = find_vision("body", body)
    assert isinstance(site, VisionSite)
    assert (site.kind, site.shape, site.patch) == ("block", (16,), 3 * 4 * 4)
    assert len(site.blocks) == 3
    assert len({type(block) for block in site.blocks}) == 1
    with pytest.raises(ValueError, match="'body' is the body of a model, which has no matrix"):
        site.read()


def other_bodies():
    from transformers import (
        BeitConfig,
        BeitModel,
        Dinov2Backbone,
        Dinov2Config,
        ResNetConfig,
        ResNetModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        SwinConfig,
        SwinModel,
        VivitConfig,
        VivitModel,
    )

    patches = {"image_size": 8, "patch_size": 4}
    blocks = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    swin = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    resnet = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    film = {"image_size": 8, "num_frames": 2, "tubelet_size": [2, 4, 4]}
    form = "is no vision transformer with a class token, patches of one image and equal blocks"
    return {
        "windows": (SwinModel, SwinConfig(**swin), form),
        "convolutions": (ResNetModel, ResNetConfig(**resnet), form),
        "no class token": (SiglipVisionModel, SiglipVisionConfig(**patches, **blocks, intermediate_size=8), form),
        "film": (VivitModel, VivitConfig(**film, **blocks, intermediate_size=8), form),
        "backbone": (Dinov2Backbone, Dinov2Config(**patches, **blocks), "gives the feature maps of single blocks"),
        "relative positions": (
            BeitModel,
            BeitConfig(**patches, **blocks, intermediate_size=8, use_relative_position_bias=True),
            r"has a table of relative positions \('layers.0",
        ),
    }


@pytest.mark.parametrize(
    "name", ["windows", "convolutions", "no class token", "film", "backbone", "relative positions"]
)
def test_bodies_of_other_forms_are_refused(name):
    cls, config, message = other_bodies()[name]
    with torch.device("meta"):
        model = cls(config)
    with pytest.raises(
        ValueError, match=rf"the model \({cls.__name__}\) {message}.*adapt its layers with another method"
    ):
        find_vision("", model)
