"""config.mode=check looks for the parts of a checkpoint as they are read, and for what Stable Diffusion needs beside it."""

import json
from pathlib import Path

import pytest

from tests.data.checking import config_of, printed


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The configs' paths are relative to where the command runs: here, an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_a_schedule_that_is_not_there_is_told(tmp_path):
    config = config_of("cifar10")
    folder = tmp_path / config.checkpoint
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    path = f"{config.checkpoint}/scheduler/scheduler_config.json"
    assert f"missing  noise schedule: {path} (without it config.schedule is taken)" in printed(config)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "found    noise schedule" in printed(config)
    config.checkpoint += "/unet"  # the schedule lies beside it
    assert "found    noise schedule" in printed(config)


def test_every_shard_is_needed(tmp_path):
    config = config_of("celebahq")
    folder = tmp_path / config.checkpoint
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    shards = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    (folder / shards[0]).write_bytes(b"weights")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert f"missing  model weights: {config.checkpoint}/{shards[1]}\n" in printed(config)
    (folder / shards[1]).write_bytes(b"weights")
    assert f"found    model weights: {config.checkpoint} (3 files" in printed(config)
    for text, reason in (("{}", "has no weight_map"), ("[]", "holds no JSON object")):
        index.write_text(text)
        assert reason in printed(config)


def test_a_lone_variant_is_found_and_a_choice_is_not(tmp_path):
    config = config_of("celebahq")
    folder = tmp_path / config.checkpoint
    folder.mkdir(parents=True)
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"weights")
    assert "found    model weights" in printed(config)
    (folder / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"weights")
    assert "missing  model weights" in printed(config) and "copy the one to read to" in printed(config)


class TestStableDiffusion:
    @pytest.fixture
    def config(self, tmp_path):
        """The paper's config, with every file that it reads there, by name."""
        config = config_of("stable_diffusion")
        config.targets = ("willy_wonka",)
        config.eval.weights_dir = str(tmp_path / "weights")
        model, data = tmp_path / config.checkpoint, tmp_path / config.data.dir
        names = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
        names += ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "text_encoder/model.safetensors"]
        names += ["tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"]
        files = [model / name for name in names] + [data / f"{kind}_prompts.json" for kind in ("original", "modified")]
        inside = ("images/a.png", "kmeans_labels.json", "clustering_info.json", "kmeans_classifier.joblib")
        files += [data / "willy_wonka" / name for name in inside]
        files += [tmp_path / "weights" / name for name in ("sscd_disc_mixup.torchscript.pt", "RN50.pt")]
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return config

    def missing(self, config):
        return [line for line in printed(config).splitlines() if line.startswith("missing")]

    def test_all_there(self, config):
        assert self.missing(config) == []

    @pytest.mark.parametrize(
        ("path", "line"),
        [
            ("{model}/scheduler/scheduler_config.json", "missing  noise schedule: {model}/scheduler/scheduler_config.json"),
            ("{model}/tokenizer/merges.txt", "missing  tokenizer: {model}/tokenizer/merges.txt"),
            (
                "{data}/willy_wonka/kmeans_classifier.joblib",
                "missing  classifier of willy_wonka: {data}/willy_wonka/kmeans_classifier.joblib (without it success_rate is "
                "left out, or refitted with config.eval.classifier=labels)",
            ),
        ],
    )
    def test_what_is_gone_is_listed(self, config, path, line):
        where = {"model": config.checkpoint, "data": config.data.dir}
        Path(path.format(**where)).unlink()
        assert self.missing(config) == [line.format(**where)]

    def test_the_classifier_is_needed_only_where_it_is_read(self, config):
        (Path(config.data.dir) / "willy_wonka" / "kmeans_classifier.joblib").unlink()
        config.eval.classifier = "labels"
        assert self.missing(config) == []
        config.eval.classifier, config.eval.metrics = "joblib", ("sscd_original",)
        assert self.missing(config) == []

    def test_tokenizer_json_alone_does(self, config):
        tokenizer = Path(config.checkpoint) / "tokenizer"
        (tokenizer / "vocab.json").rename(tokenizer / "tokenizer.json")
        assert self.missing(config) == []
