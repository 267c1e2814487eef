"""Files made to take memory or time out of proportion to their size: refused in one line, or read, within bounds."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import pytest
from damage import refused_or_read
from flax import nnx

from plif_jax import neurons
from plif_jax.data import event_readers, image_files
from plif_jax.errors import UserError
from plif_jax.interop import spikingjelly, torch, torch_files
from plif_jax.interop.inert_pickle import Name, Object
from plif_jax.interop.rebuild import rebuild


def refused(read, said):
    """Holds that `read` is refused, with `said`, in one line and within the bounds."""

    def attempt():
        with pytest.raises(UserError, match=said) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 2000

    refused_or_read(attempt)


# Pickles in PyTorch's files


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words


def keep(at, value):
    """Pickles `value` into the memo and off the stack."""
    return value + b"q" + bytes([at]) + b"0"


def storage(key, size):
    kind = text(b"storage") + b"ctorch\nFloatStorage\n"
    return b"(" + kind + key + text(b"cpu") + b"J" + struct.pack("<i", size) + b"tQ"


def members(pairs):
    return b"}(" + b"".join(text(b"%d" % name) + value for name, value in pairs) + b"u"


def pt(pickled, data=b""):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + pickled + b".")
            archive.writestr("x/data/0", data)
        return file.getvalue()


NESTED = b")" + b"2\x86" * 22  # a pair of one and the same pair of one and the same ..., 2 ** 22 brackets as text
LIST = keep(0, b"](" + b"".join(b"M" + struct.pack("<H", n) for n in range(5000)) + b"e")
PAIRS = keep(0, b"](" + b"".join(b"M" + struct.pack("<H", n) + b"N\x86" for n in range(5000)) + b"e")
STATE = keep(0, b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(5000)) + b"u")


def again(what, function, use):
    """A list of many results of what is done with the object at memo 0 and the function at memo 1."""
    return what + keep(1, function) + b"](" + use * 3000 + b"e"


TENSOR = keep(1, b"ctorch._utils\n_rebuild_tensor_v2\n")
VIEWS = (
    keep(0, storage(text(b"0"), 50_000))
    + TENSOR
    + members((n, b"h\x01(h\x00K\x00M" + struct.pack("<H", 50_000) + b"\x85K\x01\x85tR") for n in range(1000))
)


def module(group, content):
    """A module of the class at memo 3, with one dict of members."""
    return b"h\x03)\x81}" + text(b"_modules") + b"}" + b"s" + text(group) + content + b"sb"


CLASS = keep(3, b"ca\nB\n")


def long_names():
    """A chain of 150 modules, each called by the same long name."""
    chain = module(b"_modules", b"}")
    for _ in range(150):
        chain = module(b"_modules", b"}h\x00" + chain + b"s")
    return keep(0, text(b"n" * 10_000)) + CLASS + chain


@pytest.mark.parametrize(
    "pickled, said",
    [
        (storage(NESTED, 4), "a persistent id that is neither"),
        (NESTED + b"\x85Q", "a persistent id that is neither"),
        (NESTED + text(b"a") + b"\x93", "a name that is damaged"),
        (again(LIST, b"cbuiltins\nset\n", b"h\x01h\x00\x85R"), "the same items again and again"),
        (again(LIST, b"ctorch\nSize\n", b"h\x01h\x00\x85R"), "the same items again and again"),
        (again(PAIRS, b"ccollections\nOrderedDict\n", b"h\x01h\x00\x85R"), "the same items again and again"),
        (again(STATE, b"ca\nB\n", b"h\x01)\x81h\x00b"), "the same items again and again"),
        (VIEWS, "claims arrays of more than"),
        (long_names(), "without a proper name"),
    ],
    ids=["key", "kind", "name", "sets", "sizes", "mappings", "states", "views", "long names"],
)
def test_pickles(tmp_path, pickled, said):
    path = tmp_path / "x.pt"
    path.write_bytes(pt(pickled, bytes(200_000)))
    refused(lambda: torch_files.read(path), said)


def test_modules_that_share_their_weights_do_not_multiply_them(tmp_path):
    number = TENSOR + keep(2, b"h\x01(" + storage(text(b"0"), 1) + b"K\x00))tR")
    weights = keep(0, members((n, b"h\x02") for n in range(500)))
    children = members((n, module(b"_parameters", b"h\x00")) for n in range(2000))
    path = tmp_path / "x.pt"
    path.write_bytes(pt(number + weights + CLASS + module(b"_modules", children), bytes(4)))
    assert len(refused_or_read(lambda: torch_files.read(path)).arrays) == 500


def test_a_surrogate_whose_alpha_is_no_number():
    alpha = ()
    for _ in range(22):
        alpha = (alpha, alpha)
    children = {"surrogate_function": Object(Name("a", "ATan"), {"alpha": alpha})}
    neuron = Object(Name("a", "LIFNode"), {"v_threshold": 1.0, "_modules": children})
    refused(lambda: rebuild(torch_files.Checkpoint({}, neuron)), "as alpha a tuple; a usual number is needed")


@pytest.mark.parametrize(
    "attributes, said",
    [({"alpha": 2.0, "spiking": False}, "its smooth output"), ({"alpha": 4.0, "beta": 3.0}, "surrogate S2NN .* give")],
)
def test_a_surrogate_that_would_be_another_here(attributes, said):
    children = {"surrogate_function": Object(Name("a", "S2NN"), attributes)}
    neuron = Object(Name("a", "ParametricLIFNode"), {"v_threshold": 1.0, "_modules": children})
    net = spikingjelly.MNISTNet(neurons.PLIF, channels=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=said):
        rebuild(torch_files.Checkpoint(torch.state_dict(net), neuron))


# Archives


def stored(entry, content, claimed=None):
    """A zip archive of one entry, compressed, whose directory may claim another size."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(entry, content)
            if claimed is not None:
                archive.infolist()[0].file_size = claimed
        return file.getvalue()


