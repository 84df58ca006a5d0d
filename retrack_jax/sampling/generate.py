"""The generation of many images: sharded over devices and processes, and resumable at any image.

The noise of image i depends only on `fold_in(rng, i)`. So it is the same image at any batch size and on any number of devices and
processes, up to the rounding of sums, whose order the compiler chooses by the shape of the batch.

With an `out_dir`, each process writes one part file per batch, `part-FIRST-COUNT.npz`, whole or not at all. It holds images,
their indices, and a fingerprint of what they depend on. A later call generates only the images that no part with the same
fingerprint holds; batch size and number of processes may differ between calls, and a call for more images keeps those that are
there.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged, UserError, check_choice, check_int
from retrack_jax.notation import Array, PyTree, Rng
from retrack_jax.sampling.loop import Sampler, initial_noise, sample

SampleFn = Callable[[PyTree, Rng], Array]
OUTPUTS = ("float32", "uint8")


def make_sample_fn(eps_fn: Callable[..., Array], sampler: Sampler, image_shape: tuple[int, ...]) -> SampleFn:
    """Returns `sample_fn(params, rngs [B]) -> x_0 [B, *image_shape]` for an unconditional model.

    Args:
      eps_fn: `eps_fn(params, x_t, t) -> eps`, as from `make_eps_fn`.
      sampler: from `make_sampler`.
      image_shape: [H, W, C] of the space that the network denoises.
    """

    def sample_fn(params: PyTree, rngs: Rng) -> Array:
        return sample(lambda x, t: eps_fn(params, x, t), initial_noise(rngs, image_shape), rngs, sampler)

    return sample_fn


def pmap_sample_fn(
    sample_fn: SampleFn, *, output: str = "float32", of_images: Callable[[PyTree, Array], PyTree] | None = None
) -> Callable[[PyTree, Rng, Array], tuple[Array, Array]]:
    """Returns the compiled `p_sample` that `generate` takes; make it once for all parameters that share a network and a sampler.

    `p_sample(params, rng, index int32 [devices, b]) -> (images [devices, b, ...], finite bool [devices, b])`. Images are
    clip(x_0/2 + 1/2, 0, 1) in float32, or floor(255 of it) in uint8.

    Args:
      sample_fn: `sample_fn(params, rngs [B]) -> [B, H, W, C]` in [-1, 1]. Text embeddings, a decoder and the like go into
        `params`.
      output: `float32` or `uint8`.
      of_images: `(params, index [B]) -> params`, what `sample_fn` is given for these images; None: `params` for all.
    """
    check_choice("output", output, OUTPUTS)

    def one_device(params: PyTree, rng: Rng, index_B: Array) -> tuple[Array, Array]:
        params = params if of_images is None else of_images(params, index_B)
        x_0 = sample_fn(params, parallel.example_rngs(rng, index_B))
        finite = jnp.isfinite(x_0).all(axis=tuple(range(1, x_0.ndim)))
        unit = jnp.clip(x_0.astype(jnp.float32) / 2 + 0.5, 0, 1)
        return (jnp.floor(unit * 255).astype(jnp.uint8) if output == "uint8" else unit), finite

    return parallel.pmap(one_device, in_axes=(None, None, 0), out_axes=(0, 0))


def generate(
    p_sample: Callable[[PyTree, Rng, Array], tuple[Array, Array]],
    params: PyTree,
    *,
    rng: Rng,
    num_images: int,
    batch_size: int,
    out_dir=None,
    fingerprint: str = "",
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Returns images `first`, ..., `first + num_images - 1` on every process: [num_images, H, W, C] in the dtype of `p_sample`.

    Args:
      p_sample: from `pmap_sample_fn`.
      params: its first argument.
      rng: the key of the run; image i is drawn from `fold_in(rng, i)`.
      num_images, first: which images.
      batch_size: images in one call over all devices of all processes; a multiple of their number. The last batch is padded.
      out_dir: a folder for part files that all processes share; several processes need it. Without it nothing is stored.
      fingerprint: a digest of all that the images depend on besides their index: parameters, rng, sampler, output. Images of
        parts with another fingerprint are generated again.
      progress: called as `progress(images done, num_images)` after each batch.

    Raises:
      UserError: a batch size that does not divide; a folder that is not shared or cannot be written.
      Diverged: samples that are not finite.
    """
    check_int("the number of images", num_images, 1)
    check_int("the sampling batch size", batch_size, 1)
    check_int("the first image", first, 0, 2**31 - 1 - num_images)
    parallel.check_divisible("the sampling batch size", batch_size)
    if out_dir is None and jax.process_count() > 1:
        raise UserError("generating with several processes needs a folder that they share; pass out_dir")
    images = None
    missing = np.ones(num_images, bool)
    if out_dir is not None:
        if jax.process_count() > 1:  # now, not with the first part: a shared disk may repeat for a while that there is no folder
            parallel.on_main(lambda: files.make_folder(out_dir))
        parallel.barrier("generate: before reading parts")  # no process adds a part while another lists them
        images, missing = parallel.together(lambda: _read_parts(out_dir, fingerprint, first, num_images))
        if not parallel.all_processes_agree(missing.tobytes()):
            raise UserError(f"the processes see different files in {out_dir}; they need a workdir that they share")
        parallel.barrier("generate: parts read")
    todo = np.flatnonzero(missing) + first
    done = num_images - len(todo)
    if progress:
        progress(done, num_images)

    def fetch(index: np.ndarray, result: tuple[Array, Array]) -> np.ndarray:
        made, finite = (rows[: len(index)] for rows in parallel.unshard_batch(result))
        if not finite.all():
            bad = f"{int((~finite).sum())} of {len(index)} samples are not finite, image {index[~finite][0]} the first"
            raise Diverged(f"{bad}; the model has diverged")
        if out_dir is not None and len(index):
            name = f"part-{index[0]:09d}-{len(index)}.npz"
            files.write_npz(epath.Path(out_dir) / name, images=made, index=index, fingerprint=np.array(fingerprint))
        return made

    for index, result in _batches(p_sample, params, rng, todo, batch_size):
        made = parallel.together(lambda index=index, result=result: fetch(index, result))
        if images is None:
            images = np.empty((num_images, *made.shape[1:]), made.dtype)
        images[index - first] = made
        done = min(done + batch_size, num_images)
        if progress:
            progress(done, num_images)
    if jax.process_count() > 1:
        parallel.barrier("generate: parts written")
        images, missing = parallel.together(lambda: _read_parts(out_dir, fingerprint, first, num_images))
        if missing.any():
            count = f"{int(missing.sum())} of {num_images} images"
            raise UserError(f"{count} are missing in {out_dir}; the processes need a workdir that they share")
    return images


