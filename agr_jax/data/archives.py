"""Checked reads of archive members, in memory: nothing is ever extracted to disk."""

import gzip
import io
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from agr_jax.errors import DataError

# What an archive may hold besides the wanted members (a readme, tar headers and padding).
_SLACK_BYTES = 16 * 2**20
_BLOCK_BYTES = 2**20
_DAMAGE = (
    EOFError,
    OSError,
    ValueError,
    RuntimeError,  # covers NotImplementedError: an unknown compression
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class MissingMembersError(DataError):
    """An intact archive without the wanted members; `found` holds the names of its files."""

    def __init__(self, message: str, found: tuple[str, ...]) -> None:
        super().__init__(message)
        self.found = found


class _BoundedReader(io.RawIOBase):
    """Counts what a decompressor gives, and stops it at a limit."""

    def __init__(self, decompressed: gzip.GzipFile, limit: int, path: Path) -> None:
        super().__init__()
        self._decompressed = decompressed
        self._limit = limit
        self._path = path
        self.total = 0

    def read(self, size: int = -1) -> bytes:
        left = self._limit - self.total + 1
        block = self._decompressed.read(left if size < 0 else min(size, left))
        self.total += len(block)
        if self.total > self._limit:
            raise DataError(
                f"{self._path}: refused: expected at most {self._limit:,} uncompressed bytes, "
                "found more"
            )
        return block


def read_tar_members(
    path: Path, wanted: Mapping[str, int], *, optional: Mapping[str, int] | None = None
) -> dict[str, bytes]:
    """Reads members of a .tar.gz archive, all the way to its end so that its checksum is verified.

    Args:
        path: the archive.
        wanted: member name -> largest size in bytes; all must be there.
        optional: the same, for members that may be absent.

    Returns:
        Member name -> content.

    Raises:
        MissingMembersError: a wanted member is absent.
        DataError: truncated or corrupted, larger than allowed, or a member that is unsafe: an
            absolute path, a `..` component, a link or a device.
    """
    limits = {**wanted, **(optional or {})}
    contents: dict[str, bytes] = {}
    found: list[str] = []
    total = 0
    try:
        with gzip.open(path, "rb") as decompressed:
            reader = _BoundedReader(decompressed, sum(limits.values()) + _SLACK_BYTES, path)
            try:
                with tarfile.open(fileobj=reader, mode="r|") as archive:
                    for member in archive:
                        name = _checked_name(path, member.name)
                        _check_tar_member(path, member)
                        if not member.isdir():
                            found.append(name)
                        if name in limits and not member.isdir():
                            if name in contents:
                                raise DataError(f"{path}: refused: member {name} comes twice")
                            _check_size(path, name, member.size, limits[name])
                            contents[name] = _read_tar_member(archive, member)
                while reader.read(_BLOCK_BYTES):
                    pass
            finally:
                total = reader.total
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an archive, found no such file") from error
    except _DAMAGE as error:
        raise _damaged(
            path,
            f"a whole .tar.gz file with {', '.join(wanted)}",
            f"{_describe(error)} after {total:,} uncompressed bytes, in which were "
            f"{len(contents)} of these files",
        ) from error
    missing = [name for name in wanted if name not in contents]
    if missing:
        raise MissingMembersError(
            f"{path}: expected the members {', '.join(wanted)}; missing {', '.join(missing)}; "
            f"found {_shortened(found)}",
            tuple(found),
        )
    return contents


class ZipMembers:
    """The checked members of a .zip archive, read one at a time; a context manager.

    Attributes:
        names: names of the files in it, in the archive's order.

    Args:
        path: the archive.
        member_limit: largest uncompressed size of a member, in bytes.
        total_limit: largest uncompressed size of all members together, in bytes.

    Raises:
        DataError: truncated or corrupted, larger than allowed, or a member that is unsafe: an
            absolute path, a `..` component, a link, encrypted.
    """

    def __init__(self, path: Path, *, member_limit: int, total_limit: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: expected an archive, found no such file") from error
        except _DAMAGE as error:
            raise _damaged(path, "a whole .zip file", _describe(error)) from error
        try:
            self._members = self._checked_members(member_limit, total_limit)
        except BaseException:
            self._archive.close()
            raise
        self.names = tuple(self._members)

    def _checked_members(self, member_limit: int, total_limit: int) -> dict[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        total = 0
        for info in self._archive.infolist():
            name = _checked_name(self._path, info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{self._path}: refused: member {name} is a link or a device")
            if info.flag_bits & 0x1:
                raise DataError(f"{self._path}: refused: member {name} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{self._path}: refused: member {name} has compression method "
                    f"{info.compress_type}, expected stored or deflated"
                )
            _check_size(self._path, name, info.file_size, member_limit)
            total += info.file_size
            if info.is_dir():
                continue
            if name in members:
                raise DataError(f"{self._path}: refused: member {name} comes twice")
            members[name] = info
        _check_size(self._path, "all together", total, total_limit)
        return members

    def read(self, name: str) -> bytes:
        """Returns a member's content, checked against its checksum; safe to call from threads.

        Raises:
            DataError: no such member, or it is damaged.
        """
        if name not in self._members:
            raise DataError(f"{self._path}: expected the member {name}, found none of that name")
        info = self._members[name]
        try:
            # ZipFile gives no more than the declared size, which was checked against the limit.
            with self._lock:
                return self._archive.read(info)
        except _DAMAGE as error:
            raise _damaged(
                self._path, f"{info.file_size:,} intact bytes of {name}", _describe(error)
            ) from error

    def close(self) -> None:
        """Closes the archive."""
        self._archive.close()

    def __enter__(self) -> "ZipMembers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _checked_name(path: Path, name: str) -> str:
    """The member's name without a leading `./`; refuses names that lead out of the archive."""
    parts = name.replace("\\", "/").split("/")
    # A drive letter ("C:") also makes a path absolute.
    if parts[0] == "" or parts[0].endswith(":"):
        raise DataError(f"{path}: refused: member {name!r} has an absolute path")
    if ".." in parts:
        raise DataError(f"{path}: refused: member {name!r} has a '..' in its path")
    return "/".join(part for part in parts if part not in ("", "."))


def _check_tar_member(path: Path, member: tarfile.TarInfo) -> None:
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise DataError(f"{path}: refused: member {member.name!r} is a link, a device or sparse")
    if member.size < 0:
        raise DataError(f"{path}: refused: member {member.name!r} has size {member.size}")


def _read_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise EOFError(f"no content for {member.name}")
    content = stream.read()
    if len(content) != member.size:
        raise EOFError(f"{len(content):,} of {member.size:,} bytes of {member.name}")
    return content


def _check_size(path: Path, name: str, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{path}: refused: expected at most {limit:,} uncompressed bytes in {name}, "
            f"found {size:,}"
        )


def _damaged(path: Path, expected: str, found: str) -> DataError:
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
    return DataError(
        f"{path} ({size}): damaged archive: expected {expected}; found {found}. Download it again."
    )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shortened(names: list[str]) -> str:
    if not names:
        return "no files"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
