"""Fetching the archives of the event data sets, and saying what to do where that cannot work."""

import http.client
import os
import urllib.error
from pathlib import Path
from typing import NamedTuple

from tonic.download_utils import check_md5, download_url

from plif_jax.data import storage
from plif_jax.errors import PATH_ERRNOS, UserError


class Archive(NamedTuple):
    """A published file: its name, its md5, and where it can be fetched."""

    name: str
    md5: str
    url: str


# The links that tonic has, figshare.com/ndownloader, answer programs with an empty file; this host does not.
FIGSHARE = "https://ndownloader.figshare.com/files/"
MENDELEY = "https://data.mendeley.com/public-files/datasets/468j46mzdv/files/"

ARCHIVES = {
    "NMNIST": [
        Archive(
            "Train.zip",
            "20959b8e626244a1b502305a9e6e2031",
            MENDELEY + "39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded",
        ),
        Archive(
            "Test.zip",
            "69ca8762b2fe404d9b9bad1103e97832",
            MENDELEY + "05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded",
        ),
    ],
    "CIFAR10DVS": [  # as published, which needs no further package, rather than tonic's conversion
        Archive("airplane.zip", "0afd5c4bf9ae06af762a77b180354fdd", FIGSHARE + "7712788"),
        Archive("automobile.zip", "8438dfeba3bc970c94962d995b1b9bdd", FIGSHARE + "7712791"),
        Archive("bird.zip", "a9c207c91c55b9dc2002dc21c684d785", FIGSHARE + "7712794"),
        Archive("cat.zip", "52c63c677c2b15fa5146a8daf4d56687", FIGSHARE + "7712812"),
        Archive("deer.zip", "b6bf21f6c04d21ba4e23fc3e36c8a4a3", FIGSHARE + "7712815"),
        Archive("dog.zip", "f379ebdf6703d16e0a690782e62639c3", FIGSHARE + "7712818"),
        Archive("frog.zip", "cad6ed91214b1c7388a5f6ee56d08803", FIGSHARE + "7712842"),
        Archive("horse.zip", "e7cbbf77bec584ffbf913f00e682782a", FIGSHARE + "7712851"),
        Archive("ship.zip", "41c7bd7d6b251be82557c6cce9a7d5c9", FIGSHARE + "7712836"),
        Archive("truck.zip", "89f3922fd147d9aeff89e76a2b0b70a7", FIGSHARE + "7712839"),
    ],
    "DVS128Gesture": [  # tonic's re-cut of it: the original must be fetched by hand
        Archive("ibmGestureTrain.tar.gz", "3a8f0d4120a166bac7591f77409cb105", FIGSHARE + "38022171"),
        Archive("ibmGestureTest.tar.gz", "56070e45dadaa85fff82e0fbfbc06de5", FIGSHARE + "38020584"),
    ],
}
BY_HAND = {
    "DVS128Gesture": (
        "DVS128Gesture: fetching tonic's re-cut, 1077 + 264 samples. For the official 1176 + 288 put DvsGesture.tar.gz "
        "from https://ibm.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8 into DATA/DVS128Gesture and give -data_root DATA."
    ),
    "ASLDVS": (
        "ASLDVS: no address of it works for programs any more. Put ICCV2019_DVS_dataset.zip (see "
        "https://github.com/PIX2NVS/NVS2Graph) into DATA/ASLDVS and give -data_root DATA."
    ),
}


def fetch(name: str, cache_dir: Path) -> Path:
    """Fetches the archives of a data set that are not there yet; returns the folder they are in.

    Raises:
      UserError: an archive cannot be had, or is not the published one; the message says which file to put where.
    """
    if name not in ARCHIVES:
        raise UserError(BY_HAND[name])
    folder = Path(cache_dir) / "downloads" / name

    def missing():
        with storage.reading(folder):
            files = {archive: folder / archive.name for archive in ARCHIVES[name]}
            return [archive for archive, file in files.items() if not (file.is_file() and file.stat().st_size)]

    if missing():
        with storage.locked(folder.with_name(name + ".lock")):
            with storage.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            left = missing()  # another program may have fetched them while we waited
            if left:
                what = BY_HAND.get(name, f"{name}: fetching {', '.join(archive.name for archive in left)}.")
                print(what, f"They go to {folder}.", flush=True)
                for archive in left:
                    _fetch(archive, folder)
                size = sum((folder / archive.name).stat().st_size for archive in ARCHIVES[name])
                print(f"{name}: {size / 1e6:.0f} MB of archives are in {folder}", flush=True)
    return folder


def _fetch(archive, folder):
    """Fetches one archive, which gets its name only when its md5 is right."""
    partial = folder / (archive.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        download_url(archive.url, str(folder), partial.name)
        if partial.stat().st_size == 0:
            raise UserError("the answer was an empty file")
        if not check_md5(str(partial), archive.md5):
            raise UserError(f"the answer, {partial.stat().st_size} bytes, has not the md5 {archive.md5}")
        os.replace(partial, folder / archive.name)
    except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError, UserError) as error:
        if getattr(error, "errno", None) in PATH_ERRNOS:
            with storage.writing(folder):
                raise
        raise UserError(
            f"{archive.name} could not be fetched from {archive.url}: {error}. "
            f"Fetch it with a browser and put it into {folder}, or give -data_root, the folder with your data sets."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
