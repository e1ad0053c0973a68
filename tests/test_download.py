"""Downloads: pinned, over https alone, whole or absent; and what the message says where there is no network."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage
from pathlib import Path

import pytest

from bayesnet import download, storage, weights
from bayesnet.errors import BayesnetError, CheckpointError, ConfigError, DataError

URL = "https://example.org/sets/numbers.bin"
CONTENT = b"one two three"
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Serve = Callable[[dict[str, bytes]], list[str]]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BAYESNET_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert weights.cache_folder() == tmp_path / ".cache" / "bayesnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert weights.cache_folder() == Path("/xdg/bayesnet")
    monkeypatch.setenv("BAYESNET_CACHE", "~/mine")
    assert weights.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("BAYESNET_CACHE", "~nobody-of-this-name/mine")
    with pytest.raises(ConfigError, match=r"^cannot find the home folder: set BAYESNET_CACHE$"):
        weights.cache_folder()


@pytest.mark.parametrize("digits", [8, 16, 64])
def test_a_file_is_downloaded_once(serve: Serve, tmp_path: Path, digits: int) -> None:
    asked = serve({URL: CONTENT})
    folder = tmp_path / "a" / "b"
    fetched = weights.fetch(URL, folder, sha256=SHA256[:digits])
    assert fetched == (folder / "numbers.bin", CONTENT, SHA256)
    assert fetched.path.read_bytes() == CONTENT
    assert weights.fetch(URL, folder, sha256=SHA256[:digits]) == fetched
    assert asked == [URL]
    assert weights.fetch(URL, folder, sha256=SHA256, file_name="other.bin").path.name == "other.bin"
    assert sorted(each.name for each in folder.iterdir()) == ["numbers.bin", "other.bin"]


def refusal(error: type[BayesnetError], url: str, folder: Path, sha256: str = SHA256) -> str:
    with pytest.raises(error) as caught:
        weights.fetch(url, folder, sha256=sha256, error=error)
    return str(caught.value)


@pytest.mark.parametrize("error", [DataError, CheckpointError])
def test_without_a_network_the_message_says_what_to_do(
    serve: Serve, tmp_path: Path, error: type[BayesnetError]
) -> None:
    serve({})
    expected = f"cannot download the file: Name or service not known ({URL}): put numbers.bin into {tmp_path} yourself"
    assert refusal(error, URL, tmp_path) == expected
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "numbers.bin").write_bytes(CONTENT)
    assert weights.fetch(URL, tmp_path, sha256=SHA256).data == CONTENT


def test_a_download_with_another_hash_is_not_kept(serve: Serve, tmp_path: Path) -> None:
    serve({URL: b"something else"})
    found = hashlib.sha256(b"something else").hexdigest()
    expected = f"the download is not the file that is expected ({URL}): its SHA-256 is {found}, not {SHA256}"
    assert refusal(DataError, URL, tmp_path) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_refused_and_stays(serve: Serve, tmp_path: Path) -> None:
    asked = serve({URL: CONTENT})
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"mine")
    message = refusal(DataError, URL, tmp_path, SHA256[:8])
    found = hashlib.sha256(b"mine").hexdigest()[:8]
    hint = f"its SHA-256 is {found}, not {SHA256[:8]}; delete it to have it downloaded"
    assert message == f"the file is not the one that is expected ({path}): {hint}"
    assert path.read_bytes() == b"mine"
    assert asked == []


def test_what_is_hashed_is_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once; what somebody puts in its place afterwards is never looked at."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(CONTENT)
    read = storage.read_bytes

    def read_and_swap(path: Path, *, max_bytes: int) -> bytes:
        data = read(path, max_bytes=max_bytes)
        path.write_bytes(b"something else")
        return data

    monkeypatch.setattr(storage, "read_bytes", read_and_swap)
    assert weights.fetch(URL, tmp_path, sha256=SHA256).data == CONTENT
    assert "the file is not the one that is expected" in refusal(DataError, URL, tmp_path)


def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    (tmp_path / "numbers.bin").symlink_to(tmp_path / "elsewhere")
    assert weights.fetch(URL, tmp_path, sha256=SHA256).data == CONTENT
    (tmp_path / "numbers.bin").unlink()
    (tmp_path / "numbers.bin").mkdir()
    assert refusal(DataError, URL, tmp_path) == f"not a regular file ({tmp_path / 'numbers.bin'})"


@pytest.mark.parametrize("url", ["http://example.org/a.bin", "file:///etc/a.bin", "ftp://example.org/a.bin"])
def test_only_https(serve: Serve, tmp_path: Path, url: str) -> None:
    asked = serve({url: CONTENT})
    assert refusal(DataError, url, tmp_path) == (
        f"only https is downloaded from ({url}): put a.bin into {tmp_path} yourself"
    )
    assert asked == []


def test_redirects_are_followed_to_https_alone() -> None:
    handler = download._HttpsRedirects()
    request = urllib.request.Request(URL)
    follow = handler.redirect_request(request, io.BytesIO(), 302, "Found", HTTPMessage(), "https://mirror.org/x")
    assert follow is not None
    assert follow.full_url == "https://mirror.org/x"
    with pytest.raises(urllib.error.URLError, match=r"redirects to http://mirror.org/x, which is not https"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", HTTPMessage(), "http://mirror.org/x")


class Breaking(io.BytesIO):
    """A connection that gives a part and then fails."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(CONTENT)
        self._error = error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise self._error
        return super().read(3)


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError("No route to host")])
def test_a_connection_that_breaks_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    monkeypatch.setattr(download, "_open_url", lambda url: Breaking(error))
    assert refusal(DataError, URL, tmp_path).startswith(f"cannot download the file: {error} ({URL}): put numbers.bin")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "_open_url", lambda url: Breaking(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        weights.fetch(URL, tmp_path, sha256=SHA256)
    assert list(tmp_path.iterdir()) == []


def test_an_endless_download_is_stopped(monkeypatch: pytest.MonkeyPatch, serve: Serve, tmp_path: Path) -> None:
    serve({URL: CONTENT})
    monkeypatch.setattr(download, "MAX_DOWNLOAD_BYTES", len(CONTENT) - 1)
    assert refusal(DataError, URL, tmp_path) == f"the download has more than 12 bytes ({URL})"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".", "..", ".hidden", "a\\b", "a\n"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        weights.fetch(URL, tmp_path, sha256=SHA256, file_name=name)


@pytest.mark.parametrize("sha256", ["", "abc", SHA256.upper(), SHA256 + "0", "g" * 64])
def test_hashes_are_hashes(tmp_path: Path, sha256: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        weights.fetch(URL, tmp_path, sha256=sha256)
