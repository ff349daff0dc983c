"""Weights on the Hugging Face hub: names, and downloads into the hub's own cache. The only importer of huggingface_hub.

``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``HF_ENDPOINT`` mean what they mean everywhere else. A file in the
cache is complete or absent, and the cache's locks let several processes of a host share one download.
"""

import logging
import re
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from idml_jax.errors import UserError
from idml_jax.runtime.files import first_line

logger = logging.getLogger("idml_jax")

_NAME = re.compile(
    r"(?P<explicit>hf://)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<early>[^\s@/]+))?(?P<file>/[^@]+)?"
    r"(?:@(?P<revision>[^\s@]+))?"
)
# Other spellings of hf://: timm's, and the address of a repository or of a file in a browser.
_SCHEMES = re.compile(r"hf://|hf[-_]hub:(//)?|https?://(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_PAGE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(/(tree|blob|resolve)/(?P<revision>[^/@]+)(?P<file>/[^@?]+)?)?/?(\?.*)?"
)
SCHEME = "hf://"


class HubName(NamedTuple):
    """A name on the hub.

    Attributes:
      repository: ``owner/name``.
      revision: branch, tag or commit; empty for the newest.
      file: the file of the repository to read; empty: chosen by ``choose``.
    """

    repository: str
    revision: str = ""
    file: str = ""

    def __str__(self) -> str:
        return self.repository + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


class Snapshot(NamedTuple):
    """Files of a repository at one commit.

    Attributes:
      folder: where they lie; only files in it may be read.
      commit: the commit.
      names: names of the files that were chosen.
    """

    folder: Path
    commit: str
    names: tuple[str, ...]


Choose = Callable[[Sequence[str]], tuple[str, ...]]


def parse(text: str, suffixes: Sequence[str] = ()) -> HubName | None:
    """The hub's name in a value of ``init_from``; ``None`` if it is none.

    Args:
      text: ``owner/name``, ``hf://owner/name`` or ``hf://owner/name/file``, and perhaps ``@revision`` (behind the name
        or the file); also timm's ``hf-hub:owner/name``, and addresses such as
        ``https://huggingface.co/owner/name/blob/main/file``.
      suffixes: endings of files; without ``hf://``, a name that ends so is a file.
    """
    scheme = _SCHEMES.match(text)
    if scheme:
        text = SCHEME + text[scheme.end() :]
        page = _PAGE.fullmatch(text.removeprefix(SCHEME)) if scheme[0].lower().startswith("http") else None
        if page:
            file = (page["file"] or "").rstrip("/")
            text = f"{SCHEME}{page['repository']}{file}" + (f"@{page['revision']}" if page["revision"] else "")
    found = _NAME.fullmatch(text)
    if not found or (not found["explicit"] and (found["file"] or found["repository"].endswith(tuple(suffixes)))):
        return None
    owner, _, name = found["repository"].partition("/")
    if {owner, name} & {".", ".."} or (found["early"] and found["revision"]):
        return None
    revision = found["early"] or found["revision"] or ""
    return HubName(found["repository"], revision, (found["file"] or "").strip("/"))


def is_meant(text: str) -> bool:
    """Whether a value of ``init_from`` says itself that it is on the hub: ``hf://``, ``hf-hub:``, an address there."""
    return bool(_SCHEMES.match(text))


def download(name: HubName, choose: Choose) -> Snapshot:
    """Downloads files of a repository, or finds them in the cache.

    Args:
      name: the repository.
      choose: from the names of all its files, those that are wanted; raises ``UserError`` if it finds none.

    Returns:
      The files, all of one commit.

    Raises:
      UserError: if huggingface_hub is not installed, the repository, revision or file does not exist or is not open to
        this account, or the hub cannot be reached and the files are not in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{name}: no such file here, and names on the Hugging Face hub need huggingface_hub: "
            "pip install idml_jax[hub]"
        ) from error
    hub: Any = huggingface_hub
    where = {"repo_id": name.repository, "revision": name.revision or None}
    try:
        info = hub.HfApi().model_info(**where)
        wanted = choose([file.rfilename for file in info.siblings or ()])
        folder = hub.snapshot_download(**where, allow_patterns=[escape(file) for file in wanted])
    except UserError:
        raise
    except Exception as error:
        problem = _problem(name, error, errors)
        if not problem.reachable:
            cached = _cached(name, choose, hub, where)
            if cached is not None:
                logger.info("%s: %s; taking the copy in the cache", name, problem.short)
                return cached
        raise UserError(problem.line) from error
    return _snapshot(Path(folder), wanted, name)


def _snapshot(folder: Path, wanted: tuple[str, ...], name: HubName) -> Snapshot:
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{name}: {missing[0]} is not in the cache ({folder}); with a network it is downloaded")
    return Snapshot(folder, folder.name, wanted)


def _cached(name: HubName, choose: Choose, hub: Any, where: dict[str, str | None]) -> Snapshot | None:
    """The copy in the cache, if there is one that is complete."""
    try:
        # With a pattern of no file, the folder comes back although most files of the repository are not there.
        folder = Path(hub.snapshot_download(**where, local_files_only=True, allow_patterns=["/"]))
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        return _snapshot(folder, choose(names), name)
    except (OSError, ValueError, UserError):
        return None


class _Problem(NamedTuple):
    line: str  # for the user
    short: str
    reachable: bool = True  # whether the hub has answered


def _problem(name: HubName, error: Exception, errors: Any) -> _Problem:
    """What went wrong, with the cure; the order goes from special to general errors."""
    from huggingface_hub import constants

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return _Problem(
            f"{name}: no such file here, and it is not in the cache of the hub ({cache}), while HF_HUB_OFFLINE forbids "
            "downloads; unset it, or where there is a network run "
            f"python -m idml_jax.pretrained fetch {name} --out=FILE.safetensors",
            "HF_HUB_OFFLINE is set",
            reachable=False,
        )
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        line = (
            f"{name}: its owner gives it only to accounts that accept the licence: accept it at "
            f"{endpoint}/{name.repository}, then set HF_TOKEN to a token of that account (or run hf auth login)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        line = f"{name}: the repository has no revision {name.revision or 'main'!r}; see {endpoint}/{name.repository}"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError) or status == 401:
        line = (
            f"{name}: no such file here, and {endpoint} has no such repository that is open to you "
            f"({status or first_line(error)}); check the spelling, or set HF_TOKEN for a private one"
        )
    elif status == 403:
        line = f"{name}: {endpoint} refuses access (403); set HF_TOKEN to a token that may read it"
    elif status and status < 500:
        line = f"{name}: {endpoint} answers {status} ({first_line(error)})"
    else:
        line = (
            f"{name}: no such file here, and it cannot be downloaded from {endpoint} ({_reason(error)}); "
            "nothing is left behind, run the same command again once there is a network"
        )
        return _Problem(line, f"{endpoint} cannot be reached ({_reason(error)})", reachable=False)
    return _Problem(line, line)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: the outer ones only say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:200]
