"""What all tests share: one thread, a fixed seed, the everyday model, the folder of reference vectors."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def stories() -> Callable[[], Any]:
    """stories260k, a real trained Llama of 1 MB: each call gives a fresh model with a `tokenizer` beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fresh() -> Any:
        model = AutoModelForCausalLM.from_pretrained(HERE / "models" / "stories260k").eval()
        model.__dict__["tokenizer"] = AutoTokenizer.from_pretrained(HERE / "models" / "stories260k")
        return model

    return fresh


@pytest.fixture
def vectors() -> Path:
    """The folder of reference vectors: LORATORY_VECTORS, or the project's own copy."""
    return Path(os.environ.get("LORATORY_VECTORS") or HERE / "vectors")


@pytest.fixture
def compiling() -> Iterator[None]:
    """For tests of torch.compile: the shape checks of jaxtyping, which it cannot trace, are off; its caches are emptied."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
    torch._dynamo.reset()
