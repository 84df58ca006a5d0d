"""Tensors of a toy CLIP under the names of OpenAI's RN50.pt."""

import numpy as np


def openai_tensors(
    vocabulary: int, seed: int = 0, *, width: int = 4, features: int = 8, hidden: int = 64
) -> dict[str, np.ndarray]:
    """Returns random tensors: an image tower with one bottleneck a stage, a text tower of one layer with one head."""
    numbers = np.random.default_rng(seed)

    def tensor(*shape, scale=0.2):
        return (scale * numbers.normal(size=shape)).astype(np.float32)

    out = {}

    def norm(name, channels):
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + tensor(channels), tensor(channels)
        out[f"{name}.running_mean"], out[f"{name}.running_var"] = (
            tensor(channels),
            0.5 + numbers.random(channels).astype(np.float32),
        )
        out[f"{name}.num_batches_tracked"] = np.array(1)

    for index, (inputs, outputs) in enumerate([(3, width // 2), (width // 2, width // 2), (width // 2, width)], start=1):
        out[f"visual.conv{index}.weight"] = tensor(outputs, inputs, 3, 3)
        norm(f"visual.bn{index}", outputs)
    inputs = width
    for stage in range(4):
        block, planes = f"visual.layer{stage + 1}.0", width * 2**stage
        for index, shape in enumerate([(planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)], start=1):
            out[f"{block}.conv{index}.weight"] = tensor(*shape)
            norm(f"{block}.bn{index}", shape[0])
        out[f"{block}.downsample.0.weight"] = tensor(4 * planes, inputs, 1, 1)
        norm(f"{block}.downsample.1", 4 * planes)
        inputs = 4 * planes
    for name, outputs in (("q_proj", inputs), ("k_proj", inputs), ("v_proj", inputs), ("c_proj", features)):
        out[f"visual.attnpool.{name}.weight"], out[f"visual.attnpool.{name}.bias"] = tensor(outputs, inputs), tensor(outputs)
    out["visual.attnpool.positional_embedding"] = tensor(50, inputs)

    block = "transformer.resblocks.0"
    shapes = {"attn.in_proj": (3 * hidden, hidden), "attn.out_proj": (hidden, hidden)}
    shapes |= {"mlp.c_fc": (4 * hidden, hidden), "mlp.c_proj": (hidden, 4 * hidden)}
    for name, shape in shapes.items():
        joint = "_" if name == "attn.in_proj" else "."
        out[f"{block}.{name}{joint}weight"], out[f"{block}.{name}{joint}bias"] = tensor(*shape), tensor(shape[0])
    for name in (f"{block}.ln_1", f"{block}.ln_2", "ln_final"):
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + tensor(hidden), tensor(hidden)
    out["token_embedding.weight"], out["positional_embedding"] = tensor(vocabulary, hidden), tensor(77, hidden)
    out["text_projection"], out["logit_scale"] = tensor(hidden, features), np.array(4.6052, np.float32)
    return out
