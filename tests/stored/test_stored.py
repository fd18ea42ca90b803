"""Adapter files of every format version load, to the same bits and the same outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratory as lt
from loratory.store.native import VERSION
from tests.stored.make import CASES, EXPECTED, HERE, make, outputs

FOLDERS = sorted(path.parent for path in HERE.glob("v*/*/adapter.json"))


def test_every_case_of_this_version_is_stored() -> None:
    assert {f.name for f in FOLDERS if f.parent.name == f"v{VERSION}"} == set(CASES)
    assert sum(f.stat().st_size for f in (HERE / "v1").rglob("*") if f.is_file()) < 300_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_stored_file_loads(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / EXPECTED)
    base = CASES[folder.name].base()
    alone = outputs(CASES[folder.name].base(), expected["inputs"])
    lt.load(base, folder, trainable=True)
    lt.save(base, tmp_path)
    then, now = (json.loads((each / "adapter.json").read_text()) for each in (folder, tmp_path))
    for key in ("method", "layers", "tags", "also_train", "kept", "bias", "untied", "training"):
        assert then[key] == now[key], key
    assert then["hyperparameters"].items() <= now["hyperparameters"].items()
    mine, theirs = (load_file(each / "adapter.safetensors") for each in (folder, tmp_path))
    assert list(mine) == list(theirs)
    assert all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)
    found = outputs(base, expected["inputs"])
    scale = float(expected["outputs"].max() - expected["outputs"].min())
    assert float((found - expected["outputs"]).abs().max()) <= 1e-6 * scale
    assert float((alone - expected["outputs"]).abs().max()) > 1e-3 * scale


def test_what_is_stored_is_never_written_again(tmp_path: Path) -> None:
    make("conv", tmp_path / "conv")
    before = {f.name: f.read_bytes() for f in (tmp_path / "conv").iterdir()}
    assert set(before) == {"adapter.json", "adapter.safetensors", EXPECTED}
    with pytest.raises(FileExistsError, match=r"conv' exists; stored files are never written again"):
        make("conv", tmp_path / "conv")
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "conv").iterdir()}
