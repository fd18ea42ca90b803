"""Adapters by their name on the hub: `owner/name`, or `owner/name@revision`."""

import re
from pathlib import Path

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
FILES = (
    ("adapter.json", "adapter.safetensors"),
    ("adapter_config.json", "adapter_model.safetensors"),
)  # never a pickle


def fetch(name: str) -> Path:
    """The folder of the hub's cache that holds the adapter files of a repository, downloaded if they are not there.

    Raises FileNotFoundError (no such repository, revision or adapter), PermissionError (private, gated), ConnectionError (offline).
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    match = NAME.fullmatch(name)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    files = [file for pair in FILES for file in pair]
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=[*files, *(f"adapter/{file}" for file in files)]
        )
    except (OSError, HTTPError) as e:
        raise explained(e, repo, revision, f"there is no folder '{name}' here, and ") from e
    path = Path(found)
    for record, tensors in FILES:
        for folder in (path, path / "adapter"):
            if (folder / record).exists() and not (folder / tensors).exists():
                raise FileNotFoundError(
                    f"'{name}' on {constants.ENDPOINT} holds {record} but not {tensors}; if it holds a pickle (.bin) instead, it is never "
                    "fetched: ask its owner for safetensors"
                )
            if (folder / record).exists():
                return folder
    raise FileNotFoundError(
        f"'{name}' on {constants.ENDPOINT} holds no adapter ({' or '.join(pair[0] for pair in FILES)}); is it the name of a base model?"
    )


def explained(error: Exception, repo: str, revision: str | None, before: str = "") -> OSError:
    """One message for what the hub refused, or for a hub that did not answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, GatedRepoError):
        return PermissionError(f"'{repo}' is gated: accept its terms at {hub}/{repo}, and {log_in}")
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(
            f"'{repo}' on {hub} has no branch, tag or commit '{revision or 'main'}'; correct the revision"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{before}no repository '{repo}' that you may read on {hub}; correct the name, or, if it is private, {log_in}"
        )
    if status in (401, 403):
        return PermissionError(
            f"{hub} does not let you use '{repo}' ({_first_line(cause)}); {log_in} with a token that may"
        )
    if isinstance(cause, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return ConnectionError(
            f"{before}'{repo}' is not in the hub's cache, while HF_HUB_OFFLINE forbids to fetch it; unset it"
        )
    return ConnectionError(
        f"{before}{hub} could not be asked for '{repo}' ({type(cause).__name__}: {_first_line(cause)}); try again, or give a local folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
