"""Token ids: those that transformers gives, recorded; bad files."""

import json

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.models.tokenizer import load_tokenizer
from tests.prompts200 import HARD, PROMPTS


def test_ids_of_200_prompts_are_those_of_transformers(pipeline, recorded_sd):
    assert len(PROMPTS) == 200
    ids = pipeline.tokenizer(PROMPTS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, recorded_sd["ids"])


def test_empty_prompt_is_start_end_and_padding(pipeline):
    tokenizer = pipeline.tokenizer
    (ids,) = tokenizer([""])
    assert list(ids) == [tokenizer.bos_id] + [tokenizer.eos_id] * 76


def test_long_prompt_is_cut_but_still_ends(pipeline):
    long = next(prompt for prompt in HARD if len(prompt) > 500)
    (ids,) = pipeline.tokenizer([long])
    assert ids.shape == (77,) and ids[-1] == pipeline.tokenizer.eos_id
    assert pipeline.tokenizer.count(long) > 77
    np.testing.assert_array_equal(pipeline.tokenizer([long])[0], ids)  # counting leaves the limit in place


def test_sd2_pads_with_zero_and_reads_exclamation_marks_as_padding(pipeline_folder):
    path = pipeline_folder / "tokenizer" / "special_tokens_map.json"
    path.write_text(path.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    tokenizer = load_tokenizer(pipeline_folder / "tokenizer")
    (ids,) = tokenizer(["wow!"])
    assert tokenizer.pad_id == 0 and ids[-1] == 0
    end = list(ids).index(tokenizer.eos_id)
    assert ids[end - 1] == 0 and (ids[end + 1 :] == 0).all()


@pytest.mark.parametrize("prompts", ["one string", ["fine", None], [3]])
def test_prompts_that_are_no_list_of_strings_are_refused(pipeline, prompts):
    with pytest.raises(UserError, match="prompt"):
        pipeline.tokenizer(prompts)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "no vocab.json with merges.txt"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nzz qq\n"), "do not belong together"),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\none\n"), "text file invalid at line 1"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}'), "only CLIP"),
    ],
)
def test_damaged_files_are_refused(pipeline_folder, spoil, message):
    spoil(pipeline_folder / "tokenizer")
    with pytest.raises(UserError, match=message):
        load_tokenizer(pipeline_folder / "tokenizer")


def test_a_special_token_outside_the_vocabulary_is_refused(pipeline_folder):
    path = pipeline_folder / "tokenizer" / "special_tokens_map.json"
    special = json.loads(path.read_text())
    path.write_text(json.dumps({**special, "pad_token": "<pad>"}))
    with pytest.raises(UserError, match="pad_token '<pad>' is not in the vocabulary"):
        load_tokenizer(pipeline_folder / "tokenizer")
