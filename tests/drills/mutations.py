"""Whole files of every format that users bring, and damage to them: by bytes, and by values of their JSON or of what they wrap.

    python -m tests.drills.mutations 3000 [FORMAT ...]     prints what each format's reader makes of that many mutations

Without FORMAT it tries every one.
"""

import gzip
import io
import json
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from retrack_jax.checks import UserError, check

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = FIXTURES / "tiny_sd"
LIMIT_SECONDS = 30.0
LIMIT_BYTES = 2 << 30  # above what the honest file needs
INTEGERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 10**9, 10**7, 2**62, 2**63 - 1)
VALUES = (
    None, True, False, 0, -1, 1.5, 10**7, 10**9, 2**63, 10**40, -1e308, float("nan"), float("inf"), "", "x", "\ud800", "../x",
    "a" * 5000, [], {}, [1], [[]], {"a": 1}, [1.5], [10**9], ["x"], [None], [10**9] * 4, [8] * 200, {"x": [{}] * 3},
)  # fmt: skip
NAMES = (
    "safetensors", "one file of XL", "torch zip", "torch sequence", "torchscript", "joblib", "joblib gz", "png", "jpeg", "webp",
    "gif", "tiff", "bmp", "npz", "npy", "parquet", "array_record", "dataset_info.json", "config.json", "scheduler_config.json",
    "index.json", "unet's config.json", "vae's config.json", "text encoder's config.json", "vocab.json", "merges.txt",
    "tokenizer_config.json", "special_tokens_map.json", "prompts", "labels", "clustering_info.json", "our JSON",
)  # fmt: skip


class Format(NamedTuple):
    """One kind of file: where it lies below a folder, its bytes, what reads it, and a change to what it wraps (None: none)."""

    name: str
    content: bytes
    read: Callable[[Path], object]
    inner: Callable[[bytes, random.Random], bytes] | None = None


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Returns `content` with one to four damages: flipped bits, integers, other bytes, cuts, holes, repeats."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.choice((chance.randrange(len(data) + 1), chance.randrange(min(len(data), 200) + 1), len(data) - 1))
        at = max(0, min(at, len(data) - 1))
        length = chance.choice((1, 4, 16, 200))
        match chance.randrange(7):
            case 0:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << chance.randrange(8)])
            case 1:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(INTEGERS) % 2 ** (8 * size)
                data[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))
            case 2:
                data[at : at + length] = chance.randbytes(length)
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
            case 6:
                data[at : at + length] = bytes(length)
        if not data:
            break
    return bytes(data)


