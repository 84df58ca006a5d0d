"""The same step and sampler in PyTorch, as the official code runs them: diffusers' `UNet2DModel`, eager, one fused
forward pass.

Where the official code is slower for no gain of its own (a K times larger target, SISS's two forward passes, a
synchronisation in each step) the quicker equivalent is written here, so that the ratio measures the frameworks and not
an old mistake.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from tests.benchmarks.networks import BATCH, NUM_NEIGHBORS, RECIPE, SISS_SCALE, config_of


def make_model(network: str, device: str = "cpu") -> UNet2DModel | UNet2DConditionModel:
    """Returns the model in training mode with random weights."""
    torch.manual_seed(0)
    config = {key: value for key, value in config_of(network).items() if not key.startswith("_")}
    family = UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel
    return family(**config).to(device).train()


def make_training(
    network: str,
    method: str,
    batch: tuple[int, int] | None = None,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    channels_last: bool = False,
    tf32: bool = False,
    accumulation: int = 1,
    checkpoint=None,
) -> Callable:
    """Returns a function of no argument that takes one training step: forward, backward, clip, AdamW.

    A step of ReTrack or vanilla may take `accumulation` microbatches. `checkpoint` is a folder that the model is read from, in
    place of random weights.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    model = UNet2DModel.from_pretrained(checkpoint, low_cpu_mem_usage=False) if checkpoint else make_model(network)
    model = model.to(device).train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    lam, learning_rate = RECIPE[network]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6)
    alpha_bar = DDPMScheduler().alphas_cumprod.to(device)
    gammas, sigmas = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    config = config_of(network)
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    num_remain, num_forget = (count // accumulation for count in batch or BATCH[network])
    width = config.get("cross_attention_dim")
    prompt = [] if width is None else [torch.randn(1, 77, width, device=device)]
    remain = torch.rand(num_remain, *shape, device=device) * 2 - 1
    forget = (torch.rand(1, *shape, device=device) * 2 - 1).expand(num_forget, *shape)
    neighbors = torch.rand(NUM_NEIGHBORS, *shape, device=device) * 2 - 1
    siss_scale = SISS_SCALE.get(network, 5.0)

    def noise(x_0):
        t = torch.randint(0, 1000, (len(x_0),), device=device)
        gamma, sigma = gammas[t][:, None, None, None], sigmas[t][:, None, None, None]
        eps = torch.randn_like(x_0)
        return gamma * x_0 + sigma * eps, t, eps, gamma, sigma

    def predict(x_t, t):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return forward(x_t, t, *(one.expand(len(x_t), -1, -1) for one in prompt)).sample.float()

    def norms(x):
        return x.square().sum((1, 2, 3))

    def retrack():
        (x_r, t_r, eps_r, _, _), (x_f, t_f, _, gamma, sigma) = noise(remain), noise(forget)
        eps_pred = predict(torch.cat([x_r, x_f]), torch.cat([t_r, t_f]))
        v = (x_f[:, None] - gamma[:, None] * neighbors) / sigma[:, None]
        p = torch.softmax(-v.square().sum((2, 3, 4)) / 2, dim=1)
        target = (p[:, :, None, None, None] * v).sum(1)
        unlearn, retain = norms(eps_pred[num_remain:] - target).mean(), norms(eps_pred[:num_remain] - eps_r).mean()
        ((lam * unlearn + (1 - lam) * retain) / accumulation).backward()

    def vanilla():
        x_t, t, eps, _, _ = noise(remain)
        (norms(predict(x_t, t) - eps).mean() / accumulation).backward()

    def siss():
        x_0 = torch.where((torch.rand(num_remain, device=device) < 0.5)[:, None, None, None], forget, remain)
        x_t, t, _, gamma, sigma = noise(x_0)
        eps_pred = predict(x_t, t)
        eps_a, eps_f = (x_t - gamma * remain) / sigma, (x_t - gamma * forget) / sigma
        gap = (norms(eps_a) - norms(eps_f)) / 2
        w_a, w_f = 2 * torch.sigmoid(-gap), 2 * torch.sigmoid(gap)
        main, correction = (w_a * norms(eps_pred - eps_a)).mean(), (w_f * norms(eps_pred - eps_f)).mean()
        parameters = list(model.parameters())
        g_main = torch.autograd.grad(main, parameters, retain_graph=True)
        g_correction = torch.autograd.grad(correction, parameters)
        scale = siss_scale / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g_correction)))
        for parameter, a, b in zip(parameters, g_main, g_correction, strict=True):
            parameter.grad = a - scale * b

    losses = {"retrack": retrack, "vanilla": vanilla, "siss": siss}

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(accumulation):
            losses[method]()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def make_sampling(network: str, num_images: int, num_steps: int) -> Callable:
    """Returns a function that draws images by diffusers' DDPMScheduler, as its DDPMPipeline does."""
    model = make_model(network).eval()
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(num_steps)
    config = config_of(network)

    @torch.no_grad()
    def run() -> None:
        x = torch.randn(num_images, config["in_channels"], config["sample_size"], config["sample_size"])
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        x.clamp(-1, 1)

    return run


def make_pipeline(folder: str, images: int, batch: int, steps: int) -> Callable:
    """Returns a function that draws images, in batches, by the DDPMPipeline in `folder`: NumPy in [0, 1]."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def run():
        generator, batches = torch.Generator().manual_seed(0), []
        for start in range(0, images, batch):
            options = dict(batch_size=min(batch, images - start), num_inference_steps=steps, output_type="np")
            batches.append(pipeline(generator=generator, **options).images)
        return np.concatenate(batches)

    return run


def make_matmul(size: int) -> Callable:
    """Returns a function that multiplies two square matrices ten times."""
    a = torch.randn(size, size)

    def run() -> None:
        for _ in range(10):
            a @ a

    return run
