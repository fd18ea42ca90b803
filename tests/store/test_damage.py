"""What is damaged, foreign or half-written is refused, each with its message; what was there before is never lost."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import loratory as lt
from loratory.store import atomic
from tests.oracle.pairs import randomised

FILES = ["adapter.json", "adapter.safetensors"]


def base() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def adapted(rank: int = 2, seed: int = 1) -> nn.Module:
    model = base()
    lt.adapt(model, lt.LoRA(rank=rank), ["0", "2"])
    randomised(model, seed=seed)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lt.save(adapted(), tmp_path / "a")
    return tmp_path / "a"


def bits(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refused(folder: Path, error: type[Exception], message: str) -> None:
    """Loading and inspecting say so, and the model stays a plain one."""
    model = base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for read in (lambda: lt.load(model, folder), lambda: lt.inspect(folder)):
        with pytest.raises(error, match=message):
            read()
    assert type(model[0]) is nn.Linear
    assert not any("loratory" in n for n, _ in model.named_modules())
    assert before.keys() == model.state_dict().keys()


def change(folder: Path, **values: Any) -> None:
    record = json.loads((folder / "adapter.json").read_text())
    for key, value in values.items():
        if value is None:
            del record[key]
        else:
            record[key] = value
    (folder / "adapter.json").write_text(json.dumps(record))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("file", FILES)
def test_truncated(folder: Path, file: str, share: float) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(share * len(data))])
    message = (
        "is not valid JSON .* damaged: take another copy"
        if file.endswith("json")
        else "checksum differs.*truncated or was changed"
    )
    refused(folder, ValueError, message)


def test_one_bit_flipped(folder: Path) -> None:
    data = bytearray((folder / FILES[1]).read_bytes())
    data[-1] ^= 1
    (folder / FILES[1]).write_bytes(data)
    refused(folder, ValueError, r"adapter.safetensors' is not the file that adapter.json was written with")


def test_tensors_of_another_adapter(folder: Path, tmp_path: Path) -> None:
    lt.save(adapted(seed=2), tmp_path / "b")
    shutil.copy(tmp_path / "b" / FILES[1], folder / FILES[1])
    refused(folder, ValueError, "checksum differs")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "something"}, r"is no Loratory adapter record \(its format is 'something'\)"),
        ({"format_version": 2}, r"has format version 2; this Loratory reads version 1: update Loratory"),
        ({"sha256": None}, r"adapter.json' lacks 'sha256'; it was changed or damaged"),
        ({"layers": {"0": {}}}, r"does not agree with its own tensors \(first: 'layers/2/A'\)"),
        (
            {"layers": {"0": {}, "2": {}, "4": {}}},
            r"does not agree with its own tensors \(first: 'layers/4/\(none\)'\)",
        ),
        ({"also_train": ["0.bias"]}, r"does not agree with its own tensors \(first: 'also_train/0.bias'\)"),
    ],
)
def test_a_changed_record(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    refused(folder, ValueError, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "nora"}, r"there is no method 'nora'; nearest names: "),
        ({"hyperparameters": {"rank": -1}}, r"holds hyper-parameters that LoRA refuses: rank is -1"),
        ({"hyperparameters": {"rnk": 1}}, r"holds hyper-parameters that LoRA refuses: .*rnk"),
    ],
)
def test_a_record_of_something_else(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(ValueError, match=message):
        lt.load(base(), folder)


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors with a checksum that fits them."""
    tensors = safetensors.torch.load_file(folder / FILES[1])
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / FILES[1])
    change(folder, sha256=hashlib.sha256((folder / FILES[1]).read_bytes()).hexdigest())


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("layers/0/A"))
    refused(folder, ValueError, r"lacks tensor 'layers/0/A' \(1 missing\); it is damaged: take another copy")
    rewrite(folder, lambda tensors: tensors.update({"layers/0/A": torch.ones(1), "more": torch.ones(1)}))
    refused(folder, ValueError, r"holds tensor 'more', which adapter.json does not name \(1 unexpected\)")


def test_not_safetensors_although_the_checksum_fits(folder: Path) -> None:
    (folder / FILES[1]).write_bytes(b"no tensors here")
    change(folder, sha256=hashlib.sha256(b"no tensors here").hexdigest())
    refused(folder, ValueError, "cannot be read as safetensors")


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "model.pkl", "x.ckpt"])
def test_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    trap = f"cos\nmkdir\n(S'{tmp_path / 'sprung'}'\ntR.".encode()  # makes a folder when it is unpickled
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / name).write_bytes(trap)
    refused(folder, ValueError, rf"{name}' is a pickle, which can run any code when read, so it is never loaded")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["0"]}))
    refused(folder, ValueError, "is a pickle, which can run any code when read, so it is never loaded")
    assert not (tmp_path / "sprung").exists()


