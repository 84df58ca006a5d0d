"""Writes tests/fixtures/metrics/networks.npz: what PyTorch's feature networks give at weights from a seed.

Run by hand with PyTorch:

    python -m tests.parity.record_metrics

`make test` compares ours with these arrays and needs no PyTorch.
"""

from pathlib import Path

import numpy as np
import torch

from retrack_jax.metrics.features.resize import pil_shorter_side
from tests.metrics.feature_weights import inception_shapes, mnist_shapes, random_images, random_state, sscd_shapes
from tests.parity import torch_twins

PATH = Path(__file__).parents[1] / "fixtures" / "metrics" / "networks.npz"


def main():
    with torch_twins.torchvision_stand_in():
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    weights = Path("/tmp/recorded-inception.pth")
    torch.save(torch_twins.torch_state(random_state(inception_shapes())), weights)
    extractor = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    weights.unlink()
    recorded = {}
    with torch.no_grad():
        features, logits = extractor(torch.from_numpy(random_images(2, 32)).permute(0, 3, 1, 2))
        recorded |= {"inception_features": features.numpy(), "inception_logits": logits.numpy()}

        sscd = torch_twins.TorchSscd()
        sscd.load_state_dict(torch_twins.torch_state(random_state(sscd_shapes())))
        images = torch.from_numpy(np.stack([pil_shorter_side(image, 288) for image in random_images(2, 64)]))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        recorded["sscd"] = sscd.eval()(((images / 255 - mean) / std).permute(0, 3, 1, 2)).numpy()

        mnist = torch_twins.torch_mnist()
        mnist.load_state_dict(torch_twins.torch_state(random_state(mnist_shapes())))
        digits = (torch.from_numpy(random_images(6, 28, 1)) / 255).permute(0, 3, 1, 2)
        recorded["mnist_logits"] = mnist.eval()(digits).numpy()
        recorded["mnist_logits_official"] = mnist.train()(digits).numpy()

        for size in (8, 20):
            image = torch.from_numpy(random_images(1, size, 1)).float().permute(0, 3, 1, 2)
            resize = torch.nn.functional.interpolate
            antialiased = resize(image, size=(13, 13), mode="bilinear", align_corners=False, antialias=True)
            recorded[f"torchmetrics_{size}"] = antialiased[0, 0].numpy()
            recorded[f"tf1_{size}"] = interpolate_bilinear_2d_like_tensorflow1x(image, size=(13, 13), align_corners=False)[
                0, 0
            ].numpy()
    PATH.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PATH, **recorded)
    print(PATH, PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
