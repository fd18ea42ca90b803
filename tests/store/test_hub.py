"""Adapters pushed to a hub and loaded from it by name; a local server stands in for it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import loratory as lt
from loratory.cli import main
from tests.oracle.pairs import randomised
from tests.store.local_hub import TOKEN, LocalHub, Repo
from tests.store.test_round_trip import logits

NATIVE = {"adapter.json", "adapter.safetensors", "README.md", ".gitattributes"}
PEFT = {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """As HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_DISABLE_XET set it at the start of a process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    with LocalHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def adapted(stories: Callable[[], Any]) -> Any:
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj", "down_proj"], also_train=["model.norm"])
    randomised(model)
    return model


def test_pushed_and_loaded_by_name(hub: LocalHub, adapted: Any, stories: Callable[[], Any]) -> None:
    address = lt.push_to_hub(adapted, "ann/dragon", private=True, message="first")
    repo = hub.repos["ann/dragon"]
    assert (repo.private, repo.messages) == (True, ["initial commit", "first"])
    assert address == f"{hub.url}/ann/dragon/commit/{repo.heads['main']}"
    assert set(repo.files("main") or {}) == NATIVE
    other = stories()
    lt.load(other, "ann/dragon")
    assert torch.equal(logits(other), logits(adapted))
    assert not any("README" in each for each in hub.asked if each.startswith("GET"))
    assert lt.inspect("ann/dragon").method == "lora"
    card = (repo.files("main") or {})["README.md"].decode()
    assert 'lt.load(model, "ann/dragon")' in card


def test_a_peft_adapter(hub: LocalHub, adapted: Any, stories: Callable[[], Any], tmp_path: Path) -> None:
    lt.export(adapted, tmp_path / "out", to="peft", card=True)
    lt.push_to_hub(tmp_path / "out", "ann/dragon")
    assert set(hub.repos["ann/dragon"].files("main") or {}) == PEFT
    other = stories()
    lt.load(other, "ann/dragon")
    assert float((logits(other) - logits(adapted)).abs().max()) <= 1e-5
    lt.push_to_hub(adapted, "ann/dragon")  # replaces what was there, the other format's files too
    assert set(hub.repos["ann/dragon"].files("main") or {}) == NATIVE


def test_a_branch(hub: LocalHub, adapted: Any, stories: Callable[[], Any]) -> None:
    lt.push_to_hub(adapted, "ann/dragon")
    first = logits(adapted)
    randomised(adapted, seed=5)
    lt.push_to_hub(adapted, "ann/dragon", revision="second")
    for name, wanted in (("ann/dragon", first), ("ann/dragon@second", logits(adapted))):
        other = stories()
        lt.load(other, name)
        assert torch.equal(logits(other), wanted)
    card = (hub.repos["ann/dragon"].files("second") or {})["README.md"].decode()
    assert 'lt.load(model, "ann/dragon@second")' in card
    with pytest.raises(FileNotFoundError, match=r"'ann/dragon' on .* has no branch, tag or commit 'third'"):
        lt.inspect("ann/dragon@third")


def test_only_adapter_files_travel(hub: LocalHub, adapted: Any, tmp_path: Path) -> None:
    lt.save(adapted, tmp_path / "run" / "adapter")
    for name in ("optimizer.pt", "adapter_model.bin", "thesis.txt"):
        (tmp_path / "run" / "adapter" / name).write_bytes(b"x")
    assert main(["push", "run", "ann/dragon", "--revision", "main"]) == 0
    assert set(hub.repos["ann/dragon"].files("main") or {}) == NATIVE


def test_a_local_folder_wins(hub: LocalHub, adapted: Any, tmp_path: Path) -> None:
    lt.push_to_hub(adapted, "ann/dragon")
    lt.save(adapted, tmp_path / "ann" / "dragon", training={"here": 1})
    hub.asked.clear()
    assert lt.inspect("ann/dragon").training == {"here": 1}
    assert hub.asked == []


def test_the_card_of_another_adapter_is_refused(hub: LocalHub, adapted: Any, tmp_path: Path) -> None:
    lt.save(adapted, tmp_path / "a", card=True)
    text = (tmp_path / "a" / "README.md").read_text() + "\nMy own words.\n"
    (tmp_path / "a" / "README.md").write_text(text)
    lt.push_to_hub(tmp_path / "a", "ann/dragon")
    assert "My own words." in (hub.repos["ann/dragon"].files("main") or {})["README.md"].decode()
    randomised(adapted, seed=5)
    lt.save(adapted, tmp_path / "a")
    hub.asked.clear()
    with pytest.raises(ValueError, match=r"README.md' describes another adapter.safetensors than the one beside it"):
        lt.push_to_hub(tmp_path / "a", "ann/dragon")
    assert hub.asked == []


