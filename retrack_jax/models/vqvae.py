"""VQModel: the autoencoder of CompVis' unconditional latent diffusion models, in Flax with diffusers' names.

    (1) z = quant_conv(encoder(x))                      certain: it has no posterior
    (2) latent = scaling_factor * z                     all that the UNet sees; it is not quantized
    (3) q = the vector e_k of the codebook with the least |z - e_k|, at each place
    (4) x = decoder(post_quant_conv(q)),  z = latent / scaling_factor

Its own training is not here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrack_jax.models.vae import Autoencoder
from retrack_jax.notation import Array


class Codebook(nn.Module):
    """The nearest of `size` learned vectors at each place of a latent (equation 3)."""

    size: int
    width: int

    @nn.compact
    def __call__(self, z_BHWC: Array) -> Array:
        codebook = nn.Embed(self.size, self.width, name="embedding")
        codes_KC = codebook.embedding.astype(jnp.float32)
        half_norms_K = 0.5 * jnp.sum(codes_KC**2, axis=-1)

        def nearest(z_HWC: Array) -> Array:  # |z|^2 is the same for all k; without it, the rest loses no digits to it
            products_HWK = jnp.einsum("hwc,kc->hwk", z_HWC, codes_KC, precision="highest")
            return jnp.argmax(products_HWK - half_norms_K[None, None], axis=-1)

        # One image at a time: 8192 scores at each of 64 x 64 places take 134 MB.
        return codes_KC[jax.lax.map(nearest, z_BHWC.astype(jnp.float32))]


class VQModel(Autoencoder):
    """The autoencoder that decodes from a codebook (equations 1 to 4).

    Attributes:
      scaling_factor: 1 if the config has none. Such a config, like that of CompVis/ldm-celebahq-256, is older than the field, and
        its latents were not scaled. (diffusers, since the field exists, takes 0.18215 for them.)
      vq_embed_dim: channels of a latent and of the codebook; None: `latent_channels`.
    """

    latent_channels: int = 3
    scaling_factor: float = 1.0
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None

    class_name, fixed = "VQModel", {"norm_type": "group"}
    passed_over = ("force_upcast", "lookup_from_codebook")  # precision; and a path that no pipeline of images takes

    def setup(self):
        self._set_up(self.latent_channels)
        self.quant_conv = self._pointwise(self.latent_width)
        self.quantize = Codebook(self.num_vq_embeddings, self.latent_width)
        self.post_quant_conv = self._pointwise(self.latent_channels)

    @property
    def latent_width(self) -> int:
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    def encode(self, x_BHWC: Array) -> tuple[Array]:
        """Returns the latent of each image (equations 1 and 2), as `Autoencoder.encode`."""
        self._check_sides(x_BHWC)
        return (self.quant_conv(self.encoder(x_BHWC)).astype(jnp.float32) * self.scaling_factor,)

    def decode(self, latent_BHWC: Array) -> Array:
        """Returns images from the UNet's latents (equations 3 and 4), as `Autoencoder.decode`."""
        codes = self.quantize(latent_BHWC / self.scaling_factor)
        return self.decoder(self.post_quant_conv(codes)).astype(jnp.float32)
