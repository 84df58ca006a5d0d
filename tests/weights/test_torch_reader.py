"""The restricted reader: PyTorch's own files of both kinds, and hostile ones, refused before anything of them runs."""

import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.weights.torch_reader import TorchFile
from tests.torch_files import read_torch

DATA = Path(__file__).parents[1] / "fixtures" / "diffusers" / "torch"


# A pickle, piece by piece: each function returns the opcodes that push one value.
def plain(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(module: str, name: str, *args: bytes) -> bytes:
    return glob(module, name) + tuple_of(*args) + b"R"


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return tuple_of(plain("storage"), glob("torch", kind), plain(key), plain("cpu"), plain(numel)) + b"Q"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, **kind) -> bytes:
    parts = (storage(**kind), plain(offset), plain(shape), plain(strides), plain(False), call("collections", "OrderedDict"))
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zip_file(path: Path, body: bytes, records=None, prefix="archive", compression=zipfile.ZIP_STORED) -> Path:
    """Writes a zip as torch.save does, with six floats in record 0 unless told otherwise."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", whole(body))
        for name, data in ({"data/0": np.arange(6, dtype=np.float32).tobytes()} if records is None else records).items():
            archive.writestr(f"{prefix}/{name}", data)
    return path


def sequence_file(path: Path, body: bytes, tail: bytes | None = None) -> Path:
    """Writes the container of before PyTorch 1.6 around `body`."""
    parts = [whole(plain(value)) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    tail = whole(plain(["0"])) + struct.pack("<q", 6) + np.arange(6, dtype=np.float32).tobytes() if tail is None else tail
    path.write_bytes(b"".join(parts) + whole(body) + tail)
    return path


@pytest.fixture(params=[zip_file, sequence_file], ids=["zip", "sequence"])
def container(request, tmp_path):
    """Both containers: a function from the opcodes of an object to a path."""
    return lambda body: request.param(tmp_path / "file.bin", body)


@pytest.mark.parametrize("name", ["zip.bin", "sequence.bin"])
def test_reads_all_dtypes_and_layouts_that_pytorch_wrote(name):
    arrays = read_torch(DATA / name)
    expected = np.load(DATA / "tensors.npz")
    assert sorted(arrays) == sorted(expected.files)
    for key in expected.files:
        dtype = ml_dtypes.bfloat16 if key == "bfloat16" else expected[key].dtype
        assert arrays[key].dtype == dtype
        np.testing.assert_array_equal(arrays[key].astype(expected[key].dtype), expected[key])


def test_reads_a_torchscript_archive_by_attribute_path():
    arrays = read_torch(DATA / "script.pt")
    expected = np.load(DATA / "script.npz")
    assert set(expected.files) <= set(arrays)
    for key in expected.files:
        assert arrays[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(arrays[key], expected[key])


def test_tensors_are_read_one_at_a_time_and_shapes_without_reading(tmp_path):
    path = zip_file(tmp_path / "a.bin", dict_of(a=tensor(), b=tensor((3,), (2,), 1)))
    file = TorchFile(path)
    assert list(file) == ["a", "b"] and len(file) == 2 and file.shape("b") == (3,)
    np.testing.assert_array_equal(file["b"], [1, 3, 5])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="ends within a"):
        file["a"]


def test_what_is_no_tensor_is_left_out_and_metadata_passed_over(container):
    state = dict_of(
        w=tensor(), epoch=plain(3), rate=plain(0.5), note=plain("x"), nothing=b"N", shape=call("torch", "Size", plain([1]))
    )
    with_metadata = (
        call("collections", "OrderedDict") + b"(" + plain("w") + tensor() + b"u" + plain({"_metadata": {"": 1}}) + b"b"
    )
    assert list(read_torch(container(state))) == ["w"]
    assert list(read_torch(container(with_metadata))) == ["w"]


HOSTILE = {
    "os.system": call("os", "system", plain("touch pwned")),
    "posix.system": call("posix", "system", plain("touch pwned")),
    "builtins.eval": call("builtins", "eval", plain("open('pwned', 'w')")),
    "builtins.getattr": call("builtins", "getattr", glob("collections", "OrderedDict"), plain("fromkeys")),
    "subprocess.Popen": glob("subprocess", "Popen") + plain((["touch", "pwned"],)) + b"\x81",
    "torch.serialization.os.system": call("torch.serialization", "os.system", plain("touch pwned")),
    "torch.os.system": plain("torch") + plain("os.system") + b"\x93" + plain(("touch pwned",)) + b"R",
    "collections.OrderedDict.fromkeys": call("collections", "OrderedDict.fromkeys", plain([1])),
    "torch.load": call("torch", "load", plain("pwned")),
    "torch.storage._load_from_bytes": call("torch.storage", "_load_from_bytes", plain("x")),
    "numpy.core.multiarray._reconstruct": call("numpy.core.multiarray", "_reconstruct", plain(0)),
    "__torch__x.y": call("__torch__x", "y"),
    "INST": b"(" + plain("touch pwned") + b"ios\nsystem\n",
    "OBJ": b"(" + glob("collections", "OrderedDict") + b"o",
    "EXT1": b"\x82\x01",
    "PERSID": b"P0\n",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"x",
    "a call of what is no function": plain("touch pwned") + plain(()) + b"R",
    "the state of a Tensor": tensor() + plain({"shape": (9,)}) + b"b",
    "the state of a list": plain([1]) + plain({"append": 1}) + b"b",
    "a call of torch.FloatStorage": call("torch", "FloatStorage", plain(1 << 40)),
    "an object of": glob("collections", "OrderedDict") + plain(()) + b"\x81",
    "a storage of": tuple_of(plain("storage"), plain("FloatStorage"), plain("0"), plain("cpu"), plain(1)) + b"Q",
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_not_run(container, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for body in (HOSTILE[words], dict_of(w=tensor(), x=HOSTILE[words])):
        path = container(body)
        with pytest.raises(UserError) as caught:
            read_torch(path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]


def test_the_hostile_pickles_would_run_in_pythons_own_unpickler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(whole(HOSTILE["os.system"]))
    assert (tmp_path / "pwned").exists()


def test_torchscript_classes_are_opaque_records(container):
    body = glob("__torch__.os", "system") + plain(("touch pwned",)) + b"\x81" + dict_of(w=tensor()) + b"b"
    assert list(read_torch(container(body))) == ["w"]


def test_what_lightning_keeps_beside_the_weights_is_dropped(container):
    """As in the .ckpt files of Stable Diffusion: state of callbacks under their class, NumPy scalars, hyperparameters."""
    dtype = call("numpy", "dtype", plain("f8"), plain(False), plain(True)) + plain((3, "<", None, None, None, -1, -1, 0)) + b"b"
    scalar = call("numpy.core.multiarray", "scalar", dtype, call("_codecs", "encode", plain("12345678"), plain("latin1")))
    callback = glob("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    hyper = glob("pytorch_lightning.utilities.parsing", "AttributeDict") + b")\x81" + b"(" + plain("rate") + plain(0.1) + b"u"
    body = dict_of(
        callbacks=b"}" + callback + dict_of(best=scalar) + b"s", hyper_parameters=hyper, state_dict=dict_of(w=tensor())
    )
    read = read_torch(container(body))
    assert list(read) == ["state_dict.w"]
    np.testing.assert_array_equal(read["state_dict.w"], np.arange(6, dtype=np.float32).reshape(2, 3))


LIES = {
    "a shape beyond its storage": tensor((3, 3), (3, 1)),
    "strides beyond its storage": tensor((2, 3), (4, 1)),
    "an offset beyond its storage": tensor((2, 3), (3, 1), 1),
    "a negative offset": tensor((2,), (1,), -1),
    "a negative stride": tensor((2,), (-1,), 5),
    "one value repeated": tensor((1 << 40,), (0,)),
    "a negative shape": tensor((-2, -3), (3, 1)),
    "a shape of floats": tensor((2.0, 3.0), (3, 1)),
    "more strides than axes": tensor((6,), (1, 1)),
    "a storage larger than its record": tensor(numel=7),
    "a storage smaller than its record": tensor((5,), (1,), numel=5),
    "a storage of petabytes": tensor((1 << 46,), (1,), numel=1 << 46),
    "a storage of another dtype": tensor(kind="DoubleStorage"),
    "a record that is not there": tensor(key="1"),
    "a path for a record": tensor(key="../../0"),
    "a negative storage": tensor((), (), numel=-1),
    "70 axes": tensor((1,) * 70, (1,) * 70),
}


@pytest.mark.parametrize("size", [1, (1 << 47) + 1])
def test_400_000_axes_are_refused_before_their_product_is_taken(tmp_path, size):
    path = zip_file(tmp_path / "file.bin", dict_of(w=tensor((size,) * 400_000, (1,) * 400_000)))
    with pytest.raises(UserError, match="400000 sizes and 400000 strides"):
        read_torch(path)


@pytest.mark.parametrize("lie", LIES)
def test_sizes_that_lie_are_refused_without_the_memory_they_claim(container, lie):
    path = container(dict_of(w=LIES[lie]))
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"\x8d" + struct.pack("<Q", 1 << 40),  # a string of a terabyte
        b"X" + struct.pack("<I", (1 << 32) - 1),  # a string of 4 GB
        b"\x8b" + struct.pack("<i", 2**31 - 1),  # a number of 2 GB
        b"N" + b"r" + struct.pack("<I", (1 << 32) - 1) + b"0",  # a memo of 4 billion entries, then an empty stack
        b"]q\x00h\x00a",  # a list that holds itself
        b"]" + b"".join(b"q" + bytes([i]) + b"]" + (b"h" + bytes([i]) + b"a") + (b"h" + bytes([i]) + b"a") for i in range(60)),
        b"}" * 3,  # more than one value
        b"",
        b"t",
        b"h\x05",
        b"\x85",
        b"N" + plain(1) + b"a",
    ],
)
def test_damaged_or_endless_pickles_are_refused_in_little_memory(container, body):
    path = container(body)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_million_views_of_one_storage_are_refused(container):
    with pytest.raises(UserError, match="claim"):
        read_torch(container(b"](" + tensor() + b"q\xff" + b"h\xff" * 1000 + b"e"))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "archive/../../evil", "..\\evil", "C:/evil"])
def test_a_path_that_leaves_the_zip_is_refused(tmp_path, name):
    path = zip_file(tmp_path / "file.bin", dict_of(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="outside the archive"):
        read_torch(path)


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_directory_that_lies_about_a_records_size_is_refused_in_little_memory(tmp_path, name):
    claimed = 1 << 30
    path = zip_file(tmp_path / "file.bin", dict_of(w=tensor((claimed // 4,), (1,), numel=claimed // 4)))
    data = bytearray(path.read_bytes())
    entry = data.rindex(f"archive/{name}".encode()) - 46  # the directory is last, and a name stands 46 bytes into its entry
    assert data[entry : entry + 4] == b"PK\x01\x02"
    struct.pack_into("<II", data, entry + 20, claimed, claimed)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"ends within its record archive/{name}"):
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("offset", [1, 1 << 20, (1 << 32) - 2])
def test_a_directory_that_lies_about_a_records_place_is_refused(tmp_path, offset):
    path = zip_file(tmp_path / "file.bin", dict_of(w=tensor()))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"archive/data/0") - 46
    struct.pack_into("<I", data, entry + 42, offset)
    path.write_bytes(data)
    with pytest.raises(UserError, match="archive/data/0"):
        read_torch(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: zip_file(path, dict_of(w=tensor()), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: zip_file(path, dict_of(w=tensor()), prefix="a/b"), "NAME/data.pkl"),
        (lambda path: zip_file(path, dict_of(w=tensor()), records={"byteorder": "big", "data/0": bytes(24)}), "big-endian"),
        (lambda path: path.write_bytes(whole(plain({"w": [1.0]}))), "not of torch.save"),
        (lambda path: path.write_bytes(b"GIF89a"), "neither"),
        (lambda path: path.write_bytes(b""), "ends where 1 more"),
        (
            lambda path: sequence_file(path, dict_of(w=tensor()), whole(plain(["0", "1"])) + struct.pack("<q", 6) + bytes(24)),
            "ends where 8 more",
        ),
        (lambda path: sequence_file(path, dict_of(w=tensor()), whole(plain(["0"])) + struct.pack("<q", 1 << 60)), "ends within"),
        (lambda path: sequence_file(path, dict_of(w=tensor()), whole(plain({"0": 1}))), "no list of storages"),
        (
            lambda path: sequence_file(path, dict_of(w=tensor()), whole(plain(["1"])) + struct.pack("<q", 6) + bytes(24)),
            "no tensor views",
        ),
    ],
)
def test_other_containers_are_refused(tmp_path, make, words):
    make(tmp_path / "file.bin")
    with pytest.raises(UserError, match=words):
        read_torch(tmp_path / "file.bin")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_torch(tmp_path / "absent.bin")
    with pytest.raises(UserError, match="cannot read"):
        read_torch(tmp_path)


@pytest.mark.parametrize("name", ["zip.bin", "sequence.bin", "script.pt"])
def test_cut_anywhere_a_file_is_refused(tmp_path, name):
    data = (DATA / name).read_bytes()
    for length in range(0, len(data), 61):
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(UserError):
            read_torch(tmp_path / "cut.bin")


@pytest.mark.parametrize("name", ["zip.bin", "sequence.bin", "script.pt"])
def test_with_any_bytes_changed_a_file_is_read_or_refused(tmp_path, name):
    data = (DATA / name).read_bytes()
    numbers = random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(numbers.randint(1, 4)):
            changed[numbers.randrange(len(data))] = numbers.randrange(256)
        (tmp_path / "changed.bin").write_bytes(changed)
        try:
            read_torch(tmp_path / "changed.bin")
        except UserError:
            refused += 1
    assert refused > 30


def test_the_pieces_above_are_real_pickles():
    for body in (tensor(), dict_of(w=tensor()), HOSTILE["torch.os.system"]):
        assert [opcode.name for opcode, _, _ in pickletools.genops(whole(body))][-1] == "STOP"