def _batches(p_sample, params, rng: Rng, todo: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, tuple[Array, Array]]]:
    """Yields (index [n], result) of this process's rows of each batch; the next batch computes while one is copied."""
    waiting = None
    rows = parallel.local_rows(batch_size)
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        padded = np.concatenate([batch, np.full(batch_size - len(batch), batch[-1])]).astype(np.int32)
        index = padded[rows][: max(0, len(batch) - rows.start)]
        result = p_sample(params, rng, parallel.shard_batch(padded[rows]))
        if waiting is not None:
            yield waiting
        waiting = index, result
    if waiting is not None:
        yield waiting


def _read_parts(out_dir, fingerprint: str, first: int, num_images: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Returns the images that parts hold (None if there are none) and which are missing, bool [num_images]."""
    images, missing = None, np.ones(num_images, bool)
    for path in sorted(epath.Path(out_dir).glob("part-*.npz")):
        part = files.read_npz(path)
        if str(part["fingerprint"]) != fingerprint:
            continue
        index, made = part["index"], part["images"]
        inside = (index >= first) & (index < first + num_images)
        if images is None:
            images = np.empty((num_images, *made.shape[1:]), made.dtype)
        images[index[inside] - first] = made[inside]
        missing[index[inside] - first] = False
    return images, missing
