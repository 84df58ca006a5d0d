"""VQModel and the unconditional latent pipeline against diffusers, on random weights."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from retrack_jax.checkpoints import import_diffusers, read_schedule_config  # noqa: E402
from retrack_jax.checkpoints.latent_diffusion import load_autoencoder  # noqa: E402
from retrack_jax.checkpoints.pipeline_export import export_folder  # noqa: E402
from retrack_jax.diffusion.conversions import make_eps_fn  # noqa: E402
from retrack_jax.diffusion.schedule import Schedule  # noqa: E402
from retrack_jax.models.vqvae import VQModel  # noqa: E402
from retrack_jax.problem.codec import decode_fn  # noqa: E402
from retrack_jax.sampling import guided, make_sampler  # noqa: E402
from retrack_jax.weights.kinds import autoencoder_folder  # noqa: E402
from retrack_jax.weights.names import from_torch, to_torch  # noqa: E402
from tests.parity.test_sd_parity import nchw, nhwc, plain, relative, shaken, vae_options, weights  # noqa: E402
from tests.tiny_latent import write_dit_pipeline, write_pipeline  # noqa: E402

torch.set_num_threads(1)

# As CompVis/ldm-celebahq-256 has it, a quarter as wide in the tests below; then one option each.
VQ_MODELS = {
    "celebahq at toy width": vae_options(8, 16, 32, norm_num_groups=4, layers_per_block=2, num_vq_embeddings=64),
    "defaults": vae_options(32),
    "one level": vae_options(8, norm_num_groups=2, num_vq_embeddings=7),
    "a narrower codebook": vae_options(8, 16, norm_num_groups=4, latent_channels=4, vq_embed_dim=2, scaling_factor=0.7),
    "a wider codebook": vae_options(8, 16, norm_num_groups=8, vq_embed_dim=6, num_vq_embeddings=33, scaling_factor=1.0),
    "no attention": vae_options(8, 8, norm_num_groups=4, mid_block_add_attention=False),
    "gelu": vae_options(8, 8, norm_num_groups=4, act_fn="gelu", layers_per_block=3),
    "gray": vae_options(8, 16, norm_num_groups=4, in_channels=1, out_channels=1, latent_channels=1, scaling_factor=2.5),
    "a code table that decoding does not use": vae_options(8, 8, norm_num_groups=4, lookup_from_codebook=True),
    "four levels": vae_options(4, 8, 8, 16, norm_num_groups=2, latent_channels=5, num_vq_embeddings=100),
}


def vq_model(name: str):
    """diffusers' model; its codes lie as far apart as latents do, so that no place has two that are equally near."""
    torch.manual_seed(0)
    theirs = shaken(diffusers.VQModel(**VQ_MODELS[name]))
    with torch.no_grad():
        theirs.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(2))
    return theirs


