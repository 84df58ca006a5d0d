"""Prompts to token ids of CLIP and T5, with the `tokenizers` library and the files of a Stable Diffusion pipeline.

T5's folder holds `tokenizer.json`, which says all. CLIP's holds `vocab.json` and `merges.txt` (every Stable Diffusion 1.x and 2.x
checkpoint) or only `tokenizer.json` (as transformers 5 writes it), and in addition `tokenizer_config.json` and
`special_tokens_map.json`. To give the same ids as transformers, two of its rules are followed here:

1. Every special token, the padding token too, is cut out of the text before anything else. Stable Diffusion 2 pads with `!`, so
   there a `!` in a prompt becomes the padding id 0, and not the word `!</w>` (256).
2. A special token that is plain text in the file is matched as it is written. One that is an object is matched by its
   `normalized` flag: after lower-casing if that is true. If two roles have the same text, the last of bos, eos, unk, pad decides,
   and the special tokens map overrides the config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from retrack_jax.checks import UserError, check, check_number
from retrack_jax.files import read_object

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULTS = dict.fromkeys(_ROLES, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
T5_LENGTH = 256  # ids of a prompt in diffusers' pipeline


@dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """A callable that turns prompts into padded token ids.

    Attributes:
      length: number of ids per prompt, 77 for nearly every CLIP and 256 for T5.
      backend: of the `tokenizers` library; it cuts and pads.
    """

    length: int
    backend: Any

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 ids `[N, length]`: start, pieces of words, end, padding. Raises `UserError` unless all are strings."""
        check(not isinstance(prompts, str), "prompts is one string; pass a list of prompts")
        for index, prompt in enumerate(prompts):
            check(isinstance(prompt, str), f"prompt {index} is {prompt!r}; a prompt must be a string")
        encoded = self.backend.encode_batch(list(prompts))
        return np.array([one.ids for one in encoded], dtype=np.int32).reshape(len(encoded), self.length)

    def count(self, prompt: str) -> int:
        """Returns the number of ids that `prompt` would have without a limit, including start and end."""
        self.backend.no_truncation()
        try:
            return sum(self.backend.encode(prompt).attention_mask)
        finally:
            self.backend.enable_truncation(self.length)


@dataclass(frozen=True, eq=False)
class ClipTokenizer(PromptTokenizer):
    """CLIP's tokenizer, with the ids that start, end and fill up each prompt."""

    bos_id: int
    eos_id: int
    pad_id: int


def load_t5_tokenizer(path) -> PromptTokenizer:
    """Reads the `tokenizer_3` folder of a pipeline. Raises `UserError` if its tokenizer.json is missing or is not T5's."""
    file = epath.Path(path) / "tokenizer.json"
    check(file.exists(), f"no {file}; save the tokenizer as transformers' T5TokenizerFast does, or download it again")
    backend = _from_json(file)
    special = {name: backend.token_to_id(name) for name in ("<pad>", "</s>")}
    check(None not in special.values(), f"{file} has no {' or no '.join(special)} token; T5's tokenizer has both")
    backend.enable_truncation(T5_LENGTH)
    backend.enable_padding(length=T5_LENGTH, pad_id=special["<pad>"], pad_token="<pad>")
    return PromptTokenizer(T5_LENGTH, backend)


def load_tokenizer(path, positions: int = 77) -> ClipTokenizer:
    """Reads the folder of a CLIP tokenizer, for an encoder that reads at most `positions` ids.

    Raises `UserError` if files are missing or are not those of a CLIP tokenizer.
    """
    from tokenizers import AddedToken, processors

    folder = epath.Path(path)
    config = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            config |= read_object(folder / file)
    name = config.get("tokenizer_class", "CLIPTokenizer")
    check(name in ("CLIPTokenizer", "CLIPTokenizerFast"), f"{folder} holds a {name}; only CLIP tokenizers are supported")
    special = {role: _token(folder, role, config.get(role) or _DEFAULTS[role]) for role in _ROLES}
    text = {role: token["content"] for role, token in special.items()}

    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        backend = _bpe(folder, text["unk_token"])
    elif (folder / "tokenizer.json").exists():
        backend = _from_json(folder / "tokenizer.json")
    else:
        raise UserError(
            f"no vocab.json with merges.txt, and no tokenizer.json, in {folder}; download the pipeline's tokenizer folder"
        )

    ids = {role: backend.token_to_id(text[role]) for role in _ROLES}
    for role, token_id in ids.items():
        check(
            token_id is not None,
            f"{folder}: the {role} {text[role]!r} is not in the vocabulary; use the files of one checkpoint",
        )
    if backend.get_added_tokens_decoder() == {}:  # a tokenizer.json brings its own, with their flags
        by_text = {token["content"]: token for token in special.values()}  # the last role decides
        backend.add_special_tokens([AddedToken(**token, special=True) for token in by_text.values()])
        _add_tokens(folder, backend, config, {*by_text})
    longest = config.get("model_max_length", 77)
    check_number(f"{folder}: model_max_length", longest, 3)  # start, end and one token; transformers writes 1e30 for no limit
    length = int(min(longest, positions))
    ends = ((text["eos_token"], ids["eos_token"]), (text["bos_token"], ids["bos_token"]))
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=ids["pad_token"], pad_token=text["pad_token"])
    return ClipTokenizer(length, backend, ids["bos_token"], ids["eos_token"], ids["pad_token"])


def _token(folder, role: str, value) -> dict:
    """One special token as a dict; plain text is matched as written."""
    if isinstance(value, str):
        return {"content": value, "normalized": False}
    whole = isinstance(value, dict) and isinstance(value.get("content"), str)
    flags = {key: value[key] for key in ("normalized", "lstrip", "rstrip", "single_word") if key in value} if whole else {}
    check(
        whole and all(isinstance(flag, bool) for flag in flags.values()),
        f"{folder}: the {role} is {value!r}, neither a text nor an object with its content and flags; download the folder again",
    )
    return {"content": value["content"], **flags}


def _add_tokens(folder, backend, config: dict, special: set[str]) -> None:
    """Adds the tokens beyond the vocabulary, such as those of textual inversion, by the ids that the folder gives them."""
    from tokenizers import AddedToken

    added, listed = {}, config.get("added_tokens_decoder")
    if listed is not None:
        check(isinstance(listed, dict), f"{folder}: added_tokens_decoder is no object; download the folder again")
        added = {number: _token(folder, f"added token {number}", token) for number, token in listed.items()}
    elif (folder / "added_tokens.json").exists():
        listed = read_object(folder / "added_tokens.json")
        added = {f"{number}": {"content": content, "normalized": True} for content, number in listed.items()}
    whole = all(number.isdecimal() for number in added)
    check(
        whole, f"{folder}: the ids of added tokens are {', '.join(added):.100}, not all whole numbers; download the folder again"
    )
    for number, token in sorted(((int(number), token) for number, token in added.items()), key=lambda pair: pair[0]):
        content = token["content"]
        if content not in special:
            backend.add_tokens([AddedToken(**token)])
        given = backend.token_to_id(content)
        check(
            given == number,
            f"{folder}: the added token {content!r} has id {number}, by the vocabulary {given}; use the files of one checkpoint",
        )


def _bpe(folder, unknown: str):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    read_object(folder / "vocab.json")  # for its errors, which are plainer
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "unk_token": unknown}
    try:
        model = models.BPE.from_file(*files, **options)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"{folder}: vocab.json and merges.txt do not belong together ({error}); take both from one checkpoint"
        ) from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _from_json(path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(epath.Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} is not a tokenizer file ({error}); download it again") from error
