"""The text encoders of a pipeline and their tokenizers, read; and prompts as what the network gets of them.

    Stable Diffusion 1.x, 2.x   text_encoder/  tokenizer/                                     states after the final norm
    Stable Diffusion XL         the same, and text_encoder_2/  tokenizer_2/ with projection   states before the last layer
    Stable Diffusion 3          as XL, and the first has a projection too                     the same
                                T5, optional: text_encoder_3/  tokenizer_3/                   states after the final norm

The networks of XL and 3 get the states of both encoders side by side, and the pooled states of those with a projection. That of
3 also gets T5's states, or, as in diffusers, zeros if a folder has no T5: `padded`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check, shown
from retrack_jax.files import json_digest
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.t5_text import T5Encoder, states_by_layers
from retrack_jax.models.tokenizer import T5_LENGTH, ClipTokenizer, PromptTokenizer, load_t5_tokenizer, load_tokenizer
from retrack_jax.models.unet2d_condition import Condition
from retrack_jax.notation import Array, PyTree
from retrack_jax.weights.folder import read_config
from retrack_jax.weights.kinds import T5, tokenizer_of
from retrack_jax.weights.names import RenameTable

# Names of transformers' `CLIPTextModel` began with `text_model.` until version 5; old versions saved a buffer of positions.
TEXT_TABLE = RenameTable(canonical=lambda name: name.removeprefix("text_model."), ignored=(r"embeddings\.position_ids",))
# `shared` has the embeddings, and some files name them twice.
T5_TABLE = RenameTable(lists=("block", "layer"), canonical=str, ignored=(r"encoder\.embed_tokens\.weight",))
TextModule = ClipTextEncoder | T5Encoder
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """One text encoder with its tokenizer.

    Attributes:
      module, params: the network; parameters of T5 are as they are stored, float16 as a rule, because in float32 they take 19 GB.
      digest: `() -> SHA-256` over its config, weights and precision, which keys caches of its states.
    """

    module: TextModule
    params: PyTree
    tokenizer: PromptTokenizer
    digest: Callable[[], str]


def read_modules(
    folder: Path, parts: Sequence[str], dtype, all_project: bool = False
) -> list[tuple[TextModule, PromptTokenizer]]:
    """Returns the modules and the tokenizers of the text encoders `parts` in `folder`, without weights.

    Of CLIP's the second has a projection, and with `all_project` the first too. Raises `UserError` if a tokenizer does not fit
    its encoder, or one the other.
    """
    read: list = [_clip(folder, part, dtype, all_project or part != parts[0]) for part in parts if part != T5]
    lengths = [tokenizer.length for _, tokenizer in read]
    check(len(set(lengths)) == 1, f"{folder}: the tokenizers cut prompts at {lengths} tokens; they must agree")
    if T5 in parts:
        module = T5Encoder.from_config(read_config(folder / T5), dtype=dtype)
        tokenizer = load_t5_tokenizer(folder / tokenizer_of(T5))
        size = tokenizer.backend.get_vocab_size()
        check(size <= module.sizes.vocab_size, f"{folder}: tokenizer_3 has {size} tokens, {T5} {module.sizes.vocab_size}")
        read.append((module, tokenizer))
    return read


def _clip(folder: Path, part: str, dtype, projects: bool) -> tuple[ClipTextEncoder, ClipTokenizer]:
    config, own = read_config(folder / part), {}
    if projects:
        check("projection_dim" in config, f"{folder / part}: the config has no projection_dim; give the folder of one model")
        own["projection_dim"] = config["projection_dim"]
    module = ClipTextEncoder.from_config(config, dtype=dtype, **own)
    tokenizer = load_tokenizer(folder / tokenizer_of(part), module.max_position_embeddings)
    size = tokenizer.backend.get_vocab_size()
    check(size <= module.vocab_size, f"{folder}: the tokenizer has {size} tokens, the text encoder {module.vocab_size}")
    return module, tokenizer


def token_ids(encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> np.ndarray:
    """Returns int32 `[P, N]`: each prompt's ids by each tokenizer, N being the sum of their lengths."""
    return np.concatenate([encoder.tokenizer(prompts) for encoder in encoders], axis=1)


def warn_of_cuts(encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> None:
    """Warns of prompts of which CLIP or T5 reads a part."""
    for name, one in zip(("CLIP", "T5"), (encoders[0], *encoders[2:]), strict=False):
        tokenizer = one.tokenizer
        if long := [prompt for prompt in prompts if tokenizer.count(prompt) > tokenizer.length]:
            which = shown([f"{prompt:.60}" for prompt in long])
            _log.warning("%s reads the first %d tokens of %d longer prompts: %s", name, tokenizer.length, len(long), which)


def encode_ids(encoders: Sequence[TextEncoder], ids: np.ndarray) -> Condition:
    """Returns what the network gets of the text of `token_ids`: float32 `[P, N, D]`, the states of N tokens.

    Of two encoders it is a dict: `encoder_hidden_states` `[P, N, D + D']`, the states of both, and `text_embeds` `[P, E]`, the
    pooled states of those that have a projection; with T5 also its states, `t5_states`. Stable Diffusion 3's are still to be
    `padded`.
    """
    parts = np.cumsum([one.tokenizer.length for one in encoders])[:-1]
    *clips, t5 = encoders if len(encoders) == 3 else (*encoders, None)
    modules, params = (tuple(getattr(one, name) for one in clips) for name in ("module", "params"))
    each = jnp.split(jnp.asarray(ids), parts, axis=1)
    condition = _encode(modules, params, each[: len(clips)])
    if t5 is None:
        return condition
    return {**condition, "t5_states": states_by_layers(t5.module, t5.params, each[2]).astype(jnp.float32)}


@partial(jax.jit, static_argnums=0)
def _encode(modules: tuple[ClipTextEncoder, ...], params: tuple[PyTree, ...], ids: Sequence[Array]) -> Condition:
    if len(modules) == 1:
        return modules[0].apply({"params": params[0]}, ids[0]).astype(jnp.float32)
    parts = zip(modules, params, ids, strict=True)
    both = [module.apply({"params": own}, part, method="penultimate_and_pooled") for module, own, part in parts]
    states = jnp.concatenate([states.astype(jnp.float32) for states, _ in both], axis=-1)
    pooled = [pooled for module, (_, pooled) in zip(modules, both, strict=True) if module.projection_dim is not None]
    return {"encoder_hidden_states": states, "text_embeds": jnp.concatenate(pooled, axis=-1).astype(jnp.float32)}


def padded(condition: Condition, width: int | None) -> Condition:
    """Returns what `encode_ids` gives as Stable Diffusion 3's network takes it: states with zeros up to `width` features, then
    those of T5's 256 tokens, which are zeros without T5. If `width` is None, as with other networks, `condition` is unchanged.
    """
    if width is None:
        return condition
    states = np.asarray(condition["encoder_hidden_states"])
    states = np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[2])))
    t5_states = condition.get("t5_states", np.zeros((len(states), T5_LENGTH, width), np.float32))
    whole = np.concatenate([states, t5_states], axis=1)
    return {"encoder_hidden_states": whole, "text_embeds": condition["text_embeds"]}


def text_digest(encoders: Sequence[TextEncoder]) -> str:
    """Returns a SHA-256 over the encoders' configs, weights, precision and tokenizers."""
    return json_digest([[encoder.digest(), encoder.tokenizer.backend.to_str()] for encoder in encoders])
