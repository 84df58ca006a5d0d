"""Adapters by the command: what is kept and exported, a run that is stopped, and what is refused."""

import shutil

import jax
import numpy as np
import pytest

from retrack_jax.api import run
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.checks import Preempted, UserError
from retrack_jax.cli.flags import parse
from retrack_jax.main import main
from retrack_jax.train.lora import LoraOptions, init, merge
from retrack_jax.train.run_store import RunStore, tree_digest
from tests.tiny import flags

LORA = {"unlearn.adapter": "lora", "unlearn.lora.rank": 2, "unlearn.lora.layers": ("conv1", "conv2", "time_emb_proj")}
RECORD = LoraOptions(rank=2, layers=LORA["unlearn.lora.layers"])


def arguments(workdir, method="retrack", **more):
    return ["retrack_jax", f"--config=configs/digits_tshirt.py:{method}", *flags(workdir, **{**LORA, **more})]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapter")
    assert main(arguments(workdir)) == 0
    return workdir


def kept(folder, like):
    """The parameters in the newest checkpoint of a run."""
    with RunStore(folder / "checkpoints") as store:
        tree, _ = store.restore(lambda step: {"step": jax.ShapeDtypeStruct((), np.int32), "params": like})
    return tree["params"]


def folder_of(workdir, method="retrack"):
    return workdir / method / "seed0-label_10"


def test_the_export_is_the_pretrained_model_with_what_the_checkpoint_holds(done):
    exported = import_diffusers(folder_of(done) / "diffusers")[1]
    base = kept(done / "pretrained", jax.eval_shape(lambda: exported))
    # A checkpoint with more than A and B, or with other shapes, would be refused.
    adapter = kept(folder_of(done), init(RECORD, base, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, exported, merge(RECORD, base, adapter))
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), exported, base)
    mid = changed["mid_block"]["resnets_0"]
    assert mid["conv1"] == {"kernel": True, "bias": False} and mid["norm1"] == {"scale": False, "bias": False}


def test_a_stopped_run_continues_to_the_same_bits(done, tmp_path):
    shutil.copytree(done / "pretrained", tmp_path / "pretrained")
    config, _ = parse(arguments(tmp_path))
    with pytest.raises(Preempted, match="step 1 of 4"):
        run(config, tmp_path, should_stop=(folder_of(tmp_path) / "log.jsonl").exists)  # after the first step
    run(config, tmp_path)
    weights = [folder_of(workdir) / "diffusers" / "diffusion_pytorch_model.safetensors" for workdir in (done, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    samples = [np.load(folder_of(workdir) / "samples.npz")["samples_float"] for workdir in (done, tmp_path)]
    np.testing.assert_array_equal(*samples)


def test_an_adapter_of_the_same_method_with_two_gradients_and_distillation(done, tmp_path):
    shutil.copytree(done / "pretrained", tmp_path / "pretrained")
    more = {"unlearn.retain_loss": "distillation", "unlearn.accumulation": 2, "compute.remat": True}
    assert main(arguments(tmp_path, "siss", **more)) == 0
    digest = tree_digest(import_diffusers(folder_of(tmp_path, "siss") / "diffusers")[1])
    assert digest != tree_digest(import_diffusers(folder_of(done) / "diffusers")[1])


@pytest.mark.parametrize(
    "method, more, words",
    [
        ("retrack", {"unlearn.lora.rank": 3}, "config.unlearn.lora.rank (2 there, 3 now)"),
        ("retrack", {"unlearn.lora.alpha": 9.0}, "config.unlearn.lora.alpha (None there, 9.0 now)"),
        ("retrack", {"unlearn.lora.layers": "conv1"}, "config.unlearn.lora.layers"),
        ("retrack", {"unlearn.adapter": "None"}, "config.unlearn.lora is set, but config.unlearn.adapter is None"),
        ("retrack", {"unlearn.lora.layers": "to_q,conv1"}, "the network has no layer 'to_q'; it has conv1, conv2, conv_in,"),
        ("retrack", {"unlearn.lora.export": "adapter"}, "diffusers loads adapters into Stable Diffusion alone; choose merged"),
        ("retrack", {"unlearn.adapter": "dora"}, "config.unlearn.adapter is 'dora'; choose one of lora"),
        ("retrain", {}, "but retrain trains from random weights; leave the adapter out"),
    ],
)
def test_what_is_refused_in_one_line(method, more, words, done, capsys):
    assert main(arguments(done, method, **more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]


def test_a_run_without_the_adapter_is_another_run(done):
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py:retrack", *flags(done)]) == 2
    config, _ = parse(["retrack_jax", "--config=configs/digits_tshirt.py:retrack", *flags(done)])
    with pytest.raises(UserError, match="config.unlearn.adapter .'lora' there, None now"):
        run(config, done)
