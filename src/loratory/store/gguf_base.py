"""A GGUF file as a frozen base: the blocks stay packed and are unpacked layer by layer on use."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from loratory.ops import ggml
from loratory.sites.packed import Packed, PackedEmbedding, PackedLinear

ROWS_PERMUTED = {"llama"}  # llama.cpp stores q and k of these with their rows in rotary order
IN_ORDER = {"qwen2", "qwen3"}  # stored as transformers has them


def load_gguf(
    file: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: Literal["cpu", "meta"] = "cpu"
) -> Any:
    """The causal language model of a GGUF file, its matrices packed as the file has them; everything else in `dtype`.

    The model computes in `dtype` and is frozen: adapt it. Its tokenizer: AutoTokenizer.from_pretrained(folder, gguf_file=name).
    The whole model is never in memory in full precision; a layer is, while it runs. device "meta": shapes alone, no data is read.
    Raises FileNotFoundError; ImportError without the package gguf; ValueError for an architecture or a block format that is not
    known here, tensors that are missing or left over.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'; give a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {path.name} needs the package gguf; run: pip install 'loratory[gguf]'")
    import gguf
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be read as a GGUF file; {str(error).splitlines()[0]}") from error
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in ROWS_PERMUTED | IN_ORDER:
        raise ValueError(
            f"'{path}' holds a model of architecture {architecture}, whose order of weights is not known here; known are "
            f"{', '.join(sorted(ROWS_PERMUTED | IN_ORDER))}: unpack the file instead (transformers' from_pretrained with gguf_file=)"
        )
    stored = {t.name: t for t in reader.tensors}
    for t in stored.values():
        if t.tensor_type.name not in {"F32", *ggml.FORMATS}:
            raise ValueError(
                f"tensor '{t.name}' of '{path}' is stored as {t.tensor_type.name}; known are F32, {', '.join(ggml.FORMATS)}: "
                "convert the file, or unpack it instead (transformers' from_pretrained with gguf_file=)"
            )
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = gguf.get_tensor_name_map(_architecture(gguf, architecture), config.num_hidden_layers)
    heads = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if architecture in ROWS_PERMUTED
        else {}
    )
    tied = model.get_output_embeddings() if config.tie_word_embeddings else None
    for name in list(dict(model.named_parameters())):
        owner, _, leaf = name.rpartition(".")
        if tied is not None and model.get_submodule(owner) is tied:
            continue
        key = f"{names.get_name(owner)}.{leaf}"
        tensor = stored.pop(key, None)
        if tensor is None:
            raise ValueError(f"'{path}' has no tensor '{key}' for '{name}'; it is another kind of model, or damaged")
        order = heads.get(key.split(".")[-2])
        _fill(model, owner, leaf, tensor, dtype, order, device)
    if stored:
        raise ValueError(
            f"'{path}' holds a tensor '{next(iter(stored))}' that a {type(model).__name__} has no place for; without it the model would "
            "be another: unpack the file instead (transformers' from_pretrained with gguf_file=)"
        )
    if tied is not None:
        _tie(model, dtype)
    model.config._name_or_path = str(path)
    return model.requires_grad_(False).eval()


def _architecture(gguf: Any, name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _fill(
    model: nn.Module, owner: str, leaf: str, tensor: Any, dtype: torch.dtype, heads: int | None, device: str
) -> None:
    """Put one tensor of the file into the model: packed where it is a matrix, in `dtype` elsewhere."""
    module: Any = model.get_submodule(owner)
    wanted = tuple(module._parameters[leaf].shape)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if shape != wanted:
        raise ValueError(
            f"tensor '{tensor.name}' is {shape}, but '{owner}.{leaf}' must be {wanted}; the file is damaged"
        )
    kind = tensor.tensor_type.name
    rows = torch.from_numpy(tensor.data.copy()) if device != "meta" else _without_data(tensor.data)
    if kind != "F32":
        rows = rows.view(torch.uint8).view(*shape[:-1], -1)
    if heads is not None:
        rows = _in_order(rows, heads)
    if kind == "F32" or len(shape) == 1:
        W = rows if kind == "F32" else ggml.unpack(kind, rows.view(1, -1)).view(shape)
        module._parameters[leaf] = nn.Parameter(W.to(dtype), requires_grad=False)
        return
    parent, _, name = owner.rpartition(".")
    packed: Packed
    if type(module) is nn.Linear:
        packed = PackedLinear(kind, {"blocks": rows}, shape[1], module.bias, dtype)
    elif type(module) is nn.Embedding:
        packed = PackedEmbedding(kind, {"blocks": rows}, shape[1], module.padding_idx, dtype)
    else:
        raise ValueError(f"'{owner}' is a {type(module).__name__}, which cannot stay packed; unpack the file instead")
    setattr(model.get_submodule(parent), name, packed)


def _without_data(array: Any) -> torch.Tensor:
    return torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), device="meta")


def _in_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of q and k rows: of each head, the two numbers that rotate together stand side by side there."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _tie(model: Any, dtype: torch.dtype) -> None:
    """The output head reads the embedding's own tensors."""
    table = model.get_input_embeddings()
    if isinstance(table, PackedEmbedding):
        model.set_output_embeddings(PackedLinear(table.packing, table.stored(), table.inputs, None, dtype))
    else:
        model.get_output_embeddings().weight = table.weight
