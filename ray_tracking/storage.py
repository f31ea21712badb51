"""Where runs live: one directory on any pyarrow filesystem, and the only code that joins its paths.

In: a URI or path and relative names. Out: bytes, listings, and writes that are whole or absent.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ray_tracking import conditional, s3
from ray_tracking.errors import NameRefusedError, StorageError
from ray_tracking.writing import TEMPORARY, LocalWriting, RemoteWriting, Writing

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

_HAS_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_PART = re.compile(r"[A-Za-z0-9_=@+,. -]+")


class Entry(NamedTuple):
    """One thing in a listing: `name` without its folder, `size` in bytes (0 for a folder)."""

    name: str
    size: int
    is_dir: bool
    modified: float


def check_name(name: str, what: str = "name") -> str:
    """`name` itself, if it is safe as one path component; the rule for run ids, checkpoints, artifacts.

    Raises NameRefusedError for anything that is empty, over 200 characters, starts with a dot
    or holds other characters than letters, digits and `_ = @ + , . - ` and space.
    """
    if not name or len(name) > 200 or name[0] in ". " or not _PART.fullmatch(name):
        raise NameRefusedError(
            f"{what} {name!r} can't be used as a name on storage.",
            hint="Use 1 to 200 letters, digits, spaces and _ = @ + , . - not beginning with dot or space.",
        )
    return name


class Storage:
    """A directory on a pyarrow filesystem. All names are relative to it, with `/` between parts.

    Thread-safe. Every failure of the filesystem is raised as StorageError with the path in it,
    except a file that is not there, which is FileNotFoundError.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, uri: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/") or "/"
        self.uri = uri

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> Storage:
        """Open a local path (a relative one from the working directory) or a URI (s3://, gs://).

        S3 is asked whether it answers, lets us in and has the bucket: StorageError within about ten seconds.
        """
        from pyarrow import fs

        text = os.fspath(uri)
        if not text:
            raise StorageError("The storage is empty.", hint="Give a path or a URI such as s3://bucket/runs.")
        if not _HAS_SCHEME.match(text) or text.startswith("file://"):
            path = os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
            return cls(fs.LocalFileSystem(), path, path)
        try:
            if text.startswith("s3://"):
                return cls._open_s3(text, check=True)
            filesystem, root = fs.FileSystem.from_uri(text)
        except (ValueError, OSError) as error:
            raise StorageError(
                f"The storage {without_credentials(text)!r} can't be opened: {error}",
                hint=s3.hint(error)
                or "Allowed: a path, or a URI that pyarrow knows, such as s3://bucket/runs or gs://bucket/runs.",
            ) from error
        return cls(filesystem, root, text)

    @classmethod
    def _open_s3(cls, uri: str, *, check: bool) -> Storage:
        options = s3.S3Options.parse(uri)
        if check:
            options.check()
        return cls(options.filesystem(), options.root, uri)

    def portable_filesystem(self) -> fs.FileSystem:
        """The filesystem for a library's own processes, on nodes whose environment may lack our credentials."""
        if self.uri.startswith("s3://"):
            return s3.S3Options.parse(self.uri).filesystem(with_credentials=True)
        return self.filesystem

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    def __reduce__(self) -> tuple[object, ...]:
        return reopen, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({without_credentials(self.uri)!r})"

    def child(self, *parts: str) -> Storage:
        """The storage of a folder below this one."""
        relative = self._relative("/".join(parts))
        base, mark, query = self.uri.partition("?")
        return Storage(
            self.filesystem,
            f"{self.root.rstrip('/')}/{relative}",
            f"{base.rstrip('/')}/{relative}{mark}{query}",
        )

    def path(self, name: str = "") -> str:
        """The full path of `name` as the filesystem knows it."""
        return f"{self.root.rstrip('/')}/{self._relative(name)}" if name else self.root

    def _relative(self, name: str) -> str:
        for part in name.split("/"):
            check_name(part, "path component")
        return name

    def _below(self, name: str) -> str:
        """The full path of something below the root, never the root itself."""
        return f"{self.root.rstrip('/')}/{self._relative(name)}"

    def read_bytes(self, name: str) -> bytes:
        path = self.path(name)
        try:
            with self.filesystem.open_input_file(path) as stream:
                data: bytes = stream.read()
                return data
        except FileNotFoundError:
            raise
        except OSError as error:
            if not self.exists(name):  # removed between the opening and the read: S3 says so in other words
                raise FileNotFoundError(f"{path!r} was removed while it was read") from error
            raise self._failure("read", path, error) from error

    def open_input(self, name: str) -> NativeFile:
        """A random-access file for reading; its own reads raise plain OSError."""
        path = self.path(name)
        try:
            return self.filesystem.open_input_file(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._failure("read", path, error) from error

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write a file whole: after the return it is durable; before, readers see the old one or none."""
        with self.create(name) as writing:
            writing.write(data)

    def upload(self, source: str | os.PathLike[str], name: str, *, chunk: int = 8 << 20) -> None:
        """Copy a local file to `name`, whole or not at all, in bounded memory."""
        path = self._below(name)
        try:
            reader = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise self._failure("write", path, error) from error
        with reader, self.create(name) as writing:
            while True:
                try:
                    block = reader.read(chunk)
                except OSError as error:
                    raise self._failure("write", path, error) from error
                if not block:
                    break
                writing.write(block)

    def create(self, name: str, size: int | None = None) -> Writing:
        """A file to be written in blocks: whole and durable after `commit`, absent before and after `abandon`.

        `size` in bytes, if it is known, lets a full disk say so before the first block.
        """
        path = self._below(name)
        try:
            return (
                LocalWriting(path, self._failure, size)
                if self.is_local
                else RemoteWriting(path, self._failure, self.filesystem)
            )
        except OSError as error:
            raise self._failure("write", path, error) from error

    def create_new(self, name: str, data: bytes) -> bool:
        """Write a file whole if there is none of that name. Of several that do at once, one gets True.

        `data` must be the caller's alone (hold a random token): so a creation whose reply was lost is recognised.
        Where the storage can't decide (`conditional.is_exclusive`) it takes seconds and is weaker.
        """
        path = self._below(name)
        try:
            return conditional.create_new(self, name, data) or self._holds(name, data)
        except OSError as error:
            if self._holds(name, data):
                return True
            raise self._failure("create", path, error) from error

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read_bytes(name) == data
        except FileNotFoundError:
            return False

    def list(self, name: str = "") -> list[Entry]:
        """What lies directly in a folder, by name; empty if there is none. Unfinished writes are left out."""
        path = self.path(name)
        try:
            entries = sorted(_list_local(path) if self.is_local else self._list_remote(path))
        except OSError as error:
            raise self._failure("list", path, error) from error
        return [entry for entry in entries if not entry.name.startswith(TEMPORARY)]

    def _list_remote(self, path: str) -> Iterator[Entry]:
        from pyarrow import fs

        for info in self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            modified = info.mtime.timestamp() if info.mtime else 0.0
            yield Entry(info.base_name, info.size or 0, info.type == fs.FileType.Directory, modified)

    def walk(self, name: str = "") -> Iterator[tuple[str, int]]:
        """(name, size in bytes) of every file below a folder, by name; unfinished writes are left out."""
        yield from sorted(self._walk_local(name) if self.is_local else self._walk_remote(name))

    def _walk_local(self, name: str) -> Iterator[tuple[str, int]]:
        for entry in self.list(name):
            below = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir:
                yield from self._walk_local(below)
            else:
                yield below, entry.size

    def _walk_remote(self, name: str) -> Iterator[tuple[str, int]]:
        """One listing, whatever the number of folders."""
        from pyarrow import fs

        path = self.path(name)
        try:
            infos = self.filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        except OSError as error:
            raise self._failure("list", path, error) from error
        skip = len(self.root.rstrip("/")) + 1
        for info in infos:
            if info.type == fs.FileType.File:
                yield info.path[skip:], info.size or 0

    def exists(self, name: str = "") -> bool:
        from pyarrow import fs

        path = self.path(name)
        try:
            return bool(self.filesystem.get_file_info(path).type != fs.FileType.NotFound)
        except OSError as error:
            raise self._failure("look at", path, error) from error

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        path = self._below(name)
        try:
            self.filesystem.delete_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failure("delete", path, error) from error

    def delete_dir(self, name: str) -> None:
        """Remove a folder and all below it; one that is not there is no error."""
        path = self._below(name)
        try:
            self.filesystem.delete_dir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failure("delete", path, error) from error

    def probe(self) -> None:
        """Write, read back and delete a small file; raises StorageError that says what to do."""
        name = f"probe-{secrets.token_hex(4)}"
        self.write_bytes(name, b"probe")
        if self.read_bytes(name) != b"probe":
            raise StorageError(f"The storage {self.uri!r} gave back other bytes than were written.")
        self.delete(name)

    def _failure(self, verb: str, path: str, error: OSError) -> StorageError:
        return StorageError(
            f"Can't {verb} {path!r}: {error}",
            hint=(None if self.is_local else s3.hint(error))
            or "Check that the path exists, has space and that you may write there; "
            "set another one with --storage or RAY_TRACKING_STORAGE.",
        )


def without_credentials(uri: str) -> str:
    """The URI without a user part, for messages."""
    return re.sub(r"(?<=://)[^/@?]*@", "", uri)


def reopen(uri: str) -> Storage:
    """Unpickled in another process: S3 was checked where it was opened, and may be away for a moment here."""
    return Storage._open_s3(uri, check=False) if uri.startswith("s3://") else Storage.open(uri)


def _list_local(path: str) -> Iterator[Entry]:
    """Not by pyarrow: its listing fails when a folder comes or goes meanwhile."""
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as found:
        for item in found:
            with contextlib.suppress(FileNotFoundError):
                status = item.stat()
                is_dir = item.is_dir()
                yield Entry(item.name, 0 if is_dir else status.st_size, is_dir, status.st_mtime)
