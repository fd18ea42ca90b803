"""What `import loratory` costs, and which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import loratory

SRC = Path(loratory.__file__).parent
HEAVY = ("transformers", "accelerate", "datasets", "peft", "trl", "rich", "matplotlib", "pandas", "pyarrow", "yaml", "jsonargparse",
         "sacrebleu", "seqeval", "gguf", "torch.distributed.fsdp", "torch._dynamo", "torch._inductor", "fastapi")  # fmt: skip

ARROWS = {  # part -> the parts it may import; nothing imports cli
    "ops": set(),
    "sites": {"ops"},
    "methods": {"sites", "ops"},
    "runtime": {"methods", "sites", "ops"},
    "store": {"runtime", "methods", "sites", "ops"},
    "tasks": {"runtime", "methods", "sites", "ops"},
    "plan": {"runtime", "methods", "sites", "ops"},
    "train": {"plan", "tasks", "store", "runtime", "methods", "sites", "ops"},
    "serve": {"store", "runtime", "methods", "sites", "ops"},
    "report": set(),
    "compare": {"report", "plan", "train", "tasks", "store", "runtime", "methods", "sites", "ops"},
    "catalogue": {
        "compare",
        "report",
        "plan",
        "train",
        "tasks",
        "store",
        "transforms",
        "runtime",
        "methods",
        "sites",
        "ops",
    },
}


def imported(file: Path) -> set[str]:
    """Parts of loratory that a file imports, inside functions and for type checks too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = {tuple(name.split("."))[1] for name in names if name.startswith("loratory.")}
    return {part for part in parts if (SRC / part).is_dir()}


def test_arrows_point_down():
    wrong = []
    for part, allowed in ARROWS.items():
        files = list((SRC / part).rglob("*.py"))
        assert files, part
        for file in files:
            upward = imported(file) - allowed - {part}
            wrong += [f"{file.relative_to(SRC)} imports {name}" for name in sorted(upward)]
    assert not wrong


def test_nothing_imports_cli():
    files = [f for f in SRC.rglob("*.py") if "cli" not in f.relative_to(SRC).parts and f.name != "__main__.py"]
    assert [str(f) for f in files if "cli" in imported(f)] == []


def test_methods_know_no_layer_types():
    for file in (SRC / "methods").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for word in ("nn.Linear", "nn.Conv", "nn.Embedding", ".to(device", ".cuda("):
            assert word not in text, f"{file.name} says {word}"


def test_import_brings_torch_and_nothing_heavier():
    code = f"""
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import_torch = set(sys.modules)
import loratory
end = time.perf_counter()
print([name for name in {HEAVY!r} if name in sys.modules and name not in import_torch])
print(f"import torch {{middle - start:.2f}} s, loratory {{end - middle:.2f}} s more")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    print(out[1])
    assert out[0] == "[]"


def test_the_public_surface_is_what_it_says():
    assert sorted(loratory.__all__) == sorted(set(loratory.__all__))
    for name in loratory.__all__:
        assert hasattr(loratory, name), name
        assert name == "__version__" or getattr(loratory, name).__doc__, name
