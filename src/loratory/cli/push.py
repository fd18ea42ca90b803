"""`loratory push`: an adapter and its card on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory push ADAPTER OWNER/NAME [--private] [--revision BRANCH]"


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """Push an adapter's files as they are, with a model card; its base is not needed."""

    adapter: str  # adapter folder (ours or PEFT's), or output_dir of a run
    repo_id: str  # owner/name on the hub; made if it is not there
    private: bool = False  # a repository made now is private
    revision: str | None = None  # branch to push to; made if it is not there
    message: str | None = None  # of the commit


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(PushSettings, USAGE))
        return 0
    settings = parse(PushSettings, arguments, positional=("adapter", "repo_id"))
    import loratory as lt

    address = lt.push_to_hub(
        settings.adapter,
        settings.repo_id,
        private=settings.private,
        revision=settings.revision,
        message=settings.message,
    )
    print(f"pushed to {address}")
    return 0
