"""PEFT folders that cannot be kept exactly are refused before the model changes, and what PEFT cannot hold is not written."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import loratory as lt
from loratory.methods.method import trained


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.ModuleDict(
        {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), "conv": nn.Conv2d(4, 4, 3, groups=2), "head": nn.Linear(3, 2)}
    )


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A PEFT folder by hand, as the format is written down."""
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["a", "b"],
        "base_model_name_or_path": "some/base",
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = good()
    safetensors.torch.save_file(
        {f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def good() -> dict[str, torch.Tensor]:
    shapes = {
        "a.lora_A.weight": (2, 6),
        "a.lora_B.weight": (8, 2),
        "b.lora_A.weight": (2, 8),
        "b.lora_B.weight": (3, 2),
    }
    return {k: torch.randn(shape) for k, shape in shapes.items()}


def refused(folder: Path, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    model = net()
    with pytest.raises(error, match=message):
        lt.load(model, folder, **options)
    assert type(model["a"]) is nn.Linear
    assert not any("loratory" in n for n, _ in model.named_modules())


def test_the_plain_folder_is_read(tmp_path: Path) -> None:
    model, tensors = net(), good()
    lt.load(model, write(tmp_path, tensors))
    x = torch.randn(3, 6)
    wanted = net()["a"](x) + 2 * x @ tensors["a.lora_A.weight"].T @ tensors["a.lora_B.weight"].T
    torch.testing.assert_close(model["a"](x), wanted)
    seen = lt.inspect(tmp_path)
    assert (seen.method, seen.hyperparameters["rank"], seen.hyperparameters["alpha"]) == ("lora", 2, 4.0)
    assert set(seen.layers) == {"a", "b"}
    assert seen.numbers == sum(t.numel() for t in tensors.values())
    assert all(part in str(seen) for part in ("PEFT", "lora (rank=2", "some/base", "layers   2: a, b"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("lora_bias", True),
        ("megatron_config", {"hidden_size": 8}),
        ("monteclora_config", {"samples": 8}),
        ("trainable_token_indices", [1, 2]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"scale": 1}),
        ("option_of_next_year", True),
    ],
)
def test_options_that_change_the_mathematics(tmp_path: Path, key: str, value: Any) -> None:
    refused(
        write(tmp_path, **{key: value}),
        rf"sets {key}=.*: .*, so the adapter would not compute the same here; merge it with PEFT",
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_changed_the_base(tmp_path: Path, start: str) -> None:
    refused(
        write(tmp_path, init_lora_weights=start),
        rf"init_lora_weights='{start}', a start that changed the base weights.*path_initial_model_for_weight_conversion",
    )


def test_every_option_of_peft_is_decided() -> None:
    import dataclasses

    from peft import LoraConfig

    from loratory.store import peft_config

    decided = peft_config._READ | peft_config._WITHOUT_EFFECT | set(peft_config._REFUSED)
    assert {f.name for f in dataclasses.fields(LoraConfig)} == decided


def test_starts_that_leave_the_base_alone(tmp_path: Path) -> None:
    for start in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        lt.load(net(), write(tmp_path, init_lora_weights=start))
    refused(
        write(tmp_path, init_lora_weights="mica"),
        r"is a MiCA adapter, whose B is not trained; load it without trainable=True",
        trainable=True,
    )


def test_other_kinds_of_adapters(tmp_path: Path) -> None:
    refused(write(tmp_path, peft_type="LOHA"), r"has peft_type 'LOHA'; of PEFT's adapters LORA .* is read")
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(tmp_path, r"has peft_type 'list'")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LO')
    refused(tmp_path, r"adapter_config.json' is not valid JSON .* damaged: take another copy")


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    tensors = good()
    del tensors["a.lora_B.weight"]
    refused(
        write(tmp_path, tensors),
        r"lacks 1 of the 4 tensors that adapter_config.json asks for in this ModuleDict: 'a.lora_B.weight'; load the base it was made for \('some/base'\)",
    )
    refused(
        write(tmp_path, good() | {"c.lora_A.weight": torch.ones(2, 2)}),
        r"holds 1 tensors that have no place in this ModuleDict: 'c.lora_A.weight'",
    )
    refused(
        write(tmp_path, good() | {"a.lora_magnitude_vector": torch.ones(8)}),
        r"no place in this ModuleDict: 'a.lora_magnitude_vector'",
    )
    refused(write(tmp_path, good() | {"head.weight": torch.ones(2, 3)}), r"no place in this ModuleDict: 'head.weight'")
    refused(
        write(tmp_path, good() | {"b.lora_A.weight": torch.ones(2, 9)}),
        r"'b.lora_A.weight' is \(2, 9\) in .*, but this ModuleDict and adapter_config.json give \(2, 8\); load the base it was made for",
    )
    refused(write(tmp_path, r=3), r"'a.lora_A.weight' is \(2, 6\) in .* give \(3, 6\).*correct r and rank_pattern")
    refused(
        write(tmp_path, use_dora=True),
        r"lacks 2 of the 6 tensors .*: 'a.lora_magnitude_vector', 'b.lora_magnitude_vector'",
    )
    refused(write(tmp_path, modules_to_save=["head"]), r"lacks 2 of the 6 tensors .*: 'head.weight', 'head.bias'")
    refused(write(tmp_path, bias="lora_only"), r"lacks 2 of the 6 tensors .*: 'a.bias', 'b.bias'")
    refused(
        write(tmp_path, target_modules=["q_proj"]),
        r"no layer of this ModuleDict matches target_modules=\['q_proj'\].*load the base it was made for",
    )


def test_damaged_files(tmp_path: Path) -> None:
    file = write(tmp_path) / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    refused(tmp_path, r"cannot be read as safetensors .*it is damaged: take another copy")
    file.unlink()
    refused(
        tmp_path,
        r"holds adapter_config.json but not adapter_model.safetensors; copy the whole folder",
        FileNotFoundError,
    )
    refused(
        write(tmp_path, good() | {"a.lora_A.weight": torch.full((2, 6), float("nan"))}),
        r"'base_model.model.a.lora_A.weight' holds NaN or infinity",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r=0|rank is 0; it must be a positive integer"),
        ({"r": "8"}, "r='8' and bias=None; r must be a positive integer"),
        ({"lora_alpha": 0}, "alpha is 0.0; it must be a positive, finite number"),
        ({"lora_dropout": 1.5}, r"dropout is 1.5; it must lie in \[0, 1\)"),
        ({"bias": "some"}, "bias='some'; r must be a positive integer, bias none, all or lora_only"),
        ({"target_modules": None}, "has target_modules=None; it must name the adapted layers"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    refused(write(tmp_path, **values), message)


def conv(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, **options))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (lt.LoRA(rank=1), {"dilation": 2}, r"layer '0' has dilation \(2, 2\), which PEFT leaves out of its A"),
        (
            lt.LoRA(rank=1),
            {"padding": 1, "padding_mode": "circular"},
            r"layer '0' has padding_mode 'circular', while PEFT's A pads with zeros",
        ),
        (lt.DoRA(rank=1), {"groups": 2}, r"layer '0' has 2 groups, for which PEFT's DoRA has no definition"),
    ],
)
def test_convolutions_that_peft_runs_differently(
    tmp_path: Path, method: Any, options: dict[str, Any], message: str
) -> None:
    model = conv(**options)
    lt.adapt(model, method, "conv")
    with pytest.raises(ValueError, match=message):
        lt.export(model, tmp_path / "out", to="peft")
    write(tmp_path / "a", {}, target_modules=["0"], use_dora=isinstance(method, lt.DoRA))
    with pytest.raises(ValueError, match=message):
        lt.load(conv(**options), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": lt.Full()},
            r"adapter 'default' \(Full\) has no low-rank layer, and PEFT's format needs one; write the merged model instead",
        ),
        (
            {"method": lt.LoRA(rank=1), "where": ["a"], "also_train": ["head.weight"]},
            r"'head.weight' is trained in full, but not the whole module it belongs to",
        ),
        (
            {"method": lt.LoRA(rank=1), "where": ["b"], "also_train": ["a"]},
            r"the module 'a' is trained in full, but under that name PEFT would also take 'xa'",
        ),
    ],
)
def test_what_peft_cannot_hold(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({**net(), "xa": nn.Linear(2, 2)})
    lt.adapt(model, **options)
    with pytest.raises(ValueError, match=message):
        lt.export(model, tmp_path / "out", to="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_a_low_rank_form(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Shift(lt.Method):
        """Shift: a trained weight beside the base's."""

        def init(self, site: Any) -> Any:
            return {"D": trained(torch.zeros(site.shape))}

        def delta(self, t: Any) -> torch.Tensor:
            return t.D

    model = net()
    lt.adapt(model, Shift(), ["a"])
    with pytest.raises(
        ValueError,
        match=r"PEFT's format has no place for Shift, whose update is not of low rank; write the merged model instead",
    ):
        lt.export(model, tmp_path / "out", to="peft")


def test_dropout_that_differs_by_layer_is_said(tmp_path: Path) -> None:
    model = net()
    lt.adapt(model, lt.LoRA(rank=1, dropout=0.1), ["a", "b"], per_layer={"b": {"dropout": 0.5}})
    with pytest.warns(
        UserWarning, match=r"PEFT has one dropout for all layers: 0.1 was written, while layer 'b' has 0.5"
    ):
        lt.export(model, tmp_path / "out", to="peft")
