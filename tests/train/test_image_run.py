"""Image classification end to end: a real trained ResNet-20, hand-drawn characters, adapters on its convolutions."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import loratory as lt
from loratory.cli import main
from loratory.train import train
from loratory.train.base import load_base
from loratory.train.opened import open_adapter

HERE = Path(__file__).parents[1]
RESNET = HERE / "models" / "resnet20"
DRAWN = HERE.parent / "data" / "omniglot"


@pytest.fixture
def drawn(tmp_path):
    """Five characters: 60 training images of 12 drawers, 15 dev images of 3 others."""
    for split in ("train", "dev"):
        kept = np.load(DRAWN / f"{split}.npz")
        chosen = kept["labels"] < 5
        np.savez(tmp_path / f"{split}.npz", images=kept["images"][chosen], labels=kept["labels"][chosen])
    return tmp_path


@pytest.fixture
def keys(drawn, tmp_path):
    def make(**changes):
        usual = {
            "task": "image", "base": str(RESNET), "trust_remote_code": True, "train": str(drawn / "train.npz"), "dev": str(drawn / "dev.npz"),
            "where": "conv", "rank": 4, "learning_rate": 1e-2, "num_train_epochs": 6, "per_device_train_batch_size": 12, "eval_steps": 30,
            "logging_steps": 10, "device": "cpu", "output_dir": str(tmp_path / "out"),
        }  # fmt: skip
        return usual | changes

    return make


@pytest.fixture
def base():
    def make(folder=RESNET):
        return load_base(
            folder, "AutoModelForImageClassification", trust_remote_code=True, processor_class="AutoImageProcessor"
        )

    return make


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_on_convolutions_learn_characters(keys, method, tmp_path, capsys, base):
    said: list[str] = []
    result = train(say=said.append, **keys(method=method))
    assert result.before["accuracy"] < 0.4
    assert result.after["accuracy"] >= result.before["accuracy"] + 0.3
    assert result.after["macro_f1"] > 0.5
    text = "\n".join(said)
    assert "19 normalisation layers keep the base's running statistics" in text
    assert "images/s" in text
    opened = open_adapter(tmp_path / "out", device="cpu")
    untouched = base()[0]
    with lt.disabled(opened.model):
        kept = dict(opened.model.named_buffers())
        assert all(torch.equal(kept[name], buffer) for name, buffer in untouched.named_buffers())
        assert torch.equal(opened.model.net.conv1.weight, untouched.net.conv1.weight)
    assert main(["eval", str(tmp_path / "out"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["adapter"]["accuracy"] == pytest.approx(result.after["accuracy"])
    if method == "dora":
        return
    assert main(["generate", str(tmp_path / "out"), "--data", str(tmp_path / "dev.npz"), "--rows", "2", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0]["prompt"] == {"image": f"{tmp_path / 'dev.npz'} row 1", "labels": 0}
    assert answers[0]["answer"] in "01234"
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "merged")]) == 0
    merged, processor = base(tmp_path / "merged")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        apart = merged.eval()(pixels).logits - opened.model(pixels).logits
    assert apart.abs().max() < 1e-4
    assert merged.config.num_labels == 5
    assert processor.size == {"height": 32, "width": 32}


def test_a_resumed_run_ends_with_the_same_bits(keys, tmp_path):
    changes = {"num_train_epochs": 1, "eval_steps": 2, "eval_before": False, "save_total_limit": None}
    train(say=lambda line: None, **keys(**changes, output_dir=str(tmp_path / "whole")))
    train(say=lambda line: None, **keys(**changes, output_dir=str(tmp_path / "cut")))
    for name in ("adapter", "checkpoint-4", "checkpoint-5"):
        if (tmp_path / "cut" / name).exists():
            (tmp_path / "cut" / name).rename(tmp_path / f"gone-{name}")
    train(say=lambda line: None, **keys(**changes, output_dir=str(tmp_path / "cut")), resume=True)
    one, two = ((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_a_vision_transformer_from_a_folder_in_bfloat16(keys, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=7, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    changes = {
        "base": str(folder),
        "where": "all-linear",
        "max_steps": 2,
        "dtype": "bfloat16",
        "trust_remote_code": False,
    }
    result = train(say=lambda line: None, **keys(**changes))
    assert (result.steps, set(result.after)) == (2, {"loss", "accuracy", "macro_f1"})


def test_a_base_without_image_processor_is_named(keys, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(OSError, match=r"vit' cannot be loaded; .*image processor"):
        train(say=lambda line: None, **keys(base=str(tmp_path / "vit"), where="all-linear"))


@pytest.mark.slow
def test_cifar10_in_its_damaged_jpeg_form_is_adapted_to(keys):
    """The published net has seen clean images: 0.80 on these JPEG copies before, more after (its own labels, so its own head)."""
    root = os.environ.get("LORATORY_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip(
            "cifar10 may not be copied into the project: set LORATORY_DATA to a folder with cifar10/train.npz, dev.npz and test.npz"
        )
    source = Path(root) / "cifar10"
    changes = {
        "train": str(source / "train.npz"),
        "dev": str(source / "dev.npz"),
        "test": str(source / "test.npz"),
        "max_steps": 150,
    }
    changes |= {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "eval_steps": 150,
        "rank": 8,
    }
    result = train(say=print, **keys(**changes))
    assert result.test_before["accuracy"] == pytest.approx(0.796, abs=0.01)
    assert result.test_after["accuracy"] > result.test_before["accuracy"]


def test_what_training_changed_is_said_after_it(keys):
    said: list[str] = []
    train(say=said.append, **keys(method="svfit", rank=2, learning_rate=30.0, max_steps=3, eval_steps=3))
    counts = [i for i, line in enumerate(said) if line.startswith("trained singular values below 0")]
    assert len(counts) == 1, said
    assert not any("below 0" in line for line in said[: counts[0]])
