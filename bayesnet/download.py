"""Downloads: files of the user's cache, fetched over https only and checked against a pinned SHA-256.

What is checked is what is used: a file is read once, and the bytes that were hashed are the bytes that callers parse.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from bayesnet import storage
from bayesnet.errors import BayesnetError, CheckpointError, ConfigError, DataError

MAX_DOWNLOAD_BYTES = 4 * 2**30
TIMEOUT_SECONDS = 30.0

_CHUNK_BYTES = 2**20
_HASH = re.compile(r"[0-9a-f]{8,64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Fetched(NamedTuple):
    """A file with the pinned hash.

    Attributes:
        path: Where it lies, for messages; by now it could be another file.
        data: The bytes that were hashed.
        sha256: Their SHA-256, all 64 digits.
    """

    path: Path
    data: bytes
    sha256: str


def cache_folder() -> Path:
    """Return the folder for downloads: ``$BAYESNET_CACHE``, else ``$XDG_CACHE_HOME/bayesnet`` or ``~/.cache/bayesnet``.

    Raises:
        ConfigError: The home folder of the user is unknown.
    """
    own, shared = os.environ.get("BAYESNET_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            return Path(own).expanduser().absolute()
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"  # as the XDG specification says
        return base / "bayesnet"
    except RuntimeError as error:
        raise ConfigError("cannot find the home folder", hint="set BAYESNET_CACHE") from error


def fetch(
    url: str,
    folder: Path,
    *,
    sha256: str,
    file_name: str | None = None,
    error: type[BayesnetError] = DataError,
) -> Fetched:
    """Return the file in ``folder`` that has the pinned hash, downloading it if it is not there.

    A pin is worth its digits: 64 of them name one file, while 8 of them (32 bits) tell a damaged file from a whole one
    but not an honest file from one that somebody took the trouble to make.

    Args:
        url: Where it comes from, https only; so are all redirects.
        folder: Where it is kept; created where missing.
        sha256: The SHA-256 in hexadecimal, all 64 digits or the first 8 or more.
        file_name: Its name in ``folder``; by default the last part of the URL.
        error: What is raised when the file cannot be had.

    Returns:
        The file, at most 4 GiB, read once.

    Raises:
        BayesnetError: Of type ``error``: there is no network, the server refuses, the file cannot be read, or the
            contents are not those that are pinned. A file with another hash that is there already is refused, not
            replaced.
        StorageError: The file system refused.
        ValueError: ``sha256`` or ``file_name`` is malformed.
    """
    name = file_name if file_name is not None else Path(urllib.parse.urlsplit(url).path).name
    if _HASH.fullmatch(sha256) is None:
        raise ValueError(f"not a SHA-256 in lower-case hexadecimal: {sha256!r}")
    path = folder / plain_name(name)
    with storage.storage_errors("cannot look into the folder", folder):
        is_there = path.exists()
    if not is_there:
        _download(url, path, sha256, error)
    try:
        data = storage.read_bytes(path.resolve(), max_bytes=MAX_DOWNLOAD_BYTES)
    except CheckpointError as caught:
        raise error(caught.what, where=path, hint=caught.hint) from caught
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(sha256):
        hint = f"its SHA-256 is {found[: len(sha256)]}, not {sha256}; delete it to have it downloaded"
        raise error("the file is not the one that is expected", where=path, hint=hint)
    return Fetched(path, data, found)


def plain_name(name: str) -> str:
    """Return ``name``, which becomes a file of a folder and of no other."""
    if _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"not a plain file name: {name!r}")
    return name


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone: the next hop must not lay the download open."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the next request.

        Raises:
            URLError: It would not be https.
        """
        if urllib.parse.urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: Path, sha256: str, error: type[BayesnetError]) -> None:
    """Put the file that ``url`` gives at ``path``, whole and with the pinned hash, or nothing."""
    folder = path.parent
    help_yourself = f"put {path.name} into {folder} yourself"
    if urllib.parse.urlsplit(url).scheme != "https":
        raise error("only https is downloaded from", where=url, hint=help_yourself)
    with storage.storage_errors("cannot keep the download", path):
        storage.make_directories(folder)
        storage.remove_stale(folder)
        temporary = folder / storage.temporary_name()
        try:
            with temporary.open("xb") as file:
                found = _copy(_chunks(url, help_yourself, error), file)
            if not found.startswith(sha256):
                reason = f"its SHA-256 is {found[: len(sha256)]}, not {sha256}"
                raise error("the download is not the file that is expected", where=url, hint=reason)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        storage.sync_directory(folder)


def _open_url(url: str) -> IO[bytes]:
    """Return the open connection. Tests put a function here that touches no network."""
    request = urllib.request.Request(url, headers={"User-Agent": "bayesnet"})  # noqa: S310 - fetch checked the scheme
    response: IO[bytes] = urllib.request.build_opener(_HttpsRedirects).open(request, timeout=TIMEOUT_SECONDS)
    return response


def _chunks(url: str, hint: str, error: type[BayesnetError]) -> Iterator[bytes]:
    """Yield the contents; whatever the connection raises becomes ``error``, with a way out."""
    size = 0
    try:
        with contextlib.closing(_open_url(url)) as response:
            while chunk := response.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > MAX_DOWNLOAD_BYTES:
                    raise error(f"the download has more than {MAX_DOWNLOAD_BYTES} bytes", where=url)
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as caught:
        if isinstance(caught, urllib.error.HTTPError):
            caught.close()
        reason = caught.reason if isinstance(caught, urllib.error.URLError) else caught
        raise error(f"cannot download the file: {reason}", where=url, hint=hint) from caught


def _copy(chunks: Iterator[bytes], file: IO[bytes]) -> str:
    """Write ``chunks`` to a file, sync it, and return the SHA-256 of it all."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()
