import json
import sys

import numpy as np
import pytest
from PIL import Image

from loratory.tasks.data import read_data, read_rows
from loratory.tasks.pictures import Picture, picture


def paint(path, value=0, size=(6, 4), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """train and dev, each with the classes cat and dog."""
    for split, count in (("train", 3), ("val", 1)):
        for label in ("cat", "dog"):
            for i in range(count):
                paint(tmp_path / "set" / split / label / f"{i}.png", (i, 40 * len(split), label == "dog"))
    return tmp_path / "set"


def test_class_folders_with_splits(folders):
    data = read_data(folders)
    assert [row["label"] for row in data.train] == ["cat"] * 3 + ["dog"] * 3
    assert [row.origin for row in data.dev] == [str(folders / "val" / label / "0.png") for label in ("cat", "dog")]
    assert data.train[1]["image"].open().getpixel((0, 0)) == (1, 200, 0)
    assert data.notes == ()


def test_class_folders_alone_hold_out_a_dev_split_and_twins_are_reported(folders):
    (folders / "train" / ".hidden").mkdir()
    data = read_data(folders / "train", test=folders / "train" / "..")
    assert (len(data.train), len(data.dev), len(data.test)) == (5, 1, 6)
    assert "held out" in data.notes[0]
    assert data.notes[1].startswith("5 of 6 test rows also stand in train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train" / "cat" / "notes.txt").write_text("x"), r"notes\.txt is no image \(known endings"),
        (lambda f: (f / "train" / "cow").mkdir(), "class folder '.*cow' holds no image"),
        (lambda f: (f / "train" / "labels.csv").write_text("x"), "holds the file labels.csv beside class folders"),
        (lambda f: (f / "horse").mkdir(), r"mixes split folders \(train\) and others \(horse\)"),
        (lambda f: (f / "valid").mkdir(), r"more than one dev folder \(valid and another\)"),
        (lambda f: [p.unlink() for p in f.glob("val/*/*")] + [p.rmdir() for p in f.glob("val/*")], "no class folders"),
    ],
)
def test_folders_that_are_no_image_set(folders, change, message):
    change(folders)
    with pytest.raises(ValueError, match=message):
        read_data(folders)


def test_npz_of_pixels_gives_every_column(tmp_path):
    file = tmp_path / "train.npz"
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    np.savez(file, images=images, labels=[7, 8], drawer=["a", "b"], masks=np.zeros((2, 3, 4)))
    rows = read_rows(file)
    assert [(row["labels"], row["drawer"]) for row in rows] == [(7, "a"), (8, "b")]
    assert set(rows[0]) == {"image", "labels", "drawer"}
    assert rows[1].origin == f"{file} row 2"
    assert np.asarray(rows[1]["image"].open()).tolist() == images[1].repeat(3, -1).tolist()


def test_npz_of_image_files(tmp_path):
    paint(tmp_path / "a.png", (1, 2, 3))
    paint(tmp_path / "b.png", (4, 5, 6), size=(2, 2))
    parts = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    data = np.frombuffer(b"".join(parts), np.uint8)
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(tmp_path / "train.npz", bytes=data, offsets=offsets, labels=[0, 1])
    rows = read_rows(tmp_path / "train.npz")
    assert [row["image"].check() for row in rows] == ["6 x 4 RGB", "2 x 2 RGB"]
    assert rows[1]["image"].open().getpixel((1, 1)) == (4, 5, 6)
    for wrong, message in (
        (offsets[:-1], "must be n . 1 whole numbers from 0"),
        ([0, offsets[2] + 5, offsets[2]], "row 2: its bytes end at"),
    ):
        np.savez(tmp_path / "train.npz", bytes=data, offsets=wrong, labels=[0, 1])
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "train.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4))}, "'images' is float64, but must be uint8"),
        ({"images": np.zeros((2, 3, 5, 5), np.uint8)}, r"'images' has shape \(2, 3, 5, 5\), but must be"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": [1]},
            r"'labels' has shape \(1,\), but there are 2 images",
        ),
        ({"pixels": np.zeros(3)}, "holds pixels, but 'images'"),
        ({"images": np.zeros((2, 4), object)}, "cannot be read as an npz of plain arrays"),
        ({"bytes": np.zeros(3), "offsets": [0, 3]}, "'bytes' is float64"),
    ],
)
def test_npz_that_holds_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "x.npz")


def test_a_damaged_npz(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match="cannot be read as an npz"):
        read_rows(tmp_path / "x.npz")


def test_images_that_cannot_be_read_name_their_place(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    assert Picture("row 3", whole[: len(whole) // 2]).check() == "64 x 64 RGB"
    with pytest.raises(ValueError, match=r"row 3: the image cannot be read \(.*\); replace it"):
        Picture("row 3", whole[: len(whole) // 2]).open()
    with pytest.raises(ValueError, match="row 4: the image cannot be read"):
        Picture("row 4", b"nothing").check()
    with pytest.raises(FileNotFoundError, match="row 5: there is no image file"):
        picture(str(tmp_path / "none.png"), "row 5").check()
    with pytest.raises(TypeError, match=r"row 6: 3.5 \(float\) is no image"):
        picture(3.5, "row 6")
    paint(tmp_path / "wide.png", 40000, mode="I;16")
    with pytest.raises(ValueError, match=r"row 7: the image has more than 8 bits a channel \(I;16\)"):
        picture(tmp_path / "wide.png", "row 7").check()


def test_images_come_upright_and_in_rgb(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways
    paint(tmp_path / "a.jpg", size=(8, 4), exif=turned)
    assert Picture("a", tmp_path / "a.jpg").open().size == (4, 8)
    paint(tmp_path / "b.png", (9, 8, 7, 0), mode="RGBA")
    assert Picture("b", tmp_path / "b.png").open().getpixel((0, 0)) == (9, 8, 7)
    assert picture(Image.new("L", (2, 2), 5), "c").open().getpixel((0, 0)) == (5, 5, 5)
    assert picture({"bytes": (tmp_path / "b.png").read_bytes(), "path": None}, "d").open().size == (6, 4)


def test_rows_compare_by_content(tmp_path):
    paint(tmp_path / "a.png", (1, 2, 3))
    paint(tmp_path / "b.png", (1, 2, 3))
    paint(tmp_path / "c.png", (1, 2, 4))
    texts = [json.dumps({"image": Picture(name, tmp_path / name)}, default=str) for name in ("a.png", "b.png", "c.png")]
    assert texts[0] == texts[1] != texts[2]


def test_without_pillow_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'loratory\[image\]'"):
        Picture("row 1", b"").check()
