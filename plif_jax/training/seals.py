"""The checkpoints in a folder, and which can be trusted: those that their seal, the checksum of every file, fits.

It is looked at before a checkpoint is read, for the libraries that read arrays can crash on damaged bytes.
"""

import hashlib
import json
import re

SEAL = "sha256.json"
ITEMS = ("state", "record", "metrics")
REPLACED = "replaced_"
MISSING = "files are missing, or its seal"


def steps(folder):
    """The finished checkpoints in a folder, the newest first, those among them for which others are being written."""
    found = {step_of(path): path for path in folder.glob(f"{REPLACED}*")}
    found |= {step_of(path): path for path in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name)}
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(path):
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(REPLACED))


def examined(folder):
    """The checkpoints in a folder, newest first: the sound ones, {damaged: what is wrong}, those half removed.

    A program that was killed while it removed an old checkpoint leaves a part of it.
    """
    sound, damaged, half_removed = [], {}, []
    for path in steps(folder):
        damage = damage_of(path)
        if damage is None:
            sound.append(path)
        elif damage == MISSING and sound:
            half_removed.append(path)
        else:
            damaged[path] = damage
    return sound, damaged, half_removed


def digests(folder):
    """{file: its SHA-256} of what is read from a checkpoint's folder."""
    files = [path for item in ITEMS for path in (folder / item).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(files)}


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(folder):
    """What is wrong with a checkpoint; None where it is as it was written."""
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
        if {name.split("/")[0] for name in sealed} != set(ITEMS):
            return "its seal does not name its files"
        wrong = [name for name, digest in sealed.items() if _sha256(folder / name) != digest]
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return error.strerror
    except (ValueError, AttributeError, RecursionError):
        return "its seal is not what was written"
    return f"{wrong[0]} is not what was written" if wrong else None
