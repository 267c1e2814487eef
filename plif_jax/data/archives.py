"""Archives of data sets: downloaded, checked, and unpacked where they can do no harm."""

import calendar
import contextlib
import errno
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from pathlib import Path

from plif_jax.data import storage
from plif_jax.errors import UserError, first_line

# What reading a damaged archive raises, by way of its compression too.
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, OSError, RuntimeError, ValueError, OverflowError),
)
# What the file names in a damaged archive cause.
NAME_ERRNOS = {errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
LEADS_OUT = getattr(tarfile, "FilterError", ())  # the first releases of Python 3.11 have no filter


def unpacked(archive: Path, cache_dir: Path) -> Path:
    """Unpacks a zip or tar archive under `cache_dir`, and the zips in it in their places; once, whole or not at all.

    Raises:
      UserError: the archive is truncated or damaged, or a name in it leads out of the folder.
    """
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = Path(cache_dir) / "unpacked" / f"{archive.name.split('.')[0]}-{key}"

    def unpack(partial):
        print(f"unpacking {archive} into {folder}", flush=True)
        partial.mkdir()  # an archive may hold nothing
        _unpack(archive, partial, archive)
        for _ in range(2):  # the zips in it, and those in them
            for inner in sorted(path for path in partial.rglob("[!.]*") if path.suffix.lower() == ".zip"):
                _unpack(inner, inner.parent, f"{archive}: {inner.relative_to(partial)}")
                inner.unlink()

    return storage.made(folder, unpack)


def _unpack(archive, folder, name):
    """Unpacks one archive, which people know by `name`, into a folder."""
    with storage.reading(name):
        file = archive.open("rb")
    try:
        with file, storage.writing(folder), _names_told_apart(folder):
            if zipfile.is_zipfile(file) or archive.suffix.lower() == ".zip":
                with zipfile.ZipFile(file) as packed:
                    _unpack_zip(packed, folder)
            else:
                file.seek(0)
                if not LEADS_OUT:
                    raise UserError("unpacking it safely needs Python 3.11.4 or newer: unpack it yourself, beside it.")
                with tarfile.open(fileobj=file, tarinfo=_Header) as packed:
                    packed.extractall(folder, filter="data")  # refuses names that lead out, links, devices
                    while packed.fileobj.read(1 << 20):
                        pass  # the checksum of what is compressed comes last
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except LEADS_OUT as error:
        raise UserError(f"{name}: {error}.") from None
    except NotImplementedError as error:
        raise UserError(f"{name}: {error}: unpack it yourself, beside it.") from None
    except DAMAGE as error:
        reason = first_line(error).rstrip(":")  # then what each method says of it
        raise UserError(f"{name}: the archive is truncated or damaged ({reason}): fetch it again.") from None


@contextlib.contextmanager
def _names_told_apart(folder):
    """Turns the system's refusals of a name or a place, most likely a damaged archive's, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in NAME_ERRNOS:
            raise UserError(
                f"the archive is damaged, or {folder} cannot hold its names ({error.strerror}): fetch it again, or "
                "choose another folder with -cache_dir or PLIF_JAX_CACHE."
            ) from None
        raise


class _Header(tarfile.TarInfo):
    """A member's header. By itself `tarfile` takes one that is damaged, but for the first, for the archive's end."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """The member of a header's bytes; called by `tarfile`."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it stops before its end") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _unpack_zip(packed, folder):
    """Unpacks a zip; its files get the times that it tells, so that unpacked again they are the same files."""
    for info in packed.infolist():
        if not info.filename.strip("/"):
            continue  # Dropbox begins its archives with a folder "/"
        if not (folder / info.filename).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the name {info.filename!r} in it leads out of the archive.")
        if info.flag_bits & 1:
            raise UserError(f"{info.filename} in it is encrypted: unpack it yourself, beside it.")
        path = packed.extract(info, folder)
        year, month, *rest = info.date_time  # a zip knows no zones: the same seconds wherever it is unpacked
        changed = calendar.timegm((year, min(max(month, 1), 12), *rest))
        os.utime(path, (changed, changed))