def mutated_value(value, chance: random.Random):
    """Returns a JSON value with another value somewhere in it, or with a name or an entry gone, added or of another kind."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        place, changed = chance.choice(places), value.copy()
        match chance.randrange(8):
            case 0:
                del changed[place]
            case 1 if isinstance(value, dict):
                changed[str(chance.choice(VALUES))[:50]] = changed.pop(place)
            case 2 if isinstance(value, list):
                changed += [changed[place]] * chance.choice((1, 3, 100))
            case _:
                changed[place] = mutated_value(value[place], chance)
        return changed
    if isinstance(value, (int, float)) and chance.random() < 0.5:
        return chance.choice((-value, value + 0.5, value * 10**6, str(value), [value], value + 1))
    return chance.choice(VALUES)


def _json(content: bytes, chance: random.Random) -> bytes:
    text = json.dumps(mutated_value(json.loads(content), chance))
    return (chance.choice(("[" * 100_000, "9" * 6000)) if chance.random() < 0.01 else text).encode()


def _safetensors_header(content: bytes, chance: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = _json(content[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _tensors(content: bytes, chance: random.Random) -> bytes:
    """Changes names, shapes and dtypes of a few tensors of a safetensors file, each of which its bytes still fill."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(chance.choice((1, 1, 3, 30))):
        name = chance.choice([name for name in header if name != "__metadata__"])
        tensor, shape = header[name], header[name]["shape"]
        match chance.randrange(4):
            case 0:
                parts = chance.choice(list(header)).split(".")
                other = ".".join([*name.split(".")[: chance.randrange(5)], *parts[chance.randrange(len(parts)) :]])
                header[other if other not in header else f"{name}x"] = header.pop(name)
            case 1:
                shapes = shape[::-1], [1, *shape], [*shape, 1, 1], [int(np.prod(shape))], [1] * 60 + shape
                tensor["shape"] = chance.choice(shapes)
            case 2:
                same = {"F16": "BF16", "F32": "I32", "I32": "F32", "BF16": "I16"}
                tensor["dtype"] = same.get(tensor["dtype"], tensor["dtype"])
            case 3 if len(shape) > 1 and shape[0] % 2 == 0:
                tensor["shape"] = [shape[0] // 2, shape[1] * 2, *shape[2:]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _zip_member(content: bytes, chance: random.Random) -> bytes:
    """Damages one member of a zip and packs it again, so that its checksum is right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(buffer, "w") as damaged:
        chosen = chance.choice(whole.namelist())
        for name in whole.namelist():
            damaged.writestr(name, mutated(whole.read(name), chance) if name == chosen else whole.read(name))
    return buffer.getvalue()


def _gzipped(content: bytes, chance: random.Random) -> bytes:
    return gzip.compress(mutated(gzip.decompress(content), chance), 1)


def _png_chunks(content: bytes, chance: random.Random) -> bytes:
    """Damages chunks of a PNG and writes their right checksums."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append([content[at + 4 : at + 8], content[at + 8 : at + 8 + length]])
        at += 12 + length
    chosen = chance.choice(chunks)
    chosen[1] = mutated(chosen[1], chance) if chosen[1] else b""
    if chosen[0] == b"IDAT" and chance.random() < 0.5:
        chosen[1] = zlib.compress(mutated(zlib.decompress(content[content.index(b"IDAT") + 4 :]), chance))
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return content[:8] + b"".join(packed)


def _image(kind: str, folder: Path) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def _read_all(path: Path) -> None:
    from retrack_jax.weights.folder import open_weights

    dict(open_weights(path.parent)[1])


def _source(name: str, **fields) -> Callable[[Path], object]:
    """Returns what loads a source of data from the folder of a file."""

    def read(path: Path):
        from retrack_jax.config.options import DataOptions
        from retrack_jax.data.sources.table import SOURCES

        place = path if name == "npz" else path.parent
        options = dict(vars(DataOptions(source=name, dir=str(place), cache_dir=str(path.parent.parent / "cache"))), **fields)
        return np.asarray(SOURCES[name].load(options).images).sum()

    return read


def _prepared(path: Path) -> None:
    from retrack_jax.config.options import DataOptions
    from retrack_jax.data.sources.tfds import load_tfds

    folder = path.parents[2]
    load_tfds(path.parents[1].name, vars(DataOptions(dir=str(folder), cache_dir=str(folder.parent / "cache"))))


def formats(folder: Path) -> dict[str, Format]:
    """Returns every format by name. What a file needs around it is written below `folder`/NAME."""
    import joblib
    import pyarrow
    import pyarrow.parquet
    from sklearn.cluster import KMeans

    from retrack_jax import files
    from retrack_jax.checkpoints import export_single_file
    from retrack_jax.checkpoints.diffusers_import import import_diffusers, read_schedule_config
    from retrack_jax.checkpoints.single_file import SingleFile
    from retrack_jax.checkpoints.stable_diffusion import load_pipeline
    from retrack_jax.checkpoints.text_encoders import TEXT_TABLE
    from retrack_jax.data.sources.concepts import INFO, LABELS, memorised_name, prompts_of, read_labels
    from retrack_jax.diffusion.schedule import Schedule
    from retrack_jax.metrics.kmeans import read_centers
    from retrack_jax.models.tokenizer import load_tokenizer
    from retrack_jax.weights.names import DIFFUSERS, from_torch
    from tests.tiny_checkpoint import write_model
    from tests.tiny_xl import write_xl

    model = write_model(folder / "model")
    torch = FIXTURES / "diffusers" / "torch"
    safetensors = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    clusters = KMeans(2, n_init=1, random_state=0).fit(np.random.default_rng(0).random((40, 48)).astype(np.float32))
    joblib.dump(clusters, folder / "k.joblib")
    joblib_file = (folder / "k.joblib").read_bytes()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.arange(640, dtype=np.uint8).reshape(10, 8, 8, 1), labels=np.arange(10))
    npz, buffer = buffer.getvalue(), io.BytesIO()
    np.save(buffer, np.arange(640, dtype=np.uint8).reshape(10, 8, 8, 1))
    npy, buffer = buffer.getvalue(), io.BytesIO()
    table = pyarrow.table({"image": [{"bytes": _image("png", folder), "path": None}] * 6, "label": list(range(6))})
    pyarrow.parquet.write_table(table, buffer)
    with zipfile.ZipFile(FIXTURES / "tfds.zip") as archive:
        archive.extractall(folder / "prepared" / "sets")
    mnist = next((folder / "prepared" / "sets" / "mnist").glob("*/*train.array_record*"))
    info = mnist.with_name("dataset_info.json")

    def pipeline_with(path: Path) -> None:
        load_pipeline(path.parents[1])

    def pipeline_file(part: str, name: str) -> Format:
        """A file of a copy of the tiny Stable Diffusion, whose other files are links."""
        place = folder / f"pipeline_{part}_{name}"
        for source in (TINY / "pipeline").rglob("*"):
            target = place / source.relative_to(TINY / "pipeline")
            target.mkdir(parents=True) if source.is_dir() else target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file() and (source.parent.name, source.name) != (part, name):
                target.symlink_to(source)
        content = (TINY / "pipeline" / part / name).read_bytes()
        read = pipeline_with if part != "tokenizer" else lambda path: load_tokenizer(path.parent)
        return Format(f"{place.name}/{part}/{name}", content, read, _json if name.endswith("json") else None)

    xl = load_pipeline(write_xl(folder / "xl"))
    export_single_file(folder / "xl_file", xl, xl.unet_params)
    targets = {"unet": xl.unet_params, "vae": xl.vae_params}
    targets |= {"text_encoder": xl.text_encoders[0].params, "text_encoder_2": xl.text_encoders[1].params}

    def one_file(path: Path) -> None:
        file = SingleFile(path)
        check(file.layout.text_encoders == ("text_encoder", "text_encoder_2"), "of another model")
        for part, target in targets.items():
            from_torch(file.part(part, target), target, table=TEXT_TABLE if "text" in part else DIFFUSERS, where=str(path))
        file.schedule(xl.schedule.to_config(), xl.path)

    config, schedule = model / "unet" / "config.json", TINY / "pipeline" / "scheduler" / "scheduler_config.json"
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}, "metadata": {"total_size": 8}}
    shape = {"seconds": float, "steps": int, "inner": {"a": str}, "metrics": files.NUMBERS}
    ours = {"seconds": 1.5, "steps": 3, "inner": {"a": "x"}, "metrics": {"fid": 1.0}}
    prompts = (TINY / "concepts" / "original_prompts.json").read_bytes()
    concept = shutil.copytree(TINY / "concepts" / "red_circle", folder / "concept")
    labels, about = (concept / LABELS).read_bytes(), (concept / INFO).read_bytes()
    return {
        "safetensors": Format("st/diffusion_pytorch_model.safetensors", safetensors, _read_all, _safetensors_header),
        "one file of XL": Format(
            "one/model.safetensors", (folder / "xl_file" / "model.safetensors").read_bytes(), one_file, _tensors
        ),
        "torch zip": Format("zip/diffusion_pytorch_model.bin", (torch / "zip.bin").read_bytes(), _read_all, _zip_member),
        "torch sequence": Format("seq/diffusion_pytorch_model.bin", (torch / "sequence.bin").read_bytes(), _read_all),
        "torchscript": Format("script/diffusion_pytorch_model.bin", (torch / "script.pt").read_bytes(), _read_all, _zip_member),
        "joblib": Format("plain/k.joblib", joblib_file, read_centers),
        "joblib gz": Format("gz/k.joblib", gzip.compress(joblib_file), read_centers, _gzipped),
        "png": Format("png/a.png", _image("png", folder), _source("folder"), _png_chunks),
        "jpeg": Format("jpeg/a.jpg", _image("jpeg", folder), _source("folder")),
        "webp": Format("webp/a.webp", _image("webp", folder), _source("folder")),
        "gif": Format("gif/a.gif", _image("gif", folder), _source("folder", channels=3)),
        "tiff": Format("tiff/a.tif", _image("tiff", folder), _source("folder")),
        "bmp": Format("bmp/a.bmp", _image("bmp", folder), _source("folder")),
        "npz": Format("npz/a.npz", npz, _source("npz"), _zip_member),
        "npy": Format("npy/a.npy", npy, _source("npz")),
        "parquet": Format("parquet/train-00000-of-00001.parquet", buffer.getvalue(), _source("parquet")),
        "array_record": Format(mnist.relative_to(folder).as_posix(), mnist.read_bytes(), _prepared),
        "dataset_info.json": Format(info.relative_to(folder).as_posix(), info.read_bytes(), _prepared, _json),
        "config.json": Format(
            config.relative_to(folder).as_posix(), config.read_bytes(), lambda path: import_diffusers(path.parent), _json
        ),
        "scheduler_config.json": Format(
            "schedule/scheduler_config.json", schedule.read_bytes(),
            lambda path: Schedule.from_config(read_schedule_config(path.parent)), _json,
        ),
        "index.json": Format(
            "index/diffusion_pytorch_model.safetensors.index.json", json.dumps(index).encode(), _read_all, _json
        ),
        "unet's config.json": pipeline_file("unet", "config.json"),
        "vae's config.json": pipeline_file("vae", "config.json"),
        "text encoder's config.json": pipeline_file("text_encoder", "config.json"),
        "vocab.json": pipeline_file("tokenizer", "vocab.json"),
        "merges.txt": pipeline_file("tokenizer", "merges.txt"),
        "tokenizer_config.json": pipeline_file("tokenizer", "tokenizer_config.json"),
        "special_tokens_map.json": pipeline_file("tokenizer", "special_tokens_map.json"),
        "prompts": Format("prompts/p.json", prompts, lambda path: prompts_of("red_circle", path, path), _json),
        "labels": Format(f"concept/{LABELS}", labels, lambda path: read_labels(path.parent), _json),
        "clustering_info.json": Format(
            f"concept/{INFO}", about, lambda path: memorised_name(path.parent, "red_circle"), _json
        ),
        "our JSON": Format("ours/metrics.json", json.dumps(ours).encode(), lambda path: files.read_shaped(path, shape), _json),
    }  # fmt: skip


