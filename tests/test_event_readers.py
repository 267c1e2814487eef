"""Every form of recording gives back the events that were written; a damaged file is named with what is wrong."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from event_files import random_events, write_aedat2, write_aedat3
from scipy.io import savemat

from plif_jax.data import digits, event_readers, matlab
from plif_jax.errors import UserError


def assert_same(got, events):
    for name in "txyp":
        np.testing.assert_array_equal(got[name], events[name], err_msg=name)


def test_columns_are_of_one_length():
    with pytest.raises(ValueError, match="1 values of x for 5 of t"):
        event_readers._events(np.arange(5), np.array([3]), np.arange(5), np.arange(5))


def test_five_byte_round_trip(tmp_path):
    events = random_events(0, 500, 34, 34, duration=1 << 23)
    digits.write_recording(tmp_path / "1.bin", events)
    assert (tmp_path / "1.bin").stat().st_size == 2500
    assert_same(event_readers.read(tmp_path / "1.bin"), events)


def test_aedat2_round_trip(tmp_path):
    events = random_events(1, 500, 128, 128)
    write_aedat2(tmp_path / "cifar10_cat_7.aedat", events)
    assert_same(event_readers.read(tmp_path / "cifar10_cat_7.aedat"), events)


def test_aedat2_address_bits(tmp_path):
    """Against the bits themselves: ON (bit 0 clear), column bits 1-7, row bits 8-14."""
    data = np.array([[0b0000011_0000101_0, 17]], ">u4").tobytes()
    (tmp_path / "a.aedat").write_bytes(b"#!AER-DAT2.0\r\n" + data)
    assert event_readers.read(tmp_path / "a.aedat").tolist() == [(127 - 5, 3, 17, 1)]


def test_aedat2_of_another_camera_is_refused(tmp_path):
    """What a DVS128's plug tells, bits 15 and 31, is counted as the paper's program counts it."""
    for address in (0x8000_0000, 0x8000, 0x1_0000, 0x4000_0000):
        (tmp_path / "a.aedat").write_bytes(b"#!AER-DAT2.0\r\n" + np.array([0, 1, address, 17], ">u4").tobytes())
        if not address & 0x7FFF_0000:
            assert event_readers.read(tmp_path / "a.aedat").tolist() == [(127, 0, 1, 1), (127, 0, 17, 1)]
            continue
        with pytest.raises(UserError, match=f"addresses are not those of a DVS128, .*: one is {address:#x}"):
            event_readers.read(tmp_path / "a.aedat")


def test_aedat_headers(tmp_path):
    """A comment may say anything, and nothing may follow."""
    events, path = random_events(1, 50, 128, 128), tmp_path / "a.aedat"
    write_aedat2(path, events)
    path.write_bytes(path.read_bytes().replace(b"# Timestamps", b"# Creation time: Thu Jan 1 2015\r\n#\n# Timestamps"))
    assert_same(event_readers.read(path), events)
    for end in (b"\r\n", b"\r\n# no more\n", b"\n# no end"):
        path.write_bytes(b"#!AER-DAT2.0" + end)
        assert len(event_readers.read(path)) == 0


def test_aedat4_and_aedat2_give_the_same_events(tmp_path, monkeypatch):
    """DV, which converted CIFAR10-DVS for tonic, counts x and y from the opposite corner of the address."""
    events = random_events(2, 300, 128, 128)
    write_aedat2(tmp_path / "a.aedat", events)
    column, row = 127 - events["x"], events["y"]  # the address bits
    converted = np.empty(300, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
    for name, values in zip(converted.dtype.names, (events["t"], 127 - column, 127 - row, events["p"]), strict=True):
        converted[name] = values
    monkeypatch.setattr(event_readers.io, "read_aedat4", lambda path: converted)
    (tmp_path / "a.aedat4").write_bytes(b"#!AER-DAT4.0\r\n")
    assert_same(event_readers.read(tmp_path / "a.aedat4"), event_readers.read(tmp_path / "a.aedat"))


def test_aedat3_round_trip_without_special_events(tmp_path):
    events = random_events(3, 500, 128, 128)
    write_aedat3(tmp_path / "user01_led.aedat", events)
    assert_same(event_readers.read(tmp_path / "user01_led.aedat"), events)


def test_tonics_gesture_arrays_are_in_milliseconds(tmp_path):
    events = random_events(4, 300, 128, 128)
    events["t"] = events["t"] // 1000 * 1000
    np.save(tmp_path / "3.npy", np.stack([events["x"], events["y"], events["p"], events["t"] // 1000], 1))
    assert_same(event_readers.read(tmp_path / "3.npy"), events)


def test_tonics_times_may_be_half_precision(tmp_path):
    np.save(tmp_path / "3.npy", np.array([[1, 2, 1, 100], [3, 4, 0, 2000]], np.float16))
    assert event_readers.read(tmp_path / "3.npy").tolist() == [(1, 2, 100_000, 1), (3, 4, 2_000_000, 0)]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.uint16])
def test_asl_dvs_matlab_files(tmp_path, compressed, dtype):
    """As SciPy writes them: its writer is not ours."""
    from scipy.io import savemat

    events = random_events(5, 300, 180, 240, duration=60_000)
    columns = {"ts": events["t"], "x": 239 - events["x"], "y": 179 - events["y"], "pol": events["p"]}
    columns = {name: column[:, None].astype(dtype) for name, column in columns.items()}
    savemat(tmp_path / "a_0001.mat", columns, do_compression=compressed)
    assert_same(event_readers.read(tmp_path / "a_0001.mat"), events)


def truncated(name, cut):
    def write(path):
        writers = {".bin": digits.write_recording, ".aedat": write_aedat2}
        (write_aedat3 if "user" in name else writers[path.suffix])(path, random_events(6, 100, 34, 34))
        path.write_bytes(path.read_bytes()[:cut])

    return write


def written(content):
    return lambda path: path.write_bytes(content)


def long_header(path):
    """Claimed in a file that is long enough for it."""
    np.save(path, np.zeros((20_000, 4)))
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xff")


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("1.bin", lambda path: path.write_bytes(b""), "is empty"),
        ("1.bin", truncated("1.bin", -2), "truncated: 498 bytes are not whole events of 5"),
        ("c_1.aedat", truncated("c_1.aedat", -3), "truncated: 797 bytes of data are not whole events of 8"),
        ("user1.aedat", truncated("user1.aedat", -3), "truncated: a packet claims 400 bytes, 397 are left"),
        ("user1.aedat", truncated("user1.aedat", -410), "truncated: it ends inside a packet header"),
        ("c_1.aedat", lambda path: path.write_bytes(b"no header at all"), "does not begin with #!AER-DAT"),
        ("c_1.aedat", written(b"#!AER-DAT\r\n"), "does not begin with #!AER-DAT and a version"),
        ("c_1.aedat", written(b"#!AER-DAT1.0\r\n" + bytes(60)), r"the file is AEDAT 1\.0; 2\.0 and 3\.1 are read"),
        ("c_1.aedat", written(b"#!AER-DAT4.0\r\n" + bytes(60)), r"the file is AEDAT 4\.0; 2\.0 and 3\.1 are read"),
        ("user1.aedat", written(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"), "holds no polarity events"),
        ("user1.aedat", written(b"#!AER-DAT3.1\r\n\x01\x80" + bytes(26)), "a packet is compressed: save the"),
        ("c_1.aedat4", lambda path: path.write_bytes(b"#!AER-DAT4.0\r\n\x10"), "c_1.aedat4"),
        ("3.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "not an array as NumPy saves it"),
        ("3.npy", lambda path: np.save(path, np.zeros((5, 3))), r"an array \[5, 3\], not \[N, 4\]"),
        ("3.npy", lambda path: np.save(path, np.array([{"t": 1}])), "not a readable .npy recording"),
        ("3.npy", lambda path: np.save(path, np.full((5, 4), 1.7)), "column x holds fractions"),
        ("3.npy", lambda path: np.save(path, np.full((5, 4), np.nan)), "column t holds NaN or infinity"),
        ("3.npy", lambda path: np.save(path, np.full((5, 4), "1")), r"the file holds <U1, not numbers"),
        ("3.npy", lambda path: np.save(path, np.zeros((5, 4), "m8")), "the file holds timedelta64, not numbers"),
        ("3.npy", long_header, r"not a readable .npy recording \(Header info length \(65535\)"),
        ("a_1.mat", lambda path: path.write_bytes(b"MATLAB"), "not a MATLAB level 5 file"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, damage, says):
    damage(tmp_path / name)
    with pytest.raises(UserError, match=says) as error:
        event_readers.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_claimed_size_is_not_allocated(tmp_path):
    """A header of an array of 2^50 rows, and no data."""
    np.save(tmp_path / "1.npy", np.zeros((1000, 4), np.int64))
    content = (tmp_path / "1.npy").read_bytes()
    (tmp_path / "1.npy").write_bytes(content[:128].replace(b"(1000, 4), }            ", b"(1125899906842624, 4), }"))
    with pytest.raises(UserError, match=r"1\.npy"):
        event_readers.read(tmp_path / "1.npy")


def packet_of_aedat3(words, overflow=0, number=None):
    """A packet of polarity events, which may claim another number than it holds."""
    n = len(words)
    head = struct.pack("<HHIIIIII", 1, 1, 8, 4, overflow, n, n if number is None else number, n)
    return head + np.array(words, "<u4").tobytes()


def test_aedat3_times_go_on_after_their_31_bits(tmp_path):
    packets = packet_of_aedat3([[1, 2**31 - 1]]) + packet_of_aedat3([[1, 5]], overflow=1)
    (tmp_path / "user1.aedat").write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + packets)
    assert event_readers.read(tmp_path / "user1.aedat")["t"].tolist() == [2**31 - 1, 2**31 + 5]


def test_an_aedat3_packet_that_claims_more_than_it_holds_is_refused(tmp_path):
    packets = packet_of_aedat3([[1, 7]], number=2) + packet_of_aedat3([[1, 9]])
    (tmp_path / "user1.aedat").write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + packets)
    with pytest.raises(UserError, match="a packet claims 2 of 1 polarity events of 8 bytes, not 8"):
        event_readers.read(tmp_path / "user1.aedat")


def test_tonics_milliseconds_are_rounded_to_the_microsecond_that_they_were(tmp_path):
    np.save(tmp_path / "3.npy", np.array([[1, 2, 1, 1.001], [1, 2, 1, 4.35]]))
    assert event_readers.read(tmp_path / "3.npy")["t"].tolist() == [1001, 4350]


def test_the_end_of_a_name_may_be_in_capitals(tmp_path):
    digits.write_recording(tmp_path / "1.BIN", {"t": [5], "x": [1], "y": [2], "p": [1]})
    assert event_readers.read(tmp_path / "1.BIN").tolist() == [(1, 2, 5, 1)]


def test_matlab_columns_of_bytes_are_turned_without_overflow(tmp_path):
    events = {"ts": 3, "x": 9, "y": 8, "pol": 1}
    savemat(tmp_path / "a_1.mat", {name: np.array([[value]], np.int8) for name, value in events.items()})
    assert event_readers.read(tmp_path / "a_1.mat").tolist() == [(230, 171, 3, 1)]


def test_matlab_files_of_the_other_byte_order():
    def element(kind, data):
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    parts = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 3, 1)) + element(1, b"ts")
    parts += element(9, np.arange(3, dtype=">f8").tobytes())
    content = bytes(124) + b"\x01\x00MI" + element(14, parts)
    np.testing.assert_array_equal(matlab.columns(content, ("ts",))["ts"], [0, 1, 2])


def test_a_matlab_element_that_inflates_beyond_measure_is_not_inflated():
    bomb = zlib.compress(bytes(400 << 20), 1)
    content = bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(bomb)) + bomb
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="the file inflates to more than 32 MiB"):
            matlab.columns(content, ("ts",))
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_a_short_matlab_element_holds_four_bytes_at_most():
    content = bytes(124) + b"\x00\x01IM" + struct.pack("<HH", 1, 8) + bytes(12)
    with pytest.raises(UserError, match="a short element claims 8 bytes"):
        matlab.columns(content, ("ts",))
