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
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": [3]}'), "decoder is no object"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": "a"}}'), "are x, not all"),
        (lambda folder: (folder / "added_tokens.json").write_text('{"<a>": 420, "<b>": null}'), "are 420, None, not all whole"),
        (lambda folder: (folder / "added_tokens.json").write_text("[]"), "holds no JSON object"),
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


@pytest.mark.parametrize("stored", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_keep_their_ids(pipeline_folder, stored):
    """Those of textual inversion: read in pieces, a caption would be another condition than the model knows."""
    folder = pipeline_folder / "tokenizer"
    plain = load_tokenizer(folder)
    number = plain.backend.get_vocab_size()
    path = folder / stored
    config = json.loads(path.read_text()) if path.exists() else {}
    token = {"content": "<cat-toy>", "normalized": True, "special": False}
    config |= {"<cat-toy>": number} if stored == "added_tokens.json" else {"added_tokens_decoder": {str(number): token}}
    path.write_text(json.dumps(config))
    (ids,) = load_tokenizer(folder)(["a <cat-toy> here"])
    (pieces,) = plain(["a <cat-toy> here"])
    assert number in ids and number not in pieces
    np.testing.assert_array_equal(load_tokenizer(folder)(PROMPTS), plain(PROMPTS))
    path.write_text(path.read_text().replace(str(number), str(number + 5)))
    with pytest.raises(UserError, match=f"'<cat-toy>' has id {number + 5}, by the vocabulary {number}"):
        load_tokenizer(folder)


def test_a_longer_encoder_reads_longer_prompts(pipeline_folder):
    path = pipeline_folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 248}))
    assert load_tokenizer(pipeline_folder / "tokenizer")([""]).shape == (1, 77)
    assert load_tokenizer(pipeline_folder / "tokenizer", positions=248)([""]).shape == (1, 248)
