"""What is peculiar to visual prompt tuning: its start, shallow and deep against the formula in a loop, dropout, bad input."""

import math

import pytest
import torch

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.bodies import PATCHES, PIXELS, VISION, VISION_METHODS, BodyRow, Case, outputs, vit
from tests.laws.kinds import move


def count(method, site):
    depth = PATCHES["num_hidden_layers"] if method.deep else 1
    if method.hidden:
        return (depth * method.tokens + site.width) * method.hidden + site.width
    return depth * method.tokens * site.width


ROW = BodyRow(
    made={"VPT": VISION_METHODS["VPT"]},
    count=count,
    bodies=VISION,
    variants={label: method for label, method in VISION_METHODS.items() if label != "VPT"},
)
PLANTED = [
    ("shallow prompts renewed", "if block and not self.deep:", "if block and self.deep:"),
    ("prompts of the first block everywhere", "P = t.P[block]", "P = t.P[0]"),
    ("bound without the patch", "6 / (site.patch + width)", "6 / width"),
    ("bound of one channel", "site.patch + width", "site.patch // 3 + width"),
    ("layer's outputs in place of its inputs", "math.sqrt(2 / site.width)", "math.sqrt(2 / width)"),
    ("layer without its bias", "t.E[block] @ t.W.T + t.b", "t.E[block] @ t.W.T + 0 * t.b"),
    ("one dropout mask for all images", "F.dropout(P.expand(x.shape[0], -1, -1), self.dropout, t.training)",
     "F.dropout(P, self.dropout, t.training).expand(x.shape[0], -1, -1)"),
    ("dropout outside training", "self.dropout, t.training)", "self.dropout, True)"),
]  # fmt: skip


def adapter(model, method, **options):
    lt.adapt(model, method, **options)
    ((_, layer),) = layers_of(model).items()
    return layer["default"]


def by_hand(model, prompts):
    """Logits of ViTForImageClassification with prompts [block], each (tokens, width) or None, after the sheet's pseudo-code."""
    body, h = model.vit, model.vit.embeddings(PIXELS.double())
    for block, P in zip(body.layers, prompts, strict=True):
        if P is not None:
            patches = h[:, -((PATCHES["image_size"] // PATCHES["patch_size"]) ** 2) :]
            h = torch.cat([h[:, :1], P.expand(len(h), -1, -1), patches], 1)
        h = block(h)
    return model.classifier(body.layernorm(h)[:, 0])


@pytest.mark.parametrize("label", VISION_METHODS)
def test_logits_are_those_of_the_formula(label):
    method, plain = VISION_METHODS[label], Case(vit, VISION_METHODS[label]).plain(torch.float64)
    model = Case(vit, method).plain(torch.float64)
    t = adapter(model, method)
    move(model)
    rows = t.P if method.hidden is None else torch.nn.functional.linear(t.E, t.W, t.b)
    prompts = [rows[i] if i < len(rows) else None for i in range(PATCHES["num_hidden_layers"])]
    torch.testing.assert_close(outputs(model), by_hand(plain, prompts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "hidden", "width"), [(3, None, 16), (1, None, 16), (3, 1000, 1000)])
def test_the_start_is_uniform_within_its_bound(channels, hidden, width):
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**PATCHES, num_channels=channels))
    t = adapter(model, lt.VPT(tokens=500, hidden=hidden), seed=1)
    rows, bound = (t.P if hidden is None else t.E).detach(), math.sqrt(6 / (channels * 4 * 4 + width))
    assert rows.shape == (3, 500, width)
    assert 0.999 * bound < rows.abs().max() <= bound
    assert abs(rows.mean()) < 0.02 * bound
    assert rows.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    if hidden:
        assert t.W.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.03)  # Kaiming, from its outputs
        assert 0 < t.b.abs().max() <= 1 / math.sqrt(hidden)


def test_every_block_s_prompts_get_a_gradient():
    model = Case(vit, VISION_METHODS["VPT"]).plain()
    t = adapter(model, lt.VPT(tokens=3))
    outputs(model).square().sum().backward()
    assert (t.P.grad.abs().amax((1, 2)) > 0).all()


def test_dropout_is_drawn_for_each_image_and_in_training_alone():
    model = Case(vit, lt.VPT()).plain()
    same = PIXELS[:1].expand(2, -1, -1, -1)
    adapter(model, lt.VPT(tokens=4, dropout=0.5))
    torch.testing.assert_close(*outputs(model, same))
    assert torch.equal(outputs(model, same), outputs(model, same))
    first, second = outputs(model.train(), same)
    assert not torch.allclose(first, second)


def test_peft_names_and_defaults():
    model = Case(vit, lt.VPT()).plain()
    lt.adapt(model, "vpt", num_virtual_tokens=5, modules_to_save=["classifier"])
    assert lt.summary(model).trained == 3 * 5 * 16 + 3 * 17
    assert (lt.VPT().tokens, lt.VPT().deep, lt.VPT().dropout, lt.VPT().hidden) == (50, True, 0.0, None)


def test_bad_input():
    for tokens in (0, None):
        with pytest.raises(
            ValueError, match=rf"tokens is {tokens}, without which only the head would learn;.*HeadOnly"
        ):
            lt.VPT(tokens=tokens)
    for options in ({"tokens": -1}, {"hidden": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} is "):
            lt.VPT(**options)
    with pytest.raises(TypeError, match=r"tokens is 2.5"):
        lt.VPT(tokens=2.5)
