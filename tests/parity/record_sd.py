"""Records what transformers and diffusers give for the tiny pipeline, for tests that run without PyTorch:
tests/fixtures/sd_parity.npz.

    .venv-parity/bin/python -m tests.parity.record_sd
"""

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from retrack_jax.checkpoints import export_pipeline, load_pipeline
from tests.prompts200 import PROMPTS
from tests.tiny_sd import CONCEPTS, PIPELINE, RECORDED

PROMPT = "A Red Circle, on a green wall!"
STEPS = 10


def main(folder) -> None:
    """Writes the file; `folder` takes the pipeline in float32, which diffusers then reads."""
    from PIL import Image

    ours = load_pipeline(PIPELINE)
    export_pipeline(folder, ours, ours.unet_params)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe = pipe.to(torch.float32)
    numbers = np.random.default_rng(0)
    latents = numbers.normal(size=(2, 8, 8, 4)).astype(np.float32)
    noise = numbers.normal(size=(STEPS, 2, 8, 8, 4)).astype(np.float32)
    t = np.array([1, 981], np.int32)
    picture = np.asarray(Image.open(next((CONCEPTS / "red_circle" / "images").glob("*_004.png"))).convert("RGB"))

    tokens = pipe.tokenizer(list(PROMPTS), max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        chosen = [0, 7, 12]
        text = pipe.text_encoder(tokens[chosen]).last_hidden_state
        unet = pipe.unet(nchw(latents), torch.tensor(t), text[1:]).sample
        posterior = pipe.vae.encode(nchw(picture[None] / np.float32(127.5) - 1)).latent_dist
        decoded = pipe.vae.decode(nchw(latents) / pipe.vae.config.scaling_factor).sample

    import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm

    drawn = iter(noise)
    scheduling_ddpm.randn_tensor = lambda *args, **kwargs: nchw(next(drawn))
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    guided = pipe(PROMPT, num_images_per_prompt=2, latents=nchw(latents), num_inference_steps=STEPS, output_type="np").images

    np.savez_compressed(
        RECORDED,
        ids=tokens.numpy().astype(np.int16),
        chosen=np.array(chosen),
        text=text.numpy(),
        latents=latents,
        noise=noise,
        t=t,
        unet=nhwc(unet),
        picture=picture,
        mean=nhwc(posterior.mean) * pipe.vae.config.scaling_factor,
        std=nhwc(posterior.std) * pipe.vae.config.scaling_factor,
        decoded=nhwc(decoded),
        prompt=PROMPT,
        guided=guided,
    )


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2)


def nhwc(x) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        main(f"{scratch}/pipeline")
