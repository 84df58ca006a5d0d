"""PyTorch twins of the networks that no package ships, and the torchvision stand-in that torch-fidelity's import asks for.

Test-only code of our own: SSCD's ResNet-50 and the MNIST ResNet-18 with torchvision's module names.
"""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def torchvision_stand_in():
    """Puts empty modules where torch-fidelity imports torchvision at its top; its Inception, FID and KID never use them.

    Only for the time of that import: torchmetrics would take them for the real torchvision.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return

    class Absent:
        pass

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name in ("CIFAR10", "STL10", "CIFAR100"):
        setattr(sys.modules["torchvision.datasets"], name, Absent)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class TorchBlock(nn.Module):
    def __init__(self, channels, width, stride, bottleneck):
        super().__init__()
        out = width * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            h = self.bn3(self.conv3(F.relu(h)))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class TorchResNet(nn.Module):
    def __init__(self, channels, sizes, bottleneck, outputs, pool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width_in = 64
        for stage, size in enumerate(sizes):
            blocks = []
            for index in range(size):
                width = 64 * 2**stage
                blocks.append(TorchBlock(width_in, width, 2 if stage and not index else 1, bottleneck))
                width_in = width * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.pool = pool
        self.fc = nn.Linear(width_in, outputs)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(self.pool(x))


class TorchSscd(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = TorchResNet(3, (3, 4, 6, 3), True, 512, lambda x: x.clamp(min=1e-6).pow(3).flatten(2).mean(2).pow(1 / 3))

    def forward(self, x):
        return F.normalize(self.backbone(x))


def torch_mnist():
    return TorchResNet(1, (2, 2, 2, 2), False, 10, lambda x: x.flatten(1))


def torch_state(state):
    """NumPy arrays as tensors, with the counters that a batch normalisation saves."""
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    counters = {name.replace("running_var", "num_batches_tracked") for name in state if name.endswith("running_var")}
    return tensors | {name: torch.tensor(7) for name in counters}
