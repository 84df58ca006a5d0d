"""The text encoders of a pipeline and their tokenizers, read; and prompts as what the network gets of them.

    Stable Diffusion 1.x, 2.x   text_encoder/  tokenizer/                                     states after the final norm
    Stable Diffusion XL         the same, and text_encoder_2/  tokenizer_2/ with projection   states before the last layer
    Stable Diffusion 3          as XL, and the first has a projection too                     the same

The networks of XL and 3 get the states of both encoders side by side, and the pooled states of those with a projection. That of
3 also gets T5's states. T5 is not read here, and zeros stand for its states, as in diffusers: `padded`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check
from retrack_jax.files import json_digest
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.tokenizer import ClipTokenizer, load_tokenizer
from retrack_jax.models.unet2d_condition import Condition
from retrack_jax.notation import Array, PyTree
from retrack_jax.weights.folder import read_config
from retrack_jax.weights.names import RenameTable

T5_TOKENS = 256  # of a prompt in diffusers' pipeline

# Names of transformers' `CLIPTextModel` began with `text_model.` until version 5; old versions saved a buffer of positions.
TEXT_TABLE = RenameTable(canonical=lambda name: name.removeprefix("text_model."), ignored=(r"embeddings\.position_ids",))
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """One text encoder with its tokenizer.

    Attributes:
      module, params: the network.
      tokenizer: turns prompts into its token ids.
      digest: `() -> SHA-256` over its config, weights and precision, which keys caches of its states.
    """

    module: ClipTextEncoder
    params: PyTree
    tokenizer: ClipTokenizer
    digest: Callable[[], str]


def read_modules(
    folder: Path, parts: Sequence[str], dtype, all_project: bool = False
) -> list[tuple[ClipTextEncoder, ClipTokenizer]]:
    """Returns the modules and the tokenizers of the text encoders `parts` in `folder`, without weights.

    The second of two has a projection, and with `all_project` the first too. Raises `UserError` if a tokenizer does not fit its
    encoder, or one the other.
    """
    read = []
    for part in parts:
        config, own = read_config(folder / part), {}
        if all_project or part != parts[0]:
            check("projection_dim" in config, f"{folder / part}: the config has no projection_dim; give the folder of one model")
            own["projection_dim"] = config["projection_dim"]
        module = ClipTextEncoder.from_config(config, dtype=dtype, **own)
        tokenizer = load_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
        known = max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < module.vocab_size
        check(
            known and tokenizer.length <= module.max_position_embeddings,
            f"{folder}: the tokenizer's ids or length do not fit the text encoder's {module.vocab_size} tokens",
        )
        read.append((module, tokenizer))
    lengths = [tokenizer.length for _, tokenizer in read]
    check(len(set(lengths)) == 1, f"{folder}: the tokenizers cut prompts at {lengths} tokens; they must agree")
    return read


def token_ids(encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> np.ndarray:
    """Returns int32 `[P, N]` for one encoder of N tokens, `[P, 2 N]` for two: each prompt's ids by each tokenizer."""
    return np.concatenate([encoder.tokenizer(prompts) for encoder in encoders], axis=1)


def warn_of_cuts(encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> None:
    """Warns of prompts that are cut to the encoders' length."""
    tokenizer = encoders[0].tokenizer
    for prompt in prompts:
        if (count := tokenizer.count(prompt)) > tokenizer.length:
            _log.warning("a prompt of %d tokens is cut to %d: %.60s", count, tokenizer.length, prompt)


def encode_ids(encoders: Sequence[TextEncoder], ids: np.ndarray) -> Condition:
    """Returns what the network gets of the text of `token_ids`: float32 `[P, N, D]`, the states of N tokens.

    Of two encoders it is a dict: `encoder_hidden_states` `[P, N, D + D']`, the states of both, and `text_embeds` `[P, E]`, the
    pooled states of those that have a projection. Stable Diffusion 3's are still to be `padded`.
    """
    modules, params = (tuple(getattr(one, name) for one in encoders) for name in ("module", "params"))
    return _encode(modules, params, jnp.asarray(ids))


@partial(jax.jit, static_argnums=0)
def _encode(modules: tuple[ClipTextEncoder, ...], params: tuple[PyTree, ...], ids: Array) -> Condition:
    if len(modules) == 1:
        return modules[0].apply({"params": params[0]}, ids).astype(jnp.float32)
    parts = zip(modules, params, jnp.split(ids, len(modules), axis=1), strict=True)
    both = [module.apply({"params": own}, part, method="penultimate_and_pooled") for module, own, part in parts]
    states = jnp.concatenate([states.astype(jnp.float32) for states, _ in both], axis=-1)
    pooled = [pooled for module, (_, pooled) in zip(modules, both, strict=True) if module.projection_dim is not None]
    return {"encoder_hidden_states": states, "text_embeds": jnp.concatenate(pooled, axis=-1).astype(jnp.float32)}


def padded(condition: Condition, width: int | None) -> Condition:
    """Returns what `encode_ids` gives as Stable Diffusion 3's network takes it: states with zeros up to `width` features, then
    256 tokens of zeros in place of T5's. If `width` is None, as with other networks, `condition` is returned unchanged.
    """
    if width is None:
        return condition
    states = np.asarray(condition["encoder_hidden_states"])
    zeros = ((0, 0), (0, T5_TOKENS), (0, width - states.shape[2]))
    return {**condition, "encoder_hidden_states": np.pad(states, zeros)}


def text_digest(encoders: Sequence[TextEncoder]) -> str:
    """Returns a SHA-256 over the encoders' configs, weights and precision."""
    digests = [encoder.digest() for encoder in encoders]
    return digests[0] if len(digests) == 1 else json_digest(digests)
