"""The table of methods: every entry takes a step, and the ones that should agree do."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.reading import unlearn_options
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.parallel import example_rngs
from retrack_jax.unlearn import combine, losses
from retrack_jax.unlearn.methods import METHODS, get_method
from retrack_jax.unlearn.options import MethodOptions, RetrackOptions, SissNoIsOptions, SissOptions
from retrack_jax.unlearn.streams import Context, Stream
from tests import toys

SCHEDULE = toys.schedule()
EPS_FN = make_eps_fn(toys.ToyNet().apply, SCHEDULE)


NONE = MethodOptions()


def context(params, options, **kwargs):
    def eps_fn(x_t, t, condition, rngs):
        return EPS_FN(params, x_t, t)

    return Context(schedule=SCHEDULE, eps_fn=eps_fn, options=options, **{"t_max": 1000, **kwargs})


def streams(method, rng, size=8):
    remain = Stream(jnp.asarray(pixels_to_model(toys.images(size))), example_rngs(jax.random.fold_in(rng, 1), jnp.arange(size)))
    neighbors = jnp.asarray(pixels_to_model(toys.images(size * 3, 2))).reshape(size, 3, *toys.SHAPE)
    forget = Stream(
        jnp.asarray(pixels_to_model(toys.images(size, 1))), example_rngs(jax.random.fold_in(rng, 2), jnp.arange(size)), neighbors
    )
    return (remain if "remain" in method.streams else None), (forget if "forget" in method.streams else None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_finite_terms_and_gradients(name, rng):
    method = METHODS[name]
    terms = method.terms(context(toys.params(), method.options()), *streams(method, rng))
    assert (method.combine is None) == (terms.correction is None)

    def main(params):
        return method.terms(context(params, method.options()), *streams(method, rng)).main

    grads = jax.grad(main)(toys.params())
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_retrack_is_the_published_mixture(rng):
    """lambda L_unlearn + (1 - lambda) L_R, from the same draws, by the oracle's definition of each term."""
    method, params = METHODS["retrack"], toys.params()
    remain, forget = streams(method, rng)
    found = method.terms(context(params, RetrackOptions(lam=0.3)), remain, forget)
    here = context(params, NONE)
    r, f = here.noise(remain), here.noise(forget)
    retain = losses.vanilla(EPS_FN(params, r.x_t, r.t), r.eps).mean()
    unlearn = losses.retrack(EPS_FN(params, f.x_t, f.t), f.x_t, forget.neighbors, f.gamma, f.sigma).mean()
    np.testing.assert_allclose(found.main, 0.3 * unlearn + 0.7 * retain, rtol=1e-5)


def test_the_snr_cap_weights_each_forgotten_example(rng):
    """min(1, c sigma^2/gamma^2), by hand at three t; without it, and with a cap above every r^2, the loss is the paper's."""
    gamma, sigma = (np.asarray(table)[np.array([0, 500, 999])] for table in (SCHEDULE.gamma, SCHEDULE.sigma))
    by_hand = [min(1.0, 5.0 * float(s) ** 2 / float(g) ** 2) for g, s in zip(gamma, sigma, strict=True)]
    np.testing.assert_allclose(losses.snr_weight(jnp.asarray(gamma), jnp.asarray(sigma), 5.0), by_hand, rtol=1e-6)
    assert by_hand[0] < 1e-3 and by_hand[1] == by_hand[2] == 1.0
    assert losses.snr_weight(jnp.zeros(1), jnp.ones(1), 5.0) == 1.0  # zero-terminal SNR

    method, params = METHODS["retrack"], toys.params()
    paper, uncapped, capped = (
        method.terms(context(params, RetrackOptions(lam=0.3, snr_cap=cap)), *streams(method, rng)) for cap in (None, 1e9, 5.0)
    )
    assert float(paper.main) == float(uncapped.main) and float(capped.logs["unlearn"]) < float(paper.logs["unlearn"])
    here = context(params, NONE)
    _, forget = streams(method, rng)
    f = here.noise(forget)
    per_image = losses.retrack(EPS_FN(params, f.x_t, f.t), f.x_t, forget.neighbors, f.gamma, f.sigma)
    weights = np.minimum(1.0, 5.0 * (np.asarray(f.sigma) / np.asarray(f.gamma)) ** 2)
    np.testing.assert_allclose(capped.logs["unlearn"], np.mean(weights * np.asarray(per_image)), rtol=1e-5)


def test_the_window_of_t_is_kept_and_covered(rng):
    remain, _ = streams(METHODS["vanilla"], rng, size=256)
    t = np.asarray(context(toys.params(), NONE, t_min=250, t_max=260).noise(remain).t)
    assert set(t) == set(range(250, 260))


def test_distillation_at_the_pretrained_parameters_has_no_gradient(rng):
    method, params = METHODS["vanilla"], toys.params()
    remain, _ = streams(method, rng)

    def main(trained):
        there = context(trained, NONE, distill=True, reference_fn=lambda x, t, condition: EPS_FN(params, x, t))
        return method.terms(there, remain, None).main

    assert float(main(params)) == 0.0
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(jax.grad(main)(params)))


