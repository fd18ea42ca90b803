"""Pushing an adapter and its card to the hub."""

import os
import tempfile
from pathlib import Path

from torch import nn

from loratory.store.card import CARD, card, check_card, named
from loratory.store.hub import FILES, NAME, explained
from loratory.store.load import find_adapter, inspect
from loratory.store.native import save


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    name: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Push an adapter (of a model, or of a folder of ours or PEFT's) and its card to the hub; returns the commit's address.

    The repository `owner/name` is made if it is not there; private=True for one that others do not see. One commit replaces the
    adapter that was in it (the other format's files go too); other files stay. A folder's own README.md is pushed, otherwise a
    card is written. revision: a branch, made if it is not there. token: default is that of `hf auth login` or HF_TOKEN.
    Raises ValueError (damaged files, a card of another adapter, a public repository where private was asked), PermissionError,
    FileNotFoundError, ConnectionError; the files are checked before the hub is asked.
    """
    match = NAME.fullmatch(repo_id)
    if match is None or match["revision"]:
        raise ValueError(f"repo_id is '{repo_id}'; it must be owner/name" + ("; give revision= apart" if match else ""))
    if isinstance(model_or_folder, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            save(model_or_folder, folder, name=name)
            return _push(Path(folder), repo_id, private, revision, token, message)
    if name is not None:
        raise ValueError(
            f"name={name!r} chooses an adapter of a model, but a folder was given, which holds one; leave name out"
        )
    return _push(find_adapter(model_or_folder), repo_id, private, revision, token, message)


def _push(
    folder: Path, repo_id: str, private: bool, revision: str | None, token: str | None, message: str | None
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    files = [file for pair in FILES for file in pair if all((folder / each).is_file() for each in pair)]
    found = inspect(folder)
    if (folder / CARD).is_file():
        check_card(folder)
        text = (folder / CARD).read_text(encoding="utf-8")
    else:
        text = card(found)
    text = named(text, repo_id, None if revision == "main" else revision)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"'{repo_id}' exists and is public; make it private on the hub first, or push to another name"
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        old = [file for pair in FILES for file in pair if file in there and file not in files]
        commit = api.create_commit(  # not upload_folder, which may split what belongs together into several commits
            repo_id,
            [
                CommitOperationAdd(CARD, text.encode()),
                *(CommitOperationAdd(file, str(folder / file)) for file in files),
                *(CommitOperationDelete(file) for file in old),
            ],
            commit_message=message or f"{found.method} adapter, written by Loratory",
            revision=revision,
        )
    except (OSError, HTTPError) as e:
        raise explained(e, repo_id, revision) from e
    return str(commit.commit_url)
