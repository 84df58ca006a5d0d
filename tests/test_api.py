"""The Python door: arrays in, parameters out, the caller's parameters untouched, mistakes named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.api import run, unlearn
from retrack_jax.checks import UserError
from retrack_jax.config.reading import default_config
from retrack_jax.train.run_store import tree_digest
from retrack_jax.unlearn.methods import METHODS
from tests import toys

SMALL = dict(num_steps=3, batch_size=8, num_neighbors=4, learning_rate=1e-3)


def go(key, **options):
    params, schedule = options.pop("params", toys.params()), options.pop("schedule", toys.schedule())
    options = {**SMALL, "rng": key, **options}
    return unlearn(toys.ToyNet().apply, params, schedule, toys.images(20), toys.images(2, 1), **options)


def test_unlearn_returns_other_parameters_and_repeats_itself(rng):
    params = toys.params()
    before = tree_digest(params)
    first = unlearn(toys.ToyNet().apply, params, toys.schedule(), toys.images(20), toys.images(2, 1), rng=rng, **SMALL)
    assert tree_digest(params) == before
    assert toys.relative(first, params) > 1e-4
    assert tree_digest(go(rng)) == tree_digest(first)
    assert tree_digest(go(jax.random.key(1))) != tree_digest(first)


def test_every_field_of_config_unlearn_is_an_option_with_the_same_default(rng):
    config = default_config().unlearn
    fields = [*config.retrack.items(), *((name, value) for name, value in config.items() if name not in METHODS)]
    given = {name: value for name, value in fields if value is not None}
    small = {"num_steps": 1, "batch_size": 8, "num_neighbors": 4}
    plain = unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), toys.images(20), toys.images(2, 1), rng=rng, **small)
    assert tree_digest(go(rng, **{**given, **small})) == tree_digest(plain)


def test_an_adapter_comes_back_merged_into_the_layers_it_names(rng):
    params = toys.params()
    adapted = go(rng, adapter="lora", lora={"rank": 2, "layers": ["Dense_1"]})
    assert toys.relative(adapted["Dense_1"]["kernel"], params["Dense_1"]["kernel"]) > 1e-5
    for name, leaf in (("Dense_0", "kernel"), ("Dense_0", "bias"), ("Dense_1", "bias")):
        np.testing.assert_array_equal(adapted[name][leaf], params[name][leaf])


def test_the_learning_rate_may_warm_up_and_fall(rng):
    constant = go(rng)
    for changes in ({"warmup_steps": 2}, {"learning_rate_schedule": "cosine"}):
        assert toys.relative(go(rng, **changes), constant) > 1e-5


def test_a_moving_average_of_the_weights_is_what_comes_back(rng):
    first, second = (go(rng, num_steps=steps) for steps in (1, 2))
    weight = 2**-0.75  # of the newest weights at the second step; the first step's average is its weights
    expected = jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, first, second)
    assert toys.relative(first, second) > 1e-4
    assert toys.relative(go(rng, num_steps=2, ema_max_decay=0.9), expected) < 1e-6


def test_pixels_and_floats_are_the_same_images(rng):
    floats = [images.astype(np.float32) / np.float32(127.5) - np.float32(1) for images in (toys.images(20), toys.images(2, 1))]
    ours = unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), *floats, rng=rng, **SMALL)
    assert toys.relative(ours, go(rng)) < 1e-6


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rng": 0}, "rng is 0; it must be one key as jax.random.key"),
        ({"rng": np.zeros(2, np.uint32)}, "rng is uint32.2.; it must be one key"),
        ({"rng": {"params": 1}}, "rng is {'params': 1}; it must be"),
        ({"params": {"params": toys.params()}}, "pass what is below 'params'"),
        ({"params": {"a": 1.0}}, "params must be a tree of arrays"),
        ({"params": {"a": jnp.zeros(2, jnp.bfloat16)}}, "params are bfloat16: .* pass jax.tree.map"),
        ({"lam_end": 0.5}, "^lam_end is 0.5, and lam stays as it is"),
        ({"ema_power": 0.5}, "^ema_power is 0.5, and there is no moving average"),
        ({"method": "siss", "scale": 5.0, "share": 0.3}, "^share is 0.3, which is not read while scale is above 0"),
        ({"schedule": {"beta_start": 1e-4}}, "schedule is a dict; make one with Schedule.from_config"),
        ({"callback": 3}, "callback is 3"),
        ({"method": "retrak"}, "did you mean 'retrack'"),
        ({"method": "retrain"}, "random weights"),
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
        ({"mixture": 1.0}, "does not read the option 'mixture'"),
        ({"num_neighbors": 21}, "k is 21"),
        ({"batch_size": 6}, "does not divide evenly over 4 devices"),
        ({"t_min": 900, "t_max": 100}, "t_max is 100; it must be a whole number of at least 901"),
        ({"t_max": 5000}, "t_max is 5000; .* at most 1000"),
        ({"t_max": 0}, "t_max is 0"),
        ({"t_min": 1000}, "t_min is 1000; .* at most 999"),
        ({"warmup_steps": -1}, "^warmup_steps is -1"),
        ({"lam": 7.0}, "^lam is 7.0"),
        ({"lam_schedule": "linear"}, "^lam_end is not set"),
        ({"learning_rate": -1.0}, "^learning_rate is -1.0"),
        ({"adapter": "lora", "lora": {"rank": 0}}, "^lora.rank is 0"),
        ({"lora": {"rank": 2}}, "^lora is set, but adapter is None"),
        ({"adapter": "lora", "lora": 8}, "^lora is 8; give a dict"),
        ({"adapter": "lora"}, "^lora.layers: the network has no layer 'to_q'; it has Dense_0, Dense_1"),
        ({"forget_batch_size": -8}, "^forget_batch_size is -8"),
        ({"method": "siss", "forget_batch_size": 4}, "^forget_batch_size is 4, but this method pairs"),
        ({"learning_rate_schedule": "cosin"}, "learning_rate_schedule is 'cosin'.*did you mean 'cosine'"),
    ],
)
def test_mistakes_are_value_errors_that_name_them(options, words, rng):
    with pytest.raises(ValueError, match=words):
        go(rng, **options)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_network_that_makes_another_number_of_channels_is_refused(channels, rng):
    """Twice those of the images are eps and a learned variance; of any others it is not known what they are."""
    images, net = np.repeat(toys.images(22), 2, axis=-1), nn.Conv(channels, (3, 3))
    params = net.init(rng, np.float32(images[:1]))["params"]
    with pytest.raises(ValueError, match=rf"eps_pred \(.*, {channels}\), eps \(.*, 2\)"):
        unlearn(lambda v, x, t: net.apply(v, x), params, toys.schedule(), images[:20], images[20:], rng=rng, **SMALL)


@pytest.mark.parametrize(
    "dtypes, words",
    [
        (("uint8", "float32"), "remain is uint8 and forget is float32; give both as"),
        (("float32", "uint8"), "remain is float32 and forget is uint8; give both as"),
        (("int64", "int64"), "remain and forget are int64; give both as"),
    ],
)
def test_images_of_different_kinds_are_refused(dtypes, words, rng):
    """A white image is 255 or 1.0: taken for the other kind it would be another image, and nobody would be told."""
    pair = [images.astype(dtype) for images, dtype in zip((toys.images(20), toys.images(2, 1)), dtypes, strict=True)]
    with pytest.raises(UserError, match=words):
        unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), *pair, rng=rng, **SMALL)


def floats(scale, shift=0.0):
    return [images.astype(np.float32) * np.float32(scale) + np.float32(shift) for images in (toys.images(20), toys.images(2, 1))]


def test_floats_of_another_range_are_refused_or_warned_of(rng, caplog):
    """Trained on as they are, floats of 0..255 or 0..1 would be other images for a network of [-1, 1]."""
    for pair, words in ((floats(1.0), "floats from 0 to 255; give both as"), (floats(np.nan), "NaN or infinity")):
        with pytest.raises(UserError, match=words):
            unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), *pair, rng=rng, **SMALL)
    # 0 to 16 are scikit-learn's digits; -4 to 4 may be latents.
    of_pixels, of_latents = (floats(1 / 255), floats(16 / 255)), (floats(2 / 255, -1.0), floats(8 / 255, -4.0))
    for pair, warned in (*((pair, True) for pair in of_pixels), *((pair, False) for pair in of_latents)):
        caplog.clear()
        unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), *pair, rng=rng, **SMALL)
        assert ("hold floats from 0 to" in caplog.text) == warned


def test_the_callback_hears_of_every_step_and_changes_nothing(rng):
    heard = []
    watched = go(rng, callback=lambda step, metrics: heard.append((step, metrics)))
    assert tree_digest(watched) == tree_digest(go(rng))
    assert [step for step, _ in heard] == [1, 2, 3]
    assert all({"loss", "grad_norm"} <= set(metrics) and type(metrics["loss"]) is float for _, metrics in heard)

    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(rng, callback=stop)


def test_run_refuses_float64_as_the_command_does(tmp_path):
    with jax.enable_x64(True), pytest.raises(UserError, match="float64 is enabled in jax"):
        run(default_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def unlearn_labeled(rng, remain_labels, forget_labels=(1, 1), apply_fn=None, **options):
    apply_fn = apply_fn or (lambda variables, x, t, label, **kwargs: toys.ToyNet().apply(variables, x, t, **kwargs))
    options = {**SMALL, "rng": rng, "labels": (remain_labels, forget_labels), **options}
    return unlearn(apply_fn, toys.params(), toys.schedule(), toys.images(20), toys.images(2, 1), **options)


def test_neighbors_have_the_label_of_the_forgotten_image(rng):
    """A network that ignores its label: only the neighbors tell labels apart."""
    same, one = [1] * 20, [1] + [2] * 19
    assert tree_digest(unlearn_labeled(rng, same)) == tree_digest(go(rng))
    assert tree_digest(unlearn_labeled(rng, one, num_neighbors=1)) != tree_digest(go(rng, num_neighbors=1))
    with pytest.raises(UserError, match="k is 2"):
        unlearn_labeled(rng, one, num_neighbors=2)


@pytest.mark.parametrize("method", ["retrack", "siss", "neggrad", "vanilla"])
def test_every_image_is_denoised_under_its_own_label(method, rng):
    """A network that works for the labels in use, and gives NaN for any other."""

    def apply_fn(variables, x, t, label, **kwargs):
        known = (label == 3) | (label == 5)
        return jnp.where(known[:, None, None, None], toys.ToyNet().apply(variables, x, t, **kwargs), jnp.nan)

    labels = [3, 5] * 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(unlearn_labeled(rng, labels, (3, 5), apply_fn, method=method)))


@pytest.mark.parametrize(
    "labels, words",
    [
        (([1] * 19, [1, 1]), r"the labels of remain are int64 \(19,\); give a whole number from 0 on for each of 20"),
        (([1] * 20, [0.5, 1]), "the labels of forget are float64"),
        (([1] * 20, [1, -1]), "the labels of forget are int64"),
        (([1] * 20, [1, 4]), "no image of label 4 remains"),
        (([1] * 20,), "labels must be a pair"),
    ],
)
def test_mistakes_in_labels(labels, words, rng):
    with pytest.raises(UserError, match=words):
        unlearn_labeled(rng, (), labels=labels)
