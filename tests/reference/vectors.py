"""Reads a set of reference numbers and keeps account of them: every tensor must be used as input or compared."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

OWN = Path(__file__).parent.parent / "vectors"


class Vectors:
    """One sheet's numbers. `given` hands out an input, `compare` checks an expected one at its own tolerance."""

    def __init__(self, sheet: str) -> None:
        folder = Path(os.environ.get("LORATORY_VECTORS") or OWN)
        self.about: dict[str, Any] = json.loads((folder / f"{sheet}.json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = self.about["settings"]
        self.tensors = load_file(folder / f"{sheet}.safetensors")
        self.unused = set(self.tensors)
        self.failures: list[str] = []
        self._rules = [(self._pattern(name), rule) for name, rule in self.about["tensors"].items()]
        for name, tensor in self.tensors.items():
            self._rule(name)
            shape, dtype = self.about["shapes"][name]
            assert list(tensor.shape) == shape, name
            assert str(tensor.dtype).removeprefix("torch.") == dtype, name

    def given(self, name: str) -> Tensor:
        assert self._rule(name)["role"] == "given", f"{name} is expected, not given"
        self.unused.discard(name)
        return self.tensors[name].clone()

    def compare(self, name: str, found: Tensor) -> None:
        rule = self._rule(name)
        assert rule["role"] == "expect", f"{name} is given, not expected"
        self.unused.discard(name)
        limit = self.about["tolerance"][rule["tolerance"]]
        try:
            torch.testing.assert_close(found.detach(), self.tensors[name], rtol=limit["rtol"], atol=limit["atol"])
        except AssertionError as e:
            self.failures.append(f"{name}: {e}")

    def finish(self) -> None:
        assert not self.failures, "\n".join(self.failures)
        assert not self.unused, f"neither used nor compared: {sorted(self.unused)}"

    def _rule(self, name: str) -> dict[str, Any]:
        rules = [rule for pattern, rule in self._rules if pattern.fullmatch(name)]
        assert rules, f"no rule of the .json covers tensor {name}"
        return rules[0]

    def _pattern(self, name: str) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", name)
        holders = self.about["form"]["placeholders"]
        return re.compile("".join(f"(?:{holders[p]['regex']})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))
