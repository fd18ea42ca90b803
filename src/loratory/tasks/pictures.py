"""Images as they are stored: files in class folders, and npz archives. They are decoded when they are asked for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loratory.tasks.rows import Row

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits, which it would clip


@dataclass(frozen=True, eq=False)
class Picture:
    """One image: a file, the bytes of one, or pixels (uint8; height, width[, 3])."""

    name: str  # where it stands, for messages
    source: Path | bytes | np.ndarray

    def open(self) -> Any:
        """The image as Pillow has it, upright and in RGB. Raises ValueError if it cannot be read, or would be clipped."""
        image = self._opened()
        try:
            image = _pillow().ImageOps.exif_transpose(image)
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # a file that ends too early
            raise self._unreadable(error) from None

    def check(self) -> str:
        """Its size and kind, from the beginning of the file alone. Raises ValueError if it is no image."""
        image = self._opened()
        return f"{image.width} x {image.height} {image.mode}"

    def _opened(self) -> Any:
        Image = _pillow().Image
        try:
            if isinstance(self.source, np.ndarray):
                image = Image.fromarray(self.source)
            else:
                image = Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.name}: there is no image file '{self.source!s}'; check the path") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise self._unreadable(error) from None
        if image.mode in WIDE:
            raise ValueError(
                f"{self.name}: the image has more than 8 bits a channel ({image.mode}); convert it to 8 bits"
            )
        return image

    def _unreadable(self, error: Exception) -> ValueError:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(f"{self.name}: the image cannot be read ({cause:.80}); replace it or take it out")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is stored."""
        if isinstance(self.source, np.ndarray):
            return hashlib.sha256(str(self.source.shape).encode() + self.source.tobytes()).hexdigest()
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha256(data).hexdigest()

    def __str__(self) -> str:  # rows are compared as text, so this is the content, not the place
        return f"image {self.digest}"


def picture(value: Any, where: str) -> Picture:
    """The image in a cell: a Picture, the path of a file, a Pillow image, or what `datasets` keeps of one.

    Raises TypeError naming the row for anything else.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, str | Path):
        return Picture(where, Path(value).expanduser())
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return Picture(where, value["bytes"])
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return Picture(where, Path(value["path"]))
    if type(value).__module__.startswith("PIL."):
        if value.mode in WIDE:
            raise ValueError(f"{where}: the image has more than 8 bits a channel ({value.mode}); convert it to 8 bits")
        return Picture(where, np.asarray(value.convert("RGB")))
    raise TypeError(
        f"{where}: {value!r:.60} ({type(value).__name__}) is no image; give the path of an image file, or a folder or .npz of images"
    )


def _pillow() -> Any:
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow; run: pip install 'loratory[image]'") from error
    return PIL


# -- class folders -----------------------------------------------------------------------------------------------------


def read_folders(folder: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, list[Row]]:
    """Splits of a folder of class folders, or of split folders (`names`: split -> what it may be called) with class folders.

    Empty if it has no folders inside. Raises ValueError for anything that is neither an image nor a class.
    """
    inside = _folders(folder)
    split_of = {path: next((split for split, called in names.items() if path.name in called), None) for path in inside}
    if inside and all(split_of.values()):
        splits: dict[str, list[Row]] = {}
        for path, split in split_of.items():
            if str(split) in splits:
                raise ValueError(
                    f"folder '{folder}' has more than one {split} folder ({path.name} and another); keep one"
                )
            splits[str(split)] = _classes(path)
        return splits
    if found := [path.name for path, split in split_of.items() if split is not None]:
        other = next(path.name for path, split in split_of.items() if split is None)
        raise ValueError(
            f"folder '{folder}' mixes split folders ({found[0]}) and others ({other}); it must hold only train, dev and test, "
            "or only class folders"
        )
    return {"train": _classes(folder)} if inside else {}


def _classes(folder: Path) -> list[Row]:
    rows = []
    for path in _entries(folder):
        if not path.is_dir():
            raise ValueError(f"folder '{folder}' holds the file {path.name} beside class folders; take it out")
        images = _entries(path)
        for image in images:
            if image.is_dir() or image.suffix.lower() not in ENDINGS:
                raise ValueError(
                    f"{image} is no image (known endings: {', '.join(ENDINGS)}); take it out of its class folder"
                )
            rows.append(Row({"image": Picture(str(image), image), "label": path.name}, str(image)))
        if not images:
            raise ValueError(f"class folder '{path}' holds no image; fill it or take it out")
    if not rows:
        raise ValueError(f"folder '{folder}' holds no class folders with images; give it one folder a class")
    return rows


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


# -- npz ---------------------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> Iterator[Row]:
    """Rows of an npz: `images` (uint8; n, height, width[, channels]), or `bytes` and `offsets` of image files one after another.

    Every other one-dimensional array of n values (labels, ...) is a column.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise ValueError(
            f"{path} cannot be read as an npz of plain arrays ({error}); save it with numpy.savez"
        ) from None
    if "images" in arrays:
        images = _pixels(path, arrays.pop("images"))
    elif "bytes" in arrays and "offsets" in arrays:
        images = _encoded(path, arrays.pop("bytes"), arrays.pop("offsets"))
    else:
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'nothing'}, but 'images' (n, height, width[, channels]) or 'bytes' with 'offsets' "
            "are expected; rename its arrays"
        )
    for name in ("labels", "label"):
        if name in arrays and arrays[name].shape != (len(images),):
            raise ValueError(
                f"{path}: '{name}' has shape {arrays[name].shape}, but there are {len(images)} images; give one label an image"
            )
    columns = {name: values.tolist() for name, values in arrays.items() if values.shape == (len(images),)}
    for number, image in enumerate(images):
        where = f"{path} row {number + 1}"
        yield Row({"image": Picture(where, image)} | {name: each[number] for name, each in columns.items()}, where)


def _pixels(path: Path, images: np.ndarray) -> Sequence[np.ndarray | bytes]:
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: 'images' is {images.dtype}, but must be uint8 (0 to 255); scale and convert it")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            f"{path}: 'images' has shape {images.shape}, but must be (n, height, width) or (n, height, width, channels) with 1, 3 or 4 "
            "channels last; transpose it"
        )
    return [each[..., 0] if each.ndim == 3 and each.shape[-1] == 1 else each for each in images]


def _encoded(path: Path, data: np.ndarray, offsets: np.ndarray) -> Sequence[np.ndarray | bytes]:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{path}: 'bytes' is {data.dtype} {data.shape}, but must be uint8 of one dimension")
    whole = np.issubdtype(offsets.dtype, np.integer) and offsets.ndim == 1 and len(offsets) > 1
    if not whole or offsets[0] != 0 or offsets[-1] != len(data):
        raise ValueError(f"{path}: 'offsets' must be n + 1 whole numbers from 0 to the {len(data)} bytes there are")
    if (bad := np.flatnonzero(np.diff(offsets) <= 0)).size:
        raise ValueError(
            f"{path} row {bad[0] + 1}: its bytes end at {offsets[bad[0] + 1]}, where they begin or before; correct 'offsets'"
        )
    raw = data.tobytes()
    return [raw[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
