from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from loratory.tasks import make_task
from loratory.tasks.data import read_rows
from loratory.tasks.image import stack_examples, stacked
from loratory.tasks.pictures import Picture
from loratory.tasks.rows import Row

DRAWN = Path(__file__).parents[2] / "data" / "omniglot" / "dev.npz"


@pytest.fixture
def rows():
    return read_rows(DRAWN)[::3][:4]  # characters 0, 1, 2 and 3


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture
def tiny_vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=4, **sizes)).eval()


def test_labels_examples_and_batches(rows, processor):
    task = make_task("image").resolve(rows)
    assert (task.image_column, task.label_column, task.labels) == ("image", "labels", ("0", "1", "2", "3"))
    assert task.notes() == ("image: images from 'image', label from 'labels' (4 labels)",)
    assert task.model_kwargs()["label2id"] == {"0": 0, "1": 1, "2": 2, "3": 3}
    encoded = task.encode(rows, processor)
    assert (len(encoded), encoded.tokens, encoded.size(0), encoded.supervised) == (4, 4, 1, 4)
    batch = stack_examples([encoded[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1, 2]
    expected = processor(images=rows[1]["image"].open(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][1], expected)
    shown = str(task.preview(encoded, processor))
    assert shown.startswith(f"{rows[0].origin} (28 x 28 L, for the model 3 x 16 x 16) -> [[0]]")
    assert "4 images, 1 to 1 of each label" in shown


def test_other_columns_can_be_named(rows):
    task = make_task("image", label_column="drawer").resolve([*rows, Row({**rows[0], "drawer": 99}, "x")])
    assert task.labels == ("12", "99")


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([Row({"image": 3, "label": "x"}, "f row 1"), Row({"image": 3, "label": "y"}, "f row 2")], TypeError, r"f row 1: 3 \(int\) is no image"),
        ([Row({"image": "a.png", "label": "x"}, "f row 1"), Row({"image": "a.png", "label": "y"}, "f row 2")], FileNotFoundError, "f row 1: there is no image file 'a.png'"),
        ([Row({"image": "a.png", "label": "x"}, "f row 1")], ValueError, "holds only the label 'x'"),
        ([Row({"image": "a.png", "label": 0.5}, "f row 1")], TypeError, "f row 1: column 'label' holds 0.5"),
        ([Row({"image": "a", "label": "x"}, "f row 1"), Row({"label": "y"}, "f row 2")], ValueError, "f row 2: column 'image' is missing"),
        ([Row({"text": "a", "label": "x"}, "f row 1")], ValueError, "f row 1: task 'image' finds no columns it knows"),
        ([], ValueError, "no rows"),
    ],
)  # fmt: skip
def test_bad_rows(rows, kind, message, processor):
    with pytest.raises(kind, match=message):
        make_task("image").resolve(rows).encode(rows, processor)


def test_unseen_labels_are_named(rows, processor, tiny_vit):
    tiny_vit.classifier = torch.nn.Linear(16, 2)
    task = make_task("image").resolve(rows[:2])
    with pytest.raises(ValueError, match=r"row 7: '2' was not seen in training, which has 2 labels \(0, 1\)"):
        task.encode(rows[:3], processor)
    with pytest.raises(ValueError, match="'2' was not seen"):
        task.evaluate(tiny_vit, processor, rows[:3])


def test_max_length_is_refused():
    with pytest.raises(ValueError, match="max_length is for texts"):
        make_task("image", max_length=8)


def test_predictions_do_not_depend_on_the_batch(rows, processor, tiny_vit):
    task = make_task("image").resolve(rows)
    assert task.head_modules(tiny_vit) == ("classifier",)
    together = task.predict(tiny_vit, processor, rows, batch_size=4)
    assert together == [task.predict(tiny_vit, processor, [row])[0] for row in rows]
    assert set(together) <= set(task.labels)
    assert set(task.evaluate(tiny_vit, processor, rows)) == {"accuracy", "macro_f1"}
    assert task.predict(tiny_vit.bfloat16(), processor, rows[:1])[0] in task.labels


def test_scores_against_hand_made_numbers(rows):
    task = make_task("image").resolve(rows)
    found = task.score(["0", "1", "1", "3"], rows, draws=100)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert found["accuracy_low"] < 0.75 < found["accuracy_high"]
    trainer = SimpleNamespace(predictions=np.array([0, 1, 1, 3]), label_ids=np.array([0, 1, 2, 3]))
    assert task.metrics()(trainer) == {key: found[key] for key in ("accuracy", "macro_f1")}


def test_images_of_different_sizes_after_the_processor_are_refused():
    with pytest.raises(ValueError, match="leaves images of different sizes"):
        stacked([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])


def test_a_file_that_ends_too_early_is_named_when_its_example_is_made(rows, processor):
    task = make_task("image").resolve(rows)
    broken = Row({"image": Picture("f row 9", b"\x89PNG\r\n\x1a\n"), "labels": 0}, "f row 9")
    with pytest.raises(ValueError, match="f row 9: the image cannot be read"):
        task.encode([broken], processor)
