"""Writes tests/fixtures/official/trajectories.npz: where fifty steps of the official code lead, given our batches and draws.

    python -m tests.parity.record_official --checkout=FOLDER

FOLDER is a checkout of the public repository sqt24/ReTrack (commit a756e6f was recorded). Its own training step, loss, rescaling
and clipping run; what it draws from PyTorch's generator is replaced by what our step draws, and what it imports but a training
step does not use is replaced by nothing. tests/train/test_official_steps.py compares ours, and needs neither.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
import types
from unittest.mock import MagicMock, patch

import diffusers
import jax
import numpy as np
import torch

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.parallel import unshard_batch
from retrack_jax.train.step import _streams
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.streams import Context
from tests import official

# Configuration, data sets and the hub, none of which a training step uses.
_NOT_NEEDED = ("hydra", "datasets", "omegaconf", "retrack.datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", required=True)
    sys.path.insert(0, parser.parse_args().checkout)
    for name in _NOT_NEEDED:
        sys.modules[name] = MagicMock(name=name)
    from retrack.methods import create_loss
    from retrack.train import train_step

    recorded = {method: trajectory(method, create_loss, train_step) for method in official.OPTIONS}
    official.RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(official.RECORDED, **recorded)
    print(official.RECORDED, official.RECORDED.stat().st_size, "bytes")


def trajectory(method: str, create_loss, train_step) -> np.ndarray:
    """Returns `official.measured` of the official parameters at each of `official.MEASURED_AT`."""
    model = diffusers.UNet2DModel.from_pretrained(official.MODEL, dropout=0.0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=official.RATE, betas=(official.B1, official.B2), weight_decay=official.WEIGHT_DECAY,
        eps=official.EPS,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**official.SCHEDULE)
    own = official.OPTIONS[method]
    params = {"lambda": getattr(own, "lam", getattr(own, "mixture", None))}
    scalars = types.SimpleNamespace(
        siss=types.SimpleNamespace(rescale_factor=getattr(own, "scale", None)),
        erasediff=types.SimpleNamespace(eta=getattr(own, "eta", None)),
    )
    loss = create_loss(method, params, scheduler, "cpu")
    runtime = types.SimpleNamespace(
        model=model, optimizer=optimizer, lr_scheduler=MagicMock(), noise_scheduler=scheduler, model_params={},
        weight_dtype=torch.float32,
    )  # fmt: skip
    accelerator = types.SimpleNamespace(
        accumulate=lambda model: contextlib.nullcontext(),
        backward=lambda loss, **how: loss.backward(**how),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        sync_gradients=True,
    )
    gradients = {"main": {}, "correction": {}} if loss.need_rescale else None
    first, rows = official.start()[1], []
    for step in range(official.STEPS):
        batches, draws = given(method, step)
        with contextlib.ExitStack() as stack:
            for name, values in draws.items():
                stack.enter_context(patch(f"torch.{name}", side_effect=values))
            train_step(types.SimpleNamespace(device="cpu", algorithm=scalars), accelerator, runtime, batches, loss, gradients)
        if step + 1 in official.MEASURED_AT:
            rows.append(official.measured(tree_of(model), first))
    return np.stack(rows)


def given(method: str, step: int) -> tuple[dict, dict]:
    """Returns the official code's data iterators for one step, and the values that its random functions return, in order."""
    make_batch, shared = official.inputs(method)
    remain, forget, noised, uniform, from_forget = drawn(method, unshard_batch(make_batch(step)), shared, step)
    data = {}
    if remain is not None:
        data["remain"] = nchw(remain.x_0)
    if forget is not None and method != "retrack":
        data["deletion"] = nchw(forget.x_0)
    if method == "retrack":
        data["knn"] = (nchw(forget.x_0), torch.from_numpy(np.array(np.moveaxis(np.asarray(forget.neighbors), -1, 2))))
    draws = {
        "randn_like": [nchw(one.eps) for one in noised],
        "randint": [torch.from_numpy(np.array(one.t)).long() for one in noised],
    }
    if method == "erasediff":
        draws["rand_like"] = [nchw(uniform)]
    if method == "siss":  # above lambda it takes the image that remains
        draws["rand"] = [torch.from_numpy(np.where(np.asarray(from_forget), 0.0, 1.0))]
    return {name: iter([value]) for name, value in data.items()}, draws


@functools.partial(jax.jit, static_argnums=0)
def drawn(method: str, batch, shared, step):
    """Returns what our step draws: both streams, the noisy points of each, EraseDiff's uniform noise, SISS's choice."""
    step_rng = jax.random.fold_in(jax.random.key(official.SEED), step)
    context = Context(schedule=shared.schedule, eps_fn=None, t_max=official.SCHEDULE["num_train_timesteps"])
    remain, forget = _streams(METHODS[method], batch, shared, step_rng, 0.0)
    noised = [context.noise(one) for one in (remain, forget) if one is not None]
    if method == "siss":  # one draw for the pair
        return remain, forget, [noised[0]] * 2, None, remain.bernoulli(official.OPTIONS[method].mixture)
    return remain, forget, noised, None if forget is None else forget.uniform(), None


def nchw(images) -> torch.Tensor:
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(images), -1, 1)))


def tree_of(model: diffusers.UNet2DModel):
    """Returns a PyTorch model's parameters as our tree."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return import_diffusers(folder)[1]


if __name__ == "__main__":
    main()