def overlapping(count, size):
    """A zip archive of entries each of which holds all later ones."""
    body, entries = bytes(size), []
    for n in range(count):
        entry = zipfile.ZipInfo(f"x/data/{n}")
        entry.CRC, entry.compress_size, entry.file_size = zlib.crc32(body), len(body), len(body)
        body = entry.FileHeader() + body
        entry.header_offset = -len(body)
        entries.append(entry)
    with io.BytesIO(body) as file:
        with zipfile.ZipFile(file, "a") as archive:
            for entry in entries:
                entry.header_offset += len(body)
            archive.filelist += entries
        return file.getvalue()


def npy(shape, content=b""):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % shape
    return b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n" + content


@pytest.mark.parametrize(
    "name, make, said",
    [
        ("x.npz", lambda: stored("a.npy", npy(700_000_000)), "not an archive of plain arrays"),
        ("x.npz", lambda: stored("a.npy", npy(32 << 20, bytes(128 << 20))), "claims arrays of more than"),
        ("x.npz", lambda: stored("a.npy", npy(32 << 20, bytes(128 << 20)), 1000), "damaged"),
        ("x.pt", lambda: stored("x/data.pkl", bytes(128 << 20)), "compressed as its writers never do"),
        ("x.pt", lambda: overlapping(400, 500_000), "claims arrays of more than"),
    ],
    ids=["header", "compressed", "inflating to more", "compressed pickle", "overlapping"],
)
def test_archives_of_weights(tmp_path, name, make, said):
    path = tmp_path / name
    path.write_bytes(make())
    refused(lambda: torch_files.read(path), said)


def test_an_archive_of_cifar_with_a_pax_header_without_end(tmp_path):
    member = tarfile.TarInfo("data_batch_1.bin")
    member.type, member.size = tarfile.XHDTYPE, 128 << 20
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf() + bytes(member.size + 1024), 1))
    refused(lambda: image_files.read("CIFAR10", {path.name: path}), "holds no batch")


# Recordings


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def variable(name, numbers):
    """A compressed variable of bytes."""
    flags, dimensions = element(6, bytes(8)), element(5, struct.pack("<II", 1, len(numbers)))
    matrix = element(14, flags + dimensions + element(1, name) + element(2, numbers))
    packed = zlib.compress(matrix, 1)
    return struct.pack("<II", 15, len(packed)) + packed


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: variable(b"other", bytes(20 << 20)) * 10, "inflates to more than 32 MiB"),
        (lambda: b"".join(variable(name, bytes(7 << 20)) for name in (b"ts", b"x", b"y", b"pol")), "29360128 numbers"),
        (lambda: element(15, zlib.compress(element(14, bytes(8 << 20)))), "no column ts"),
        (
            lambda: b"".join(variable(name, bytes(n)) for name, n in ((b"ts", 3), (b"x", 1), (b"y", 3), (b"pol", 3))),
            "columns differ in length",
        ),
    ],
    ids=["many variables", "bytes", "empty elements", "lengths"],
)
def test_matlab_files(tmp_path, make, said):
    path = tmp_path / "a_1.mat"
    path.write_bytes(b"MATLAB".ljust(124) + b"\x00\x01IM" + make())
    refused(lambda: event_readers.read(path), said)


def test_a_module_whose_neurons_differ_is_not_taken_for_one_of_equal_ones():
    neurons_of = {str(i): Object(Name("a", "ParametricLIFNode"), {"v_threshold": v}) for i, v in enumerate((1.0, 0.5))}
    net = spikingjelly.MNISTNet(neurons.PLIF, channels=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="spiking layers differ in their settings"):
        rebuild(torch_files.Checkpoint(torch.state_dict(net), Object(Name("a", "Net"), {"_modules": neurons_of})))


def test_a_nested_key_is_refused_before_it_is_hashed(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pt(b"}" + NESTED + b"Ns"))
    refused(lambda: torch_files.read(path), "a key that is a tuple")


def test_an_archive_of_cifar_with_a_batch_larger_than_any(tmp_path):
    member = tarfile.TarInfo("data_batch_1.bin")
    member.size = 128 << 20
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf() + bytes(member.size + 1024), 1))
    refused(lambda: image_files.read("CIFAR10", {path.name: path}), "holds no batch")


def test_an_archive_of_cifar_that_leads_back_beyond_its_beginning(tmp_path):
    member = tarfile.TarInfo("x")
    member.size = -(1 << 20)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    refused(lambda: image_files.read("CIFAR10", {path.name: path}), "a member claims -1048576 bytes")