def test_siss_in_one_pass_agrees_in_expectation_with_two(rng):
    """Both gradients of SISS, averaged over 400 draws, within four standard errors of siss_no_is in every one of 8 directions.

    Pairs are near and t large, so that the weights, whose mean is 1, have a variance that 400 draws can average out.
    """
    size, draws = 64, 400
    remain_x = jnp.asarray(pixels_to_model(toys.images(size)))
    forget_x = jnp.clip(remain_x + 0.05 * jax.random.normal(rng, remain_x.shape), -1, 1)
    params = toys.params()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    directions = jax.random.normal(jax.random.key(5), (8, flat.size)) / jnp.sqrt(flat.size)

    def projected(name, draw_rng):
        def term(which):
            def value(vector):
                rngs = example_rngs(draw_rng, jnp.arange(size))
                there = context(unravel(vector), SissOptions(mixture=0.5), t_min=500)
                forget_rngs = example_rngs(draw_rng, size + jnp.arange(size))
                found = METHODS[name].terms(there, Stream(remain_x, rngs), Stream(forget_x, forget_rngs))
                return getattr(found, which)

            return jax.grad(value)(flat)

        return jnp.stack([directions @ term("main"), directions @ term("correction")])

    def drawn(name, seed):
        keys = jax.random.split(jax.random.key(seed), draws)
        return np.asarray(jax.jit(jax.vmap(lambda key: projected(name, key)))(keys))

    one, two = drawn("siss", 1), drawn("siss_no_is", 2)
    error = np.sqrt(one.var(0) / draws + two.var(0) / draws)
    difference = np.abs(one.mean(0) - two.mean(0))
    assert (difference <= 4 * error).all(), difference / error
    # The test could fail: the error bar is small against what is compared.
    assert np.median(error / (np.abs(two.mean(0)) + 1e-9)) < 0.2


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'retrack'"):
        get_method("retrak")


def test_a_scale_of_zero_asks_for_the_automatic_one():
    main, correction = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([0.0, 2.0])}
    for scale, meant in ((0.0, 0.1 * 5.0), (5.0, 5.0)):  # the norm of main is 5
        expected = combine.siss(main, correction, meant)
        for name in ("siss", "siss_no_is"):
            found = METHODS[name].combine(main, correction, SissNoIsOptions(scale=scale, share=0.1))
            np.testing.assert_array_equal(found["a"], expected["a"])


def test_uniform_noise_is_not_negative_and_fills_its_range(rng):
    drawn = Stream(jnp.zeros((64, *toys.SHAPE)), example_rngs(rng, jnp.arange(64))).uniform()
    assert 0 <= drawn.min() < 0.02 and 0.98 < drawn.max() < 1 and abs(float(drawn.mean()) - 0.5) < 0.03


def test_options_of_the_config_reach_the_step():
    shared = {"num_steps": 5, "retain_loss": "distillation", "t_min": 250, "t_max": 750, "accumulation": 2}
    recipe = unlearn_options("retrack", shared, {"lam_schedule": "linear", "lam": 0.0, "lam_end": 1.0}, where="")
    how = recipe.step_options(1000, dropout=True)
    assert (how.t_min, how.t_max, how.distill, how.dropout, how.accumulation) == (250, 750, True, True, 2)
    assert [float(how.options.at(jnp.asarray(step), how.num_steps).lam) for step in (0, 2, 4)] == [0.0, 0.5, 1.0]


def test_an_option_follows_half_a_cosine():
    options = SissOptions(mixture=0.2, mixture_end=0.6, mixture_schedule="cosine")
    drawn = [float(options.at(jnp.asarray(step), 5).mixture) for step in range(5)]
    np.testing.assert_allclose(drawn, 0.2 + 0.4 * (0.5 - 0.5 * np.cos(np.pi * np.arange(5) / 4)), rtol=1e-6)
    assert SissOptions().at(jnp.asarray(3), 5) == SissOptions()


def test_the_mixture_of_siss_is_the_share_of_forgotten_images(rng):
    """At lambda 0 every point is of a remaining image and the main term is the vanilla loss; at 1 of a forgotten one."""
    remain, forget = streams(METHODS["siss"], rng)
    there = context(toys.params(), SissOptions(mixture=0.0))
    only_remain = METHODS["vanilla"].terms(there, remain, None).main
    np.testing.assert_allclose(METHODS["siss"].terms(there, remain, forget).main, only_remain, rtol=1e-6)
    there = context(toys.params(), SissOptions(mixture=1.0))
    points = there.noise(remain.replace(x_0=forget.x_0))
    only_forget = losses.vanilla(there.predict(points)[0], points.eps).mean()
    np.testing.assert_allclose(METHODS["siss"].terms(there, remain, forget).correction, only_forget, rtol=1e-5)
