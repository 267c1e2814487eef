"""Archives of data sets: downloaded, checked, and unpacked where they can do no harm."""

import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from plif_jax.data import storage
from plif_jax.errors import UserError


def unpacked(archive: Path, cache_dir: Path) -> Path:
    """Unpack a zip or tar archive under `cache_dir`, and the zips in it in their places; once, whole or not at all.

    Raises:
        UserError: the archive is truncated or damaged, or a name in it leads out of the folder.
    """
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = Path(cache_dir) / "unpacked" / f"{archive.name.split('.')[0]}-{key}"
    if folder.exists():
        return folder
    with storage.locked(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            print(f"unpacking {archive} into {folder}", flush=True)
            try:
                _unpack(archive, partial)
                for inner in sorted(partial.rglob("*.zip")):
                    _unpack(inner, inner.parent)
                    inner.unlink()
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(archive, folder):
    """Unpack one archive into a folder."""
    try:
        with storage.writing(folder):
            if zipfile.is_zipfile(archive) or archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as packed:
                    for name in packed.namelist():
                        if not (folder / name).resolve().is_relative_to(folder.resolve()):
                            raise UserError(f"{archive}: the name {name!r} in it leads out of the archive.")
                    packed.extractall(folder)
            else:
                with tarfile.open(archive) as packed:
                    packed.extractall(folder, filter="data")  # refuses names that lead out, links, devices
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: {error}.") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, OSError) as error:
        raise UserError(f"{archive}: the archive is truncated or damaged ({error}): fetch it again.") from None