def test_damaged_files_are_not_pushed(hub: LocalHub, adapted: Any, tmp_path: Path) -> None:
    lt.save(adapted, tmp_path / "a")
    data = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    (tmp_path / "a" / "adapter.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="checksum differs"):
        lt.push_to_hub(tmp_path / "a", "ann/dragon")
    assert hub.asked == []


def test_private_is_never_public(hub: LocalHub, adapted: Any) -> None:
    lt.push_to_hub(adapted, "ann/dragon")
    with pytest.raises(ValueError, match=r"'ann/dragon' exists and is public; make it private on the hub first"):
        lt.push_to_hub(adapted, "ann/dragon", private=True)
    assert len(hub.repos["ann/dragon"].commits) == 2


def test_what_the_hub_refuses(hub: LocalHub, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lt.push_to_hub(adapted, "ann/secret", private=True)
    lt.push_to_hub(adapted, "ann/gated")
    hub.repos["ann/gated"].gated = True
    lt.push_to_hub(adapted, "ann/open")
    hub.repos["ann/base"] = Repo()
    hub.repos["ann/base"].commit("main", {"config.json": b"{}"}, "a base")
    hub.repos["ann/pickle"] = Repo()
    hub.repos["ann/pickle"].commit("main", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "old")
    with pytest.raises(FileNotFoundError, match=r"'ann/base' on .* holds no adapter"):
        lt.inspect("ann/base")
    with pytest.raises(FileNotFoundError, match=r"not adapter_model.safetensors; if it holds a pickle .* never"):
        lt.inspect("ann/pickle")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "other")
    unknown = r"there is no folder 'ann/{0}' here, and no repository 'ann/{0}' that you may read on .*if it is private, log in"
    for name in ("nothing", "secret"):
        with pytest.raises(FileNotFoundError, match=unknown.format(name)):
            lt.inspect(f"ann/{name}")
    with pytest.raises(PermissionError, match=r"'ann/gated' is gated: accept its terms at"):
        lt.inspect("ann/gated")
    with pytest.raises(PermissionError, match=r"does not let you use 'ann/open' .*; log in"):
        lt.push_to_hub(adapted, "ann/open")
    with pytest.raises(PermissionError, match=r"does not let you use 'ann/new' .*; log in"):
        lt.push_to_hub(adapted, "ann/new")
    lt.push_to_hub(adapted, "ann/new", token=TOKEN)
    assert "ann/new" in hub.repos


def test_without_a_connection(
    hub: LocalHub, adapted: Any, stories: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lt.push_to_hub(adapted, "ann/dragon")
    lt.inspect("ann/dragon")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    other = stories()
    lt.load(other, "ann/dragon")  # from the cache
    assert torch.equal(logits(other), logits(adapted))
    with pytest.raises(
        ConnectionError, match=r"there is no folder 'ann/new' here, and .* could not be asked for 'ann/new'"
    ):
        lt.inspect("ann/new")
    with pytest.raises(ConnectionError, match=r"^http.* could not be asked for 'ann/new'"):
        lt.push_to_hub(adapted, "ann/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'ann/new' is not in the hub's cache, while HF_HUB_OFFLINE forbids"):
        lt.inspect("ann/new")


@pytest.mark.parametrize(
    ("name", "message"),
    [("dragon", "must be owner/name"), ("a/b/c", "must be owner/name"), ("a/b@main", "give revision= apart")],
)
def test_names_that_cannot_be(name: str, message: str, adapted: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"repo_id is '{name}'") + f".*{message}"):
        lt.push_to_hub(adapted, name)


def test_a_name_is_for_models(adapted: Any, tmp_path: Path) -> None:
    lt.save(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"name='b' chooses an adapter of a model, but a folder was given"):
        lt.push_to_hub(tmp_path, "ann/dragon", name="b")


def test_the_command_line_in_a_process_of_its_own(adapted: Any, stories: Callable[[], Any], tmp_path: Path) -> None:
    """HF_ENDPOINT itself: export and push, then the hub name is read by generate, and by the code of the card, PEFT's too."""
    lt.save(adapted, tmp_path / "run")
    code = """
from loratory.cli import main
assert main(["export", "run", "out", "--base", BASE, "--push", "ann/dragon", "--private"]) == 0
assert main(["generate", "ann/dragon", "Once upon", "--base", BASE, "--max_new_tokens", "4", "--json"]) == 0
assert main(["inspect", "ann/other"]) == 2
import re
from huggingface_hub import hf_hub_download
from tests.store.test_round_trip import logits
text = open(hf_hub_download("ann/dragon", "README.md")).read().replace("PATH/OF/stories260k", BASE)
peft, ours = re.findall("```python\\n(.*?)```", text, re.S)
assert 'PeftModel.from_pretrained(model, "ann/dragon")' in peft and 'lt.load(model, "ann/dragon")' in ours
found = []
for block in (peft, ours):
    place = {}
    exec(block, place)
    found.append(logits(place["model"]))
print(float((found[0] - found[1]).abs().max()))
from safetensors.torch import save_file
save_file({"logits": found[1]}, "found.safetensors")
"""
    base = str(Path(__file__).parents[1] / "models" / "stories260k")
    with LocalHub() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])]),
        }  # fmt: skip
        ran = subprocess.run([sys.executable, "-c", f"BASE = {base!r}\n{code}"], cwd=tmp_path, env=env, capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == [
        "wrote out (peft)",
        f"pushed to {hub.url}/ann/dragon/commit/{hub.repos['ann/dragon'].heads['main']}",
    ]
    assert float(lines[3]) <= 1e-4
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert float((found - logits(adapted)).abs().max()) <= 1e-5
    assert '"answer": "' in lines[2]
    assert hub.repos["ann/dragon"].private
    assert set(hub.repos["ann/dragon"].files("main") or {}) == PEFT
    assert "error: there is no folder 'ann/other' here, and no repository 'ann/other'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_flags_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "out", "--to", "merged", "--push", "ann/dragon"]) == 2
    assert "`hf upload owner/name out` pushes" in capsys.readouterr().err
    assert main(["export", "run", "out", "--private"]) == 2
    assert "give --push owner/name too" in capsys.readouterr().err