@pytest.mark.parametrize("name", VQ_MODELS)
def test_vq_model(name):
    theirs = vq_model(name)
    ours = VQModel.from_config(plain(theirs.config))
    channels, scale = theirs.config.in_channels, theirs.config.scaling_factor
    x = np.random.default_rng(0).uniform(-1, 1, size=(2, 16, 24, channels)).astype(np.float32)
    params = from_torch(weights(theirs), jax.eval_shape(ours.init, jax.random.key(0), x)["params"])
    (found,) = jax.jit(lambda params, x: ours.apply({"params": params}, x, method="encode"))(params, x)
    # Latents as the UNet makes them: about N(0, 1), not on the codes.
    latents = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    with torch.no_grad():
        expected = nhwc(theirs.encode(nchw(x)).latents * scale)
        codes = nhwc(theirs.quantize(nchw(latents / scale))[0])
        image = nhwc(theirs.decode(nchw(latents) / scale).sample)
    assert found.shape == expected.shape == (2, 16 // ours.downscale, 24 // ours.downscale, ours.latent_width)
    assert relative(found, expected) < 1e-5
    quantized = ours.apply({"params": params}, latents / scale, method=lambda module, z: module.quantize(z))
    assert relative(quantized, codes) < 1e-5
    decoded = jax.jit(lambda params, z: ours.apply({"params": params}, z, method="decode"))(params, latents)
    assert relative(decoded, image) < 1e-5
    # and back: the same bits under the same names, and the same network from the config that we write
    back = {tensor.name: tensor.read() for tensor in to_torch(jax.tree.map(jnp.asarray, params))}
    assert back.keys() == theirs.state_dict().keys()
    for key, value in weights(theirs).items():
        np.testing.assert_array_equal(back[key], value)
    again = diffusers.VQModel.from_config(ours.to_config())
    again.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        np.testing.assert_array_equal(nhwc(again.eval().decode(nchw(latents) / scale).sample), image)


@pytest.fixture(params=["VQModel", "AutoencoderKL"])
def source(request, tmp_path):
    """A pipeline's folder in the layout of LDMPipeline, whose autoencoder is of either class."""
    if request.param == "VQModel":
        return write_pipeline(tmp_path / "source")
    folder = write_pipeline(tmp_path / "source", "vae")
    (folder / "vae").rename(folder / "vqvae")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"vae"', '"vqvae"'))
    return folder


def test_diffusers_reads_an_exported_folder_and_makes_the_same_images(source, tmp_path):
    unet, params = import_diffusers(source)
    export_folder(tmp_path / "out", source, unet, params, note="Nothing was forgotten.")
    one, other = (diffusers.LDMPipeline.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    for part in ("unet", "vqvae"):
        state = getattr(one, part).state_dict()
        assert state.keys() == getattr(other, part).state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in getattr(other, part).state_dict().items())
    made = [
        pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipeline in (one, other)
    ]
    np.testing.assert_array_equal(*made)
    assert made[0].shape == (2, 16, 16, 3) and made[0].std() > 0.02
    again = import_diffusers(tmp_path / "out")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_folder_that_diffusers_saved_is_read_as_it_is(source, tmp_path):
    theirs = diffusers.LDMPipeline.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "saved")
    coder = autoencoder_folder(tmp_path / "saved")
    assert coder.name == "vqvae"
    module, params, _ = load_autoencoder(coder)
    for path, value in from_torch(weights(theirs.vqvae), params)["quant_conv"].items():
        np.testing.assert_array_equal(params["quant_conv"][path], value)
    assert module.scaling_factor == theirs.vqvae.config.scaling_factor == 0.5


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_samples_are_those_of_ldm_pipeline(source, monkeypatch, steps):
    """From the same noise: decoded images within 1e-3."""
    theirs = diffusers.LDMPipeline.from_pretrained(source)
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *args, **kwargs: nchw(noise))
    expected = theirs(batch_size=3, num_inference_steps=steps, output_type="np").images

    unet, params = import_diffusers(source)
    vae, vae_params, _ = load_autoencoder(autoencoder_folder(source))
    schedule = Schedule.from_config(read_schedule_config(source))
    sampler = make_sampler("ddim", schedule, steps)
    eps_fn = make_eps_fn(unet.apply, schedule)
    # The sampler draws its own start; that of image i is replaced by row i of the noise.
    monkeypatch.setattr(guided, "initial_noise", lambda rngs, shape: jnp.asarray(noise))
    sample_fn = guided.make_guided_sample_fn(eps_fn, decode_fn(vae), sampler, (8, 8, 3), guidance=0.0)
    rngs = jax.random.split(jax.random.key(0), 3)
    images = jax.jit(sample_fn)(guided.GuidedParams(params, vae_params, None, None), rngs)
    np.testing.assert_allclose(np.clip(np.asarray(images) / 2 + 0.5, 0, 1), expected, atol=1e-3)
    assert expected.std() > 0.02


def test_guided_samples_of_a_transformer_are_those_of_dit_pipeline(tmp_path, monkeypatch):
    """Ten steps under labels from the same noise, and once more from our export: decoded images within 1e-3."""
    source = write_dit_pipeline(tmp_path / "source", num_embeds_ada_norm=1000)  # DiTPipeline's null label is always 1000
    theirs = diffusers.DiTPipeline.from_pretrained(source)
    channels, labels = theirs.transformer.config.in_channels, [5, 0, 999]
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, channels)).astype(np.float32)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *args, **kwargs: nchw(noise))
    expected = theirs(labels, guidance_scale=4.0, num_inference_steps=10, output_type="np").images

    module, params = import_diffusers(source)
    vae, vae_params, _ = load_autoencoder(autoencoder_folder(source))
    schedule = Schedule.from_config(read_schedule_config(source))
    monkeypatch.setattr(guided, "initial_noise", lambda rngs, shape: jnp.asarray(noise))
    given = make_eps_fn(module.apply, schedule), decode_fn(vae), make_sampler("ddim", schedule, 10), noise.shape[1:]
    conditions = jnp.array(labels), jnp.array([1000])
    rngs = jax.random.split(jax.random.key(0), 3)
    sample_fn = jax.jit(guided.make_guided_sample_fn(*given, guidance=4.0))
    images = sample_fn(guided.GuidedParams(params, vae_params, *conditions), rngs)
    np.testing.assert_allclose(np.clip(np.asarray(images) / 2 + 0.5, 0, 1), expected, atol=1e-3)
    assert expected.std() > 0.02

    export_folder(tmp_path / "out", source, module, params, note="Nothing was forgotten.")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again(labels, guidance_scale=4.0, num_inference_steps=10, output_type="np").images, expected)