def test_nothing_there(folder: Path, tmp_path: Path) -> None:
    refused(
        tmp_path / "none", FileNotFoundError, r"there is no folder '.*none'; give the folder that holds adapter.json"
    )
    refused(folder / FILES[0], ValueError, r"adapter.json' is a file; give the folder that holds adapter.json")
    (folder / FILES[1]).unlink()
    refused(folder, FileNotFoundError, r"holds adapter.json but not adapter.safetensors; copy the whole folder")
    (folder / FILES[0]).unlink()
    (folder / "notes.txt").touch()
    refused(folder, FileNotFoundError, r"holds no adapter \(adapter.json\); it holds: notes.txt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_nan_is_not_written(folder: Path, value: float) -> None:
    model, before = adapted(seed=3), bits(folder)
    lt.trained(model)["layers/2/B"].data[0, 0] = value
    with pytest.raises(
        ValueError,
        match=r"tensor 'layers/2/B' of adapter 'default' holds NaN or infinity.*go back to the last good checkpoint",
    ):
        lt.save(model, folder)
    with pytest.raises(ValueError, match=r"tensor '2.lora_B.weight' of adapter 'default' holds NaN or infinity"):
        lt.export(model, folder.parent / "peft", to="peft")
    assert bits(folder) == before
    assert not (folder.parent / "peft").exists()


def test_an_empty_adapter_is_not_written(tmp_path: Path) -> None:
    model = adapted()
    for name in ("0", "2"):
        del model.get_submodule(name).loratory["default"]
    with pytest.raises(ValueError, match=r"adapter 'default' holds no tensors, so an empty file would be written"):
        lt.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no adapters; call loratory.adapt"):
        lt.save(base(), tmp_path / "a")
    model = adapted()
    model.to("meta")
    with pytest.raises(ValueError, match=r"tensor 'layers/0/A' of adapter 'default' has no data \(meta device\)"):
        lt.save(model, tmp_path / "a")
    model = adapted()
    lt.trained(model)["layers/2/B"].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"tensor 'layers/2/B' of adapter 'default' is empty"):
        lt.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_training_record_that_is_no_json(folder: Path) -> None:
    before = bits(folder)
    with pytest.raises(TypeError, match="JSON serializable"):
        lt.save(adapted(seed=2), folder, training={"model": object()})
    assert bits(folder) == before


def test_saving_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'.*a' is a file; give a folder"):
        lt.save(adapted(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


class Killed(BaseException):
    """The process dies here: nothing after it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Die at the n-th file operation; cleaning up after it is impossible."""
    left = [n]

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return run

    monkeypatch.setattr(atomic, "_write_synced", guarded(atomic._write_synced))
    monkeypatch.setattr(os, "replace", guarded(os.replace))
    monkeypatch.setattr(Path, "unlink", guarded(Path.unlink))


def value(folder: Path) -> torch.Tensor:
    model = base()
    lt.load(model, folder)
    with torch.no_grad():
        return model(torch.ones(1, 6))


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(6))
def test_killed_twice_while_overwriting_one_of_the_adapters_is_there(
    folder: Path, first: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [adapted(seed=s) for s in (1, 2, 3)]
    with torch.no_grad():
        values = [m(torch.ones(1, 6)) for m in models]
    for model, at in ((models[1], first), (models[2], second)):
        with monkeypatch.context() as patch:
            kill_at(patch, at)
            with contextlib.suppress(Killed):
                lt.save(model, folder)
        assert any(torch.equal(value(folder_copy(folder)), v) for v in values)
    lt.save(models[0], folder)
    assert torch.equal(value(folder), values[0])
    assert sorted(p.name for p in folder.iterdir()) == FILES


def folder_copy(folder: Path) -> Path:
    """Reading settles what is pending; the original stays as the dead process left it."""
    shutil.rmtree(folder.with_name("copy"), ignore_errors=True)
    return Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("there", [True, False])
def test_disk_full_while_saving(folder: Path, part: int, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, target, written = bits(folder), folder if there else folder.parent / "new", []
    real = atomic._write_synced

    def full(path: Path, data: bytes) -> None:
        if len(written) == part:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        real(path, data)

    monkeypatch.setattr(atomic, "_write_synced", full)
    with pytest.raises(OSError, match="No space left on device"):
        lt.save(adapted(seed=2), target)
    assert bits(folder) == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]


def test_the_rename_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(folder)

    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        lt.save(adapted(seed=2), folder)
    assert bits(folder) == before
