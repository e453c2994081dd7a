"""What the Hugging Face hub's refusals mean to a user, and publishing an adapter there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mlora.model import card, files
from mlora.model.errors import ModelError
from mlora.network import ASKED_FOR, ask_hub, why_offline

LOGIN = "log in with `hf auth login`"


def advice(error: BaseException, name: str) -> str:
    """Return what to do about something that the hub, or the way there, refused.

    Args:
        error: as raised, with its causes.
        name: of the repository.
    """
    from huggingface_hub import errors

    raised = list(_causes(error))
    if any(isinstance(e, errors.GatedRepoError) for e in raised) or "gated repo" in str(error):
        return f"{name} is gated: ask for access at https://huggingface.co/{name}, then {LOGIN}"
    offline = why_offline()
    if offline or any(isinstance(e, errors.OfflineModeIsEnabled) for e in raised):
        return f"{offline or ASKED_FOR}, and no cached copy was found"
    if any(isinstance(e, errors.LocalTokenNotFoundError) for e in raised) or _status(raised) in (401, 403):
        return f"the hub wants to know who asks, or does not let you: {LOGIN}"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in raised):
        return f"there is no such repository; a private one needs you to {LOGIN}"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in raised):
        return "--revision names no branch, tag or commit of it"
    return f"a hub id needs a connection or a cached copy, a private or gated one that you {LOGIN}"


def push(
    adapter: str, repo: str, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload an adapter folder, its model card included, to the hub, and return its address.

    Args:
        adapter: folder.
        repo: "user/name"; made where there is none.
        private: whether a new repository is.
        revision: branch to push to, made where there is none; None for the main one.
        message: of the commit.

    Raises:
        ModelError: the folder is no whole adapter, or the hub refuses; the message says what to do.
    """
    from huggingface_hub import HfApi

    folder = Path(adapter).expanduser()
    contents = files.read(folder, allow_pickle=False)
    if not (folder / "README.md").exists():
        card.write_for_adapter(folder, None, contents[0], contents[2] or "an unknown base model", None)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", repo, re.ASCII):
        raise ModelError(f"--repo {repo}: is not allowed; allowed: user/name, of letters, digits and ._-")
    ask_hub()
    if offline := why_offline():
        raise ModelError(f"--repo {repo}: not pushed: {offline}; pushing needs a connection")
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        kept = [files.CONFIG, files.TENSORS, "README.md"]
        text = message or f"Adapter {folder.resolve().name}"
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=kept, commit_message=text, revision=revision
        )
    except (OSError, ValueError) as error:  # of the hub's errors, those that a user can mend
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"--repo {repo}: not pushed: {reason} ({advice(error, repo)})") from error
    return str(commit.commit_url)


def main(**flags: str | bool | None) -> int:
    """Push, and return the exit status."""
    try:
        print(f"Pushed: {push(**flags)}")  # type: ignore[arg-type]
        return 0
    except ModelError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _status(raised: list[BaseException]) -> int | None:
    return next((r.status_code for e in raised if (r := getattr(e, "response", None)) is not None), None)
