"""No pickle is ever loaded: reading one can run any code."""

from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def refuse_pickles(folder: Path) -> None:
    """Raise ValueError if the folder holds a pickle (where tensors were looked for)."""
    if pickles := sorted(p.name for p in folder.iterdir() if p.name.endswith(PICKLES)):
        raise ValueError(
            f"'{folder / pickles[0]}' is a pickle, which can run any code when read, so it is never loaded; convert it to safetensors where you trust it"
        )
