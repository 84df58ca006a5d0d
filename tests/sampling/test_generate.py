"""Generation: an image depends on its index alone; parts resume at any image and are never taken for those of another run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import Diverged, UserError
from retrack_jax.diffusion import Schedule
from retrack_jax.sampling import DDPM, generate, make_sample_fn, pmap_sample_fn

SHAPE = (4, 4, 2)
PARAMS = {"w": jax.random.normal(jax.random.key(9), (3, 3, 2, 2)) * 0.1}


def conv_eps_fn(params, x, t):
    """A small network whose output is near the noise and differs over the image."""
    y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + jnp.tanh(y) + (0.1 * jnp.sin(t.astype(jnp.float32)))[:, None, None, None]


SAMPLE_FN = make_sample_fn(conv_eps_fn, DDPM.create(Schedule.create(), 10), SHAPE)


@pytest.fixture(scope="module")
def p_sample():
    return pmap_sample_fn(SAMPLE_FN)


def make(p_sample, num_images=10, batch_size=4, **kwargs):
    return generate(p_sample, PARAMS, rng=jax.random.key(5), num_images=num_images, batch_size=batch_size, **kwargs)


@pytest.fixture(scope="module")
def expected(p_sample):
    return make(p_sample, 26, 8)


def test_each_image_is_keyed_by_its_index(p_sample, expected):
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(26))
    alone = jax.jit(SAMPLE_FN)(PARAMS, rngs)
    assert expected.shape == (26, *SHAPE) and expected.dtype == np.float32
    np.testing.assert_allclose(expected, np.clip(alone / 2 + 0.5, 0, 1), atol=1e-5)
    assert len(np.unique(expected[:, 0, 0, 0])) == 26


@pytest.mark.parametrize("num_images,batch_size,first", [(26, 4, 0), (26, 28, 0), (13, 12, 13), (1, 8, 25)])
def test_same_images_at_any_batch_size_and_start(p_sample, expected, num_images, batch_size, first):
    images = make(p_sample, num_images, batch_size, first=first)
    np.testing.assert_allclose(images, expected[first : first + num_images], atol=1e-5)


def test_same_images_on_one_device(expected):
    """Runs this file as a program in a process with one device."""
    command = [sys.executable, "-m", "tests.sampling.test_generate"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, capture_output=True, check=True, timeout=300, env=environment)
    np.testing.assert_allclose(np.frombuffer(out.stdout, np.float32).reshape(expected.shape), expected, atol=1e-5)


def test_padding_does_not_compile_again(expected):
    traces = []

    def counted(params, rngs):
        traces.append(rngs.shape)
        return SAMPLE_FN(params, rngs)

    counting = pmap_sample_fn(counted)
    for num_images in (8, 10, 3):
        make(counting, num_images, 8)
    generate(counting, {"w": 2 * PARAMS["w"]}, rng=jax.random.key(6), num_images=5, batch_size=8)  # other parameters, another key
    assert traces == [(2,)]


def test_uint8_is_the_floor_of_255_x(expected):
    images = make(pmap_sample_fn(SAMPLE_FN, output="uint8"), 26, 8)
    assert images.dtype == np.uint8
    level = expected.astype(np.float64) * 255
    settled = np.abs(level - np.round(level)) > 1e-2  # elsewhere the rounding of float32 decides
    np.testing.assert_array_equal(images[settled], np.floor(level)[settled])
    assert settled.mean() > 0.5


def interrupted(p_sample, calls):
    """Returns `p_sample` that is interrupted at call number `calls` + 1."""
    made = []

    def p_sample_until(*args):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return p_sample(*args)

    return p_sample_until


def counted_images(p_sample, log):
    def p_sample_counted(params, rng, index):
        log.extend(np.unique(index))
        return p_sample(params, rng, index)

    return p_sample_counted


def test_resumes_at_the_missing_images(p_sample, expected, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(interrupted(p_sample, 4), 26, 4, out_dir=tmp_path, fingerprint="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-{first:09d}-4.npz" for first in (0, 4, 8)]
    log, shown = [], []
    images = make(
        counted_images(p_sample, log),
        26,
        8,
        out_dir=tmp_path,
        fingerprint="a",
        progress=lambda done, total: shown.append((done, total)),
    )
    assert log == list(range(12, 26))  # in other batches than those that were interrupted
    assert shown == [(12, 26), (20, 26), (26, 26)]
    np.testing.assert_allclose(images, expected, atol=1e-5)
    log.clear()
    np.testing.assert_array_equal(make(counted_images(p_sample, log), 26, 4, out_dir=tmp_path, fingerprint="a"), images)
    assert log == []


def test_more_images_keep_the_first_ones(p_sample, expected, tmp_path):
    make(p_sample, 10, 4, out_dir=tmp_path)
    log = []
    images = make(counted_images(p_sample, log), 12, 4, first=4, out_dir=tmp_path)
    assert log == [10, 11, 12, 13, 14, 15]
    np.testing.assert_allclose(images, expected[4:16], atol=1e-5)


def test_parts_of_another_fingerprint_are_made_anew(p_sample, tmp_path):
    old = make(p_sample, 8, 4, out_dir=tmp_path, fingerprint="old")
    params = {"w": 3 * PARAMS["w"]}
    new = generate(
        p_sample,
        params,
        rng=jax.random.key(5),
        num_images=8,
        batch_size=4,
        out_dir=tmp_path,
        fingerprint="new",
    )
    assert np.abs(new - old).max() > 0.01
    with np.load(tmp_path / "part-000000000-4.npz") as part:
        assert str(part["fingerprint"]) == "new"
        np.testing.assert_array_equal(part["images"], new[:4])
        np.testing.assert_array_equal(part["index"], range(4))


def test_samples_that_are_not_finite_stop_the_run(p_sample, tmp_path):
    broken = {"w": PARAMS["w"].at[0, 0, 0, 0].set(jnp.nan)}
    with pytest.raises(Diverged, match="4 of 4 samples are not finite, image 0 the first"):
        generate(p_sample, broken, rng=jax.random.key(0), num_images=8, batch_size=4, out_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_requests(p_sample, tmp_path):
    with pytest.raises(UserError, match="sampling batch size is 6.*multiple of 4"):
        make(p_sample, 10, 6)
    with pytest.raises(UserError, match="number of images is 0"):
        make(p_sample, 0)
    with pytest.raises(UserError, match="did you mean 'uint8'"):
        pmap_sample_fn(SAMPLE_FN, output="uint")
    (tmp_path / "part-000000000-4.npz").write_bytes(b"PK cut short")
    with pytest.raises(UserError, match="part-000000000-4.npz is damaged .*delete it"):
        make(p_sample, out_dir=tmp_path)


if __name__ == "__main__":
    assert jax.device_count() == 1
    sys.stdout.buffer.write(make(pmap_sample_fn(SAMPLE_FN), 26, 8).tobytes())
