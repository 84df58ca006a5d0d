"""Our tokenizer with CLIP's real vocabulary of 49,408 pieces against transformers: the committed tiny pipeline has a toy's.

OpenAI's list of merges is read from the package open_clip_torch, which ships it, and written as the `vocab.json` and `merges.txt`
that a Stable Diffusion checkpoint holds. The package itself is not imported.
"""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

from retrack_jax.models.tokenizer import load_tokenizer  # noqa: E402
from tests.prompts200 import PROMPTS  # noqa: E402
from tests.tiny_sd import PIPELINE  # noqa: E402

NUM_PIECES, NUM_MERGES = 49_408, 48_894


def printable_bytes() -> list[str]:
    """The signs that stand for the 256 bytes, in CLIP's order: bytes that print as they are, then those that needed another."""
    by_code = sorted(ByteLevel.alphabet(), key=ord)
    return [sign for sign in by_code if ord(sign) < 256] + [sign for sign in by_code if ord(sign) >= 256]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer folder as Stable Diffusion's, with the real vocabulary."""
    found = importlib.util.find_spec("open_clip")
    assert found is not None, "open_clip_torch is not installed; `make parity` installs it"
    listing = Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(listing.read_bytes()).decode().split("\n")
    merges = lines[1 : NUM_MERGES + 1]  # the first line is a comment, and CLIP uses no more
    signs = printable_bytes()
    pieces = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(merge.split()) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    shutil.copytree(PIPELINE / "tokenizer", folder)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def test_the_vocabulary_is_clips(folder):
    assert len(json.loads((folder / "vocab.json").read_text())) == NUM_PIECES
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (49_406, 49_407)
    # OpenAI's ids of this sentence, as CLIP's documentation and many tests give them.
    assert list(tokenizer(["a photo of a cat"])[0][:7]) == [49_406, 320, 1125, 539, 320, 2368, 49_407]


@pytest.mark.parametrize("kind", ["sd1", "sd2 pads with !"])
def test_ids_of_200_prompts(folder, tmp_path, kind):
    copy = tmp_path / "tokenizer"
    shutil.copytree(folder, copy)
    if kind.startswith("sd2"):
        special = copy / "special_tokens_map.json"
        special.write_text(special.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    theirs = transformers.CLIPTokenizer.from_pretrained(copy)
    expected = np.array(theirs(list(PROMPTS), max_length=77, padding="max_length", truncation=True).input_ids)
    np.testing.assert_array_equal(load_tokenizer(copy)(PROMPTS), expected)


def test_ids_of_words_drawn_from_the_whole_vocabulary(folder):
    """Words that the vocabulary holds, run together by twos every now and then so that they must be taken apart."""
    pieces = json.loads((folder / "vocab.json").read_text())
    words = [piece.removesuffix("</w>") for piece in pieces if piece.endswith("</w>") and piece.isascii()]
    numbers = np.random.default_rng(0)
    prompts = ["".join(word + " " * numbers.integers(0, 3) for word in numbers.choice(words, 12)) for _ in range(500)]
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = np.array(theirs(prompts, max_length=77, padding="max_length", truncation=True).input_ids)
    np.testing.assert_array_equal(load_tokenizer(folder)(prompts), expected)
    assert len(np.unique(expected)) > 4000
