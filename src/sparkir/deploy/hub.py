"""Files to and from a model repository on the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparkir.data.atomic import synced_file
from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a repository holds at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RepoSibling]

    def bytes_of(self, name: str) -> int:
        """Of a file, as the Hub says."""
        return self.files[name].size or 0


def require_hub() -> None:
    """Raise SparkirError if huggingface_hub is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SparkirError("the Hub needs its package; pip install 'sparkir[hub]'")


def require_repo_name(repo: str) -> None:
    """Raise SparkirError if `repo` cannot be the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise SparkirError(f"{repo!r} is no name of a repository; write OWNER/NAME")


def upload(
    files: Mapping[str, Path | bytes],
    repo: str,
    *,
    message: str,
    private: bool = False,
    replaced: Sequence[str] = (),
) -> str:
    """Make the repository if there is none, and commit files to it, all at once; its address.

    Args:
        files: name in the repository -> where the file is, or what is in it.
        repo: OWNER/NAME.
        message: of the commit.
        private: whether a new repository is.
        replaced: names that this commit speaks for: those that are not among `files` are deleted.

    Raises:
        SparkirError: huggingface_hub is missing, nobody is logged in, or the Hub refuses or cannot
            be reached.
    """
    require_hub()
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationCopy,
        CommitOperationDelete,
        HfApi,
        get_token,
    )

    if get_token() is None:
        raise SparkirError(f"nobody is logged in to the Hub; {_LOGIN}")
    with _explained(repo), _quiet():
        api = HfApi(library_name="sparkir")
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        old = set(api.list_repo_files(repo)) & set(replaced) - files.keys()
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in sorted(old)),
        ]
        api.create_commit(repo, operations, commit_message=message)
    return str(address)


def list_files(repo: str, *, revision: str | None = None) -> Listing:
    """What a repository holds; `revision` is a branch, a tag or a commit.

    Raises:
        SparkirError: as `upload`; or there is no such repository or revision.
    """
    require_hub()
    from huggingface_hub import HfApi

    with _explained(repo):
        found = HfApi(library_name="sparkir").model_info(
            repo, revision=revision, files_metadata=True
        )
    files = {sibling.rfilename: sibling for sibling in found.siblings or ()}
    return Listing(repo=repo, commit=found.sha or "", files=files)


def download(listing: Listing, names: Sequence[str], folder: Path) -> None:
    """Put files of a repository into a folder, each with the bytes that the Hub has a hash of.

    Files that were fetched before are taken from huggingface_hub's cache.

    Raises:
        SparkirError: as `list_files`; or a file arrived damaged, or cannot be written.
    """
    from huggingface_hub import snapshot_download

    with _explained(listing.repo), _quiet():
        cached = snapshot_download(
            listing.repo,
            revision=listing.commit,
            allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
            library_name="sparkir",
        )
    for name in names:
        content = (Path(cached) / name).read_bytes()
        if not _has_its_hash(listing.files[name], content):
            _forget(Path(cached) / name)
            raise SparkirError(
                f"{name} is not what the Hub has under its hash; it was damaged on its way or on "
                "this disk. Pull again"
            )
        try:
            with synced_file(folder / name) as file:
                file.write(content)
        except OSError as error:
            raise SparkirError(f"cannot write {name}: {one_line(error)}") from error


def _has_its_hash(known: RepoSibling, content: bytes) -> bool:
    """Large files are known by their SHA-256, the others by git's hash of a blob."""
    if known.lfs is not None:
        return hashlib.sha256(content).hexdigest() == known.lfs.sha256
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == known.blob_id


def _forget(cached: Path) -> None:
    """Take a file out of huggingface_hub's cache: the link by its name, and what it links to."""
    stored = cached.resolve()
    cached.unlink()
    stored.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of huggingface_hub, unless they are off already."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Say of what the Hub or the network answers what to do about it."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise SparkirError(f"{repo!r} is no name of a repository: {one_line(error)}") from error
    except errors.RevisionNotFoundError as error:
        raise SparkirError(f"{repo} has no such revision; give a branch, tag or commit") from error
    except errors.GatedRepoError as error:
        raise SparkirError(
            f"{repo} is given only to those who ask; ask on its page, then {_LOGIN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SparkirError(
            f"there is no model {repo} on the Hub that you may see; check the name, or {_LOGIN}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise SparkirError(_refusal(error, repo)) from error
    except RuntimeError as error:  # how one of the threads that send large files ends
        raise SparkirError(f"{one_line(error)} {one_line(error.__cause__ or error)}") from error
    except (httpx2.RequestError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        reason = one_line(error.__cause__ or error)
        raise SparkirError(
            f"the Hub cannot be reached: {reason}; check the network, or "
            "HF_ENDPOINT and HF_HUB_OFFLINE if they are set, and give the command again"
        ) from error


def _refusal(error: Exception, repo: str) -> str:
    status = error.response.status_code  # type: ignore[attr-defined]
    reason = getattr(error, "server_message", None) or one_line(error)
    if status == 401:
        return f"the Hub does not accept your token ({reason}); {_LOGIN}"
    if status == 403:
        return f"you may not write to {repo} ({reason}); take a token with write access to it"
    return f"the Hub refuses ({status}): {reason}"
