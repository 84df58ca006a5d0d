"""A method with an option of its own, a metric, a sampler, a source of data and a family of models: each added from outside.

Nothing in the package is edited: every addition is a record in a public table, as docs/architecture.md says.
"""

import json
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.checkpoints.diffusers_import import FAMILIES, Family
from retrack_jax.checks import check_number
from retrack_jax.data.dataset import image_set
from retrack_jax.data.sources.source import Source
from retrack_jax.data.sources.table import SOURCES
from retrack_jax.evaluate import images
from retrack_jax.evaluate.results import Evaluator
from retrack_jax.main import main
from retrack_jax.sampling import SAMPLERS
from retrack_jax.sampling.ddim import DDIM
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.methods import METHODS, Method, Terms
from retrack_jax.unlearn.options import MethodOptions
from tests.tiny import flags

CONFIG = "--config=configs/digits_tshirt.py"


def metrics_of(folder, method="retrack", target="label_10"):
    return json.loads((folder / method / f"seed0-{target}" / "metrics.json").read_text())


@dataclass(frozen=True, kw_only=True)
class HushOptions(MethodOptions):
    """Gradient descent on remaining images, and ascent of a given weight on forgotten ones."""

    weight: float = 0.25

    def __post_init__(self):
        check_number("weight", self.weight, 0.0)


def hush(context, remain, forget):
    points_remain, points_forget = context.noise(remain), context.noise(forget)
    eps_remain, eps_forget = context.predict(points_remain, points_forget)
    ascent = losses.neggrad(eps_forget, points_forget.eps).mean()
    return Terms(main=context.retain_loss(eps_remain, points_remain).mean() + context.options.weight * ascent)


def test_a_method_with_an_option_of_its_own(tmp_path, monkeypatch, capsys):
    """Runs of other methods that were finished before stay finished: a run is compared on what it reads."""
    assert main(["retrack_jax", CONFIG, *flags(tmp_path)]) == 0
    report = tmp_path / "retrack" / "seed0-label_10" / "report.html"
    made = report.stat().st_mtime_ns
    monkeypatch.setitem(METHODS, "hush", Method(streams=frozenset({"remain", "forget"}), terms=hush, options=HushOptions))
    weights = [tmp_path / "hush" / "seed0-label_10" / "diffusers" / "diffusion_pytorch_model.safetensors"]
    assert main(["retrack_jax", f"{CONFIG}:hush", *flags(tmp_path, unlearn__hush__weight=0.5)]) == 0
    assert main(["retrack_jax", CONFIG, *flags(tmp_path)]) == 0 and report.stat().st_mtime_ns == made
    assert metrics_of(tmp_path, "hush")["config"]["methods"]["hush"]["own"] == {"weight": 0.5}
    capsys.readouterr()
    assert main(["retrack_jax", f"{CONFIG}:hush", *flags(tmp_path, unlearn__hush__weight=-1)]) == 2
    assert "error: config.unlearn.hush.weight is -1" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["retrack_jax", f"{CONFIG}:hush", *flags(other, unlearn__hush__weight=0.0)]) == 0
    assert weights[0].read_bytes() != (other / weights[0].relative_to(tmp_path)).read_bytes()  # the option reaches the step


def test_a_metric(tmp_path, monkeypatch):
    def brightness(task, subject, wanted):
        return {"brightness": float(subject.finest.mean())}, {"num_samples": len(subject.samples)}

    monkeypatch.setattr(images, "EVALUATORS", [*images.EVALUATORS, Evaluator(names=("brightness",), compute=brightness)])
    assert main(["retrack_jax", CONFIG, *flags(tmp_path, **{"eval.metrics": ("brightness",)})]) == 0
    with np.load(tmp_path / "retrack" / "seed0-label_10" / "samples.npz") as samples:
        assert metrics_of(tmp_path)["unlearned"]["brightness"] == pytest.approx(float(samples["samples_float"].mean()))


def test_a_sampler(tmp_path, monkeypatch):
    class Halfway:
        """DDIM over half of the steps that are asked for."""

        @staticmethod
        def create(schedule, num_steps, *, spacing=None):
            return DDIM.create(schedule, num_steps // 2, spacing=spacing)

    monkeypatch.setitem(SAMPLERS, "halfway", Halfway)
    drawn = {}
    for name, sampler, steps in (("ours", "halfway", 4), ("theirs", "ddim", 2)):
        fields = {"sampling.sampler": sampler, "sampling.num_steps": steps, "eval.metrics": ("frequency",)}
        assert main(["retrack_jax", f"{CONFIG}:pretrained", *flags(tmp_path / name, **fields)]) == 0
        with np.load(tmp_path / name / "pretrained" / "samples.npz") as samples:
            drawn[name] = samples["samples_float"]
    np.testing.assert_array_equal(drawn["ours"], drawn["theirs"])


def test_a_source_of_data(tmp_path, monkeypatch):
    def load(data):
        pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
        return image_set("noise", pixels, [f"noise_{row:02d}" for row in range(30)])

    monkeypatch.setitem(SOURCES, "noise", Source(formats=("embedded",), load=load, needs=lambda data, config: iter(())))
    fields = {"data.source": "noise", "data.copies": 0, "targets": ("noise_07",), "eval.metrics": ("forget_loss",)}
    assert main(["retrack_jax", CONFIG, *flags(tmp_path, **fields)]) == 0
    assert metrics_of(tmp_path, target="noise_07")["provenance"]["data"]["name"] == "noise"


class Linear(nn.Module):
    """A network of one linear layer, with the config and spelling that a checkpoint of it would have."""

    channels: int = 1
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x_t, t, deterministic=True):
        phase = jnp.broadcast_to(t.astype(jnp.float32)[:, None, None, None] / 1000, (*x_t.shape[:3], 1))
        return nn.Dense(self.channels, name="proj")(jnp.concatenate([x_t, phase], axis=-1))

    @classmethod
    def from_config(cls, config, **fields):
        return cls(channels=config["channels"], **fields)

    def to_config(self):
        return {"_class_name": "LinearModel", "channels": self.channels}


def test_a_family_of_models(tmp_path, monkeypatch):
    family = Family(Linear, lambda module: (jnp.zeros((1, 2, 2, module.channels)), jnp.zeros((1,), jnp.int32)))
    monkeypatch.setitem(FAMILIES, "LinearModel", family)
    module = Linear()
    params = module.init(jax.random.key(0), *family.inputs(module))["params"]
    export_diffusers(tmp_path / "model", module, params, schedule={"num_train_timesteps": 1000})
    again, loaded = import_diffusers(tmp_path / "model")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    fields = {"checkpoint": tmp_path / "model", "eval.metrics": ("forget_loss",)}
    assert main(["retrack_jax", CONFIG, *flags(tmp_path / "work", **fields)]) == 0
    exported = tmp_path / "work" / "retrack" / "seed0-label_10" / "diffusers"
    _, unlearned = import_diffusers(exported)
    assert not np.array_equal(unlearned["proj"]["kernel"], params["proj"]["kernel"])
