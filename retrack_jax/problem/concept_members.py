"""The concepts that a run was asked for: pictures, prompts and latents, and the rows that number the pictures of all of them.

Rows go on from one concept to the next in the order in which they were asked for, so that rows say by themselves which concept
they belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrack_jax import parallel
from retrack_jax.data.sources.concepts import Concept, load_concept
from retrack_jax.data.sources.prompts import PromptPair, prompts_of
from retrack_jax.log import progress
from retrack_jax.problem.latents import LatentSet, encode_set


@dataclass(frozen=True, eq=False)
class Member:
    """A concept that was asked for: its pictures, prompts and the number of its first row."""

    concept: Concept
    prompts: PromptPair
    first_row: int


class ConceptMembers:
    """Concepts by name, each read at first use and encoded when its latents are first needed.

    Args:
      root: the folder that holds one folder per concept.
      original_prompts, modified_prompts: JSON files of prompts, below `root` or absolute.
      resolution: pixels per side.
      cache_dir: where decoded pictures and latents are kept between runs.
      encode: the VAE, pictures `[B, H, W, 3]` in [-1, 1] to the posterior's mean and std.
      vae_digest: what latents depend on beside the pictures.
      batch_size: pictures encoded at once.
    """

    def __init__(
        self,
        root,
        *,
        original_prompts: str,
        modified_prompts: str,
        resolution: int,
        cache_dir,
        encode: Callable,
        vae_digest: str,
        batch_size: int,
    ):
        self._root, self._resolution, self._cache_dir = Path(root).expanduser(), resolution, cache_dir
        # An absolute path stays as it is under `/`.
        self._prompts = [self._root / Path(path).expanduser() for path in (original_prompts, modified_prompts)]
        self._encode, self._vae_digest, self._batch_size = encode, vae_digest, batch_size
        self._members: dict[str, Member] = {}
        self._latents: dict[str, LatentSet] = {}

    def __getitem__(self, name: str) -> Member:
        """Raises `UserError` for a concept that is not there, or lacks a file or a prompt."""
        if name not in self._members:
            concept = load_concept(self._root, name, resolution=self._resolution, cache_dir=self._cache_dir)
            first_row = sum(len(member.concept.images) for member in self._members.values())
            self._members[name] = Member(concept, prompts_of(name, *self._prompts), first_row)
        return self._members[name]

    def of(self, rows: np.ndarray) -> Member:
        """The concept that `rows` belong to; never of two."""
        for member in self._members.values():
            if member.first_row <= rows[0] < member.first_row + len(member.concept.images):
                return member
        raise ValueError(f"row {rows[0]} belongs to no concept")

    def latents(self, member: Member) -> LatentSet:
        """The posterior of each picture of a concept."""
        concept = member.concept
        if concept.name not in self._latents:
            main = parallel.is_main_process()
            with progress([], f"encode {concept.name}", total=len(concept.images), is_main=main, unit="img") as bar:
                self._latents[concept.name] = encode_set(
                    self._encode,
                    concept.images,
                    vae_digest=self._vae_digest,
                    cache_dir=self._cache_dir,
                    batch_size=self._batch_size,
                    progress=lambda done, total: bar.update(done - bar.n),
                )
        return self._latents[concept.name]