class Outcome(NamedTuple):
    """What a reader made of many mutations of a file."""

    kinds: Counter  # "read", "refused" or the name of an error that is no `UserError`
    faults: list[str]
    slowest: float  # seconds
    bytes: int  # most memory above what the process had after it read the honest file


def try_out(one: Format, folder: Path, count: int, seed: int = 0) -> Outcome:
    """Reads `count` mutations of a file; a fault is any error but a `UserError` of one line, or one that takes too long."""
    path = folder / one.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(one.content)
    if "index" not in one.name:  # whose shards are not there
        one.read(path)
    before, kinds, faults, slowest = _peak(reset=True), Counter(), [], 0.0
    for number in range(count):
        chance = random.Random(f"{one.name} {seed} {number}")
        damage = one.inner if one.inner and number % 2 else mutated
        path.write_bytes(damage(one.content, chance))
        began, kind = time.monotonic(), "read"
        try:
            one.read(path)
        except UserError as error:
            kind = "refused"
            if "\n" in str(error) or len(str(error)) > 1500:
                faults.append(f"{number}: a message of {len(str(error))} characters: {str(error)[:200]}")
        except Exception as error:
            kind = type(error).__name__
            faults.append(f"{number}: {kind}: {str(error)[:200]}")
        kinds[kind] += 1
        took = time.monotonic() - began
        slowest = max(slowest, took)
        if took > LIMIT_SECONDS:
            faults.append(f"{number}: {took:.0f} s")
        for cached in (folder / "cache").glob("*/*"):
            cached.unlink()
    path.write_bytes(one.content)  # other formats may read it too
    return Outcome(kinds, faults, slowest, max(0, _peak() - before))


def _peak(reset: bool = False) -> int:
    """Returns the most memory that this process has had since the last reset, in bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def main(count: int, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        every = formats(Path(folder))
        for name in names or every:
            outcome = try_out(every[name], Path(folder), count)
            print(f"{name}: {dict(outcome.kinds)}, slowest {outcome.slowest:.2f} s, {outcome.bytes >> 20} MiB", flush=True)
            for fault in outcome.faults[:8]:
                print("   ", fault.encode(errors="backslashreplace").decode(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
