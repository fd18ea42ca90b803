"""One picture for each method: what it trains, as heat maps of a small network's real tensors after forty steps.

A picture is kept under the checksum of the code that makes it, so that a build draws anew only what has changed.
"""

import dataclasses
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.runtime.layer import copies_of, layers_of

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".cache" / "pictures"
SMALL = {"rank": 4, "n_frequency": 24, "tokens": 6, "hidden": 8}  # sizes at which single numbers can be seen
STEPS, MOST = 40, 6  # of training; panels


def picture(cls: type[Any]) -> bytes:
    """The picture of a method as PNG."""
    code = [Path(__file__), *sorted((ROOT / "src" / "loratory" / "ops").glob("*.py")), source_of(cls)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in code))
    file = KEPT / f"{cls.__name__}-{digest.hexdigest()[:16]}.png"
    if not file.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        for old in KEPT.glob(f"{cls.__name__}-*.png"):
            old.unlink()
        file.write_bytes(drawn(cls.__name__, panels(cls)))
    return file.read_bytes()


def source_of(cls: type[Any]) -> Path:
    import inspect

    return Path(inspect.getfile(cls))


class Blocks(nn.Module):
    """Two blocks whose layers have one shape each, as a transformer's have."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 36), "down": nn.Linear(36, 24)}) for _ in range(2)
        )
        self.head = nn.Linear(24, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


class Convolutions(nn.Module):
    """Two convolutions, for methods that serve nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def text_loss(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(input_ids=batch, labels=batch).loss
    return value


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    value: Tensor = model(pixel_values=batch[0], labels=batch[1]).loss
    return value


def panels(cls: type[Any]) -> dict[str, Tensor]:
    """What the picture shows: title -> numbers. First the change of a weight, where there is one, then the trained tensors."""
    torch.manual_seed(0)
    if cls.acts_on == "body":
        model, batch, measure = body(), torch.arange(48).reshape(4, 12) % 32, text_loss
        where = None
    elif cls.acts_on == "vision":
        model, batch, measure = vision_body(), (torch.randn(8, 3, 16, 16), torch.arange(8) % 4), image_loss
        where = None
    else:
        model, where, measure = Blocks(), ["up", "down"], loss
        x = torch.randn(256, 24)
        with torch.no_grad():  # another network's answers: something to learn
            batch = (x, Blocks()(x))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}
    try:
        adapt(model, cls, where, measure, batch)
    except ValueError:
        if cls.acts_on != "layers":
            raise
        model, x = Convolutions(), torch.randn(32, 6, 5, 5)
        with torch.no_grad():
            batch = (x, Convolutions()(x))
        adapt(model, cls, where, measure, batch)
    train(model, measure, batch)
    shown: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        if layer.site.kind != "block":
            t = layer.active[0]
            W = layer.site.read()
            with torch.no_grad():
                shown[f"change of {name}"] = t.method.weight(t, W) - W
            shown |= {f"{name}: {n}": p for n, p in t.trained().items()}
            break
        shown |= {f"{n}": p for n, p in layer.active[0].trained().items()}
    for owner in copies_of(model):
        key = f"{owner}.weight"
        if key in weights and len(shown) < 2:
            shown[f"change of {key}"] = model.get_submodule(owner).weight - weights[key]
    return shown or {"nothing is trained: blocks.0.up.weight": weights["blocks.0.up.weight"]}


def adapt(model: nn.Module, cls: type[Any], where: Any, measure: Any, batch: Any) -> None:
    fields = {f.name for f in dataclasses.fields(cls)}
    for method in (lambda: cls(**{n: v for n, v in SMALL.items() if n in fields}), cls):
        try:
            made = method()
            seen = lt.collect(model, [batch], measure, made.needs, where=where) if made.needs else None
            options = {"where": where} if where and cls.trains == "factors" else {}
            return lt.adapt(model, made, seed=1, seen=seen, **options)
        except ValueError as e:
            refused = e
    raise refused


def train(model: nn.Module, measure: Any, batch: Any) -> None:
    if not lt.trained(model):
        return
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = measure(model, batch) + lt.penalty(model)
        value.backward()
        optimizer.step()


def body() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32))


def vision_body() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=4))


def drawn(name: str, shown: dict[str, Tensor]) -> bytes:
    from matplotlib.figure import Figure

    chosen = list(shown.items())[:MOST]
    figure = Figure(figsize=(2.6 * len(chosen), 2.8), layout="constrained")
    for i, (title, numbers) in enumerate(chosen):
        axes = figure.add_subplot(1, len(chosen), i + 1)
        flat = numbers.detach().float()
        flat = flat.reshape(-1, flat.shape[-1]) if flat.dim() > 1 else flat.reshape(1, -1)
        most = float(flat.abs().max()) or 1.0
        drawing = axes.imshow(flat, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_title(f"{title}\n{' x '.join(map(str, numbers.shape))}", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(drawing, ax=axes, shrink=0.7).ax.tick_params(labelsize=6)
    figure.suptitle(f"{name} after {STEPS} steps", fontsize=8)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
