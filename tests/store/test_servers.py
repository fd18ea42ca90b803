"""What vLLM and LoRAX would not serve is refused, each reason by its message; what they would is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratory as lt
from loratory.store.servers import check_server, serve_line
from tests.oracle.pairs import randomised
from tests.runtime.models import tiny_bert, tiny_gpt2

SERVERS = ("vllm", "lorax")
Q0 = r"layer 'model\.layers\.0\.self_attn\.q_proj'"


def adapted(model: Any, method: lt.Method, **options: Any) -> Any:
    lt.adapt(model, method, **options)
    randomised(model)
    return model


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("method", "options", "export"),
    [
        (lt.LoRA(rank=8, alpha=16), {"where": "all-linear"}, {}),
        (lt.LoRA(rank=4, alpha=8, rslora=True), {"where": "q_proj, v_proj"}, {}),
        (lt.DoRA(rank=4), {"where": "q_proj"}, {"rank": 16, "limit": 1.0}),
    ],
    ids=["LoRA", "rsLoRA", "DoRA as LoRA"],
)
def test_what_is_served(
    server: Any, method: lt.Method, options: Any, export: Any, stories: Callable[[], Any], tmp_path: Path
):
    model = adapted(stories(), method, **options)
    lt.export(model, tmp_path / "out", to="peft", server=server, **export)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    check_server(model, tmp_path / "out", server)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (lt.DoRA(rank=4), {}, r"DoRA is not supported: export the nearest LoRA with rank="),
        (lt.LoRA(rank=4), {"also_train": "norm"}, r"modules_to_save holds .*norm.*, it must be empty: train without also_train="),
        (lt.LoRA(rank=4), {"per_layer": {"0.self_attn.q_proj": {"rank": 2}}}, Q0 + r" has r 2 where others have 4, and one r is read for all"),
        (lt.LoRA(rank=4, alpha=4), {"per_layer": {"0.self_attn.q_proj": {"alpha": 1}}}, Q0 + r" has lora_alpha 1 where others have 4"),
        (lt.LoRA(rank=4), {"where": "embed_tokens, q_proj"}, r"layers named embed_tokens are not served with LoRA, only q_proj, k_proj"),
    ],
    ids=["dora", "in full", "rank", "alpha", "embedding"],
)  # fmt: skip
def test_what_is_not(
    server: Any, method: lt.Method, options: Any, message: str, stories: Callable[[], Any], tmp_path: Path
):
    model = adapted(stories(), method, **{"where": "q_proj"} | options)
    with pytest.raises(ValueError, match=rf"{server} would not serve this adapter as it was trained: .*{message}"):
        lt.export(model, tmp_path / "out", to="peft", server=server)
    assert list(tmp_path.iterdir()) == []
    lt.export(model, tmp_path / "out", to="peft")


def test_every_reason_is_named(tmp_path: Path):
    model = adapted(tiny_bert(), lt.DoRA(rank=4), where="query", bias="adapted", also_train="classifier")
    with pytest.raises(
        ValueError, match=r"DoRA .*; modules_to_save holds classifier.*; bias is 'lora_only'.*; layers named query"
    ):
        lt.export(model, tmp_path / "out", to="peft", server="vllm")
    model = adapted(tiny_gpt2(), lt.LoRA(rank=4), where="c_attn")
    with pytest.raises(ValueError, match=r"layers named c_attn are not served"):
        lt.export(model, tmp_path / "out", to="peft", server="lorax")


def test_ranks(stories: Callable[[], Any], tmp_path: Path):
    lt.export(adapted(stories(), lt.LoRA(rank=20), where="gate_proj"), tmp_path / "a", to="peft", server="vllm")
    assert "--max-lora-rank 32 --lora-modules a=" in serve_line(tmp_path / "a", "base", "vllm")
    assert serve_line(tmp_path / "a", "base", "lorax").startswith(
        "serve it with: lorax-launcher --model-id base --adapter-id"
    )
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for rank, refused in ((128, ()), (129, ("lorax",)), (512, ("lorax",)), (513, SERVERS)):
        file.write_text(json.dumps(config | {"r": rank}))
        for server in SERVERS:
            if server in refused:
                with pytest.raises(ValueError, match=rf"rank {rank} is above (128|512), the largest"):
                    check_server(stories(), tmp_path / "a", server)
            else:
                check_server(stories(), tmp_path / "a", server)


def test_lorax_serves_a_kind_of_layer_in_all_blocks_or_in_none(stories: Callable[[], Any], tmp_path: Path):
    model = adapted(stories(), lt.LoRA(rank=4), where="q_proj", blocks=[0, 1])
    lt.export(model, tmp_path / "a", to="peft", server="vllm")
    message = (
        r"'model\.layers\.2\.self_attn\.q_proj' has no factors while other q_proj layers have, and then none is served"
    )
    with pytest.raises(ValueError, match=message):
        lt.export(model, tmp_path / "b", to="peft", server="lorax")


def test_wrong_servers(stories: Callable[[], Any], tmp_path: Path):
    model = adapted(stories(), lt.LoRA(rank=4), where="q_proj")
    with pytest.raises(ValueError, match=r"server is 'tgi'; it must be one of lorax, vllm"):
        lt.export(model, tmp_path / "a", to="peft", server="tgi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"server is 'vllm', which checks PEFT folders, but to is 'merged'"):
        lt.export(model, tmp_path / "a", server="vllm")
    assert list(tmp_path.iterdir()) == []
