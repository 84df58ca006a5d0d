"""The cache of posteriors and the draws from it."""

import errno
import os

import jax
import numpy as np
import pytest

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.data.dataset import image_set, to_x_0
from retrack_jax.problem.latents import encode_set

IMAGES = image_set("toy", np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8), [f"{i}.png" for i in range(5)])


class Encoder:
    """Counts its calls; mean is a shrunken picture, std a constant."""

    def __init__(self, std=0.5):
        self.calls, self.std = 0, std

    def __call__(self, x):
        self.calls += 1
        assert len(x) == 2 and x.dtype == np.float32 and abs(x).max() <= 1
        return x[:, ::2, ::2], np.full_like(x[:, ::2, ::2], self.std)


def encode(encoder, tmp_path, digest="vae", images=IMAGES):
    return encode_set(encoder, images, vae_digest=digest, cache_dir=tmp_path, batch_size=2)


def test_encodes_once_for_each_vae_and_set(tmp_path):
    encoder = Encoder()
    latents = encode(encoder, tmp_path)
    assert encoder.calls == 3 and len(latents.mean) == 5  # the last batch is padded
    np.testing.assert_array_equal(latents.mean, (IMAGES.images / np.float32(127.5) - np.float32(1))[:, ::2, ::2])
    again = encode(encoder, tmp_path)
    assert encoder.calls == 3 and np.array_equal(again.mean, latents.mean)
    assert isinstance(again.mean, np.memmap)
    encode(encoder, tmp_path, digest="another")
    assert encoder.calls == 6
    encode(encoder, tmp_path, images=image_set("toy", IMAGES.images[::-1].copy(), IMAGES.ids))
    assert encoder.calls == 9


@pytest.mark.parametrize("content", [slice(-7), slice(0), slice(20)])
def test_a_file_that_is_not_whole_is_made_again(tmp_path, caplog, content):
    encoder = Encoder()
    latents = encode(encoder, tmp_path)
    mean = np.array(latents.mean)
    (path,) = (tmp_path / "latents").iterdir()
    path.write_bytes(path.read_bytes()[content])
    again = encode(encoder, tmp_path)
    assert encoder.calls == 6 and "making it again" in caplog.text
    np.testing.assert_array_equal(again.mean, mean)


def test_a_killed_encoding_leaves_no_file_under_the_name(tmp_path):
    class Killed(Encoder):
        def __call__(self, x):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(x)

    with pytest.raises(KeyboardInterrupt):
        encode(Killed(), tmp_path)
    assert not list(tmp_path.rglob("*.npy"))
    assert len(encode(Encoder(), tmp_path).mean) == 5


def test_draws_are_fresh_at_each_access_and_fixed_where_asked(tmp_path):
    latents = encode(Encoder(), tmp_path)
    rows = np.array([3, 1])
    steps = [parallel.example_rngs(jax.random.key(step), np.arange(2)) for step in (0, 0, 1)]
    first, same, other = (np.asarray(to_x_0(latents.posterior(rows), rngs)) for rngs in steps)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).min() > 0
    fixed = latents.draw(rows, jax.random.key(7))
    np.testing.assert_array_equal(latents.draw(rows[::-1], jax.random.key(7))[::-1], fixed)
    assert np.abs(fixed - latents.draw(rows, jax.random.key(8))).min() > 0


def test_draws_have_the_posteriors_moments(tmp_path):
    latents = encode(Encoder(std=0.25), tmp_path)
    draws = np.stack([latents.draw(np.array([2]), jax.random.key(seed))[0] for seed in range(300)])
    np.testing.assert_allclose(draws.mean(0), latents.mean[2], atol=5 * 0.25 / 300**0.5)
    np.testing.assert_allclose((draws - latents.mean[2]).std(), 0.25, rtol=0.05)


def test_a_posterior_that_is_not_finite_names_the_picture(tmp_path):
    def encoder(x):
        mean = x[:, ::2, ::2].copy()
        mean[1] = np.nan
        return mean, np.ones_like(mean)

    with pytest.raises(UserError, match="1.png to NaN"):
        encode(encoder, tmp_path)


def test_a_full_disk_under_the_cache_names_the_cache(tmp_path, monkeypatch):
    def replace(temporary, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="cannot write .*npy: No space left on device; .* set config.data.cache_dir"):
        encode(Encoder(), tmp_path)
    assert not list((tmp_path / "latents").iterdir())
