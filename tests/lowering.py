"""Programs lowered for a platform that need not be there, and what stands in them."""

import contextlib
import re

import jax
import pytest

_TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")


@contextlib.contextmanager
def lowering_for(platform: str):
    """Every `.lower(...)` in here lowers for `platform`, which `pmap`'s own cannot be told."""
    original = jax.stages.Traced.lower
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # strict refuses bfloat16's gradients
        patch.setattr(jax.stages.Traced, "lower", lambda traced: original(traced, lowering_platforms=(platform,)))
        yield


def lowered(fn, *args) -> str:
    """Returns the StableHLO of a compiled function, with the names of the operations' sources."""
    return fn.lower(*args).as_text(debug_info=True)


def dtypes(text: str) -> set[str]:
    """Returns the element types of all arrays; attributes of operations, such as a convolution's padding, are not arrays."""
    arrays = re.sub(r"= dense<[^>]*> : tensor<[\dx]*i64>", "", text)
    return {found[1] for found in _TENSOR.findall(arrays)}


def custom_calls(text: str) -> set[str]:
    """Returns the targets of custom calls, but those that only name a sharding, and operations that talk to the host."""
    targets = set(re.findall(r"custom_call @([\w$.]+)", text)) - {"Sharding"}
    return targets | set(re.findall(r"stablehlo\.(?:infeed|outfeed|send|recv)\b", text))


def donated(text: str) -> list[bool]:
    """Returns for each argument whether its memory may hold a result."""
    header = next(line for line in text.splitlines() if "func.func public @main(" in line).split(") -> ")[0]
    return ["tf.aliasing_output" in one or "jax.buffer_donor" in one for one in header.split("%arg")[1:]]


def convolution_layouts(text: str) -> set[str]:
    """Returns the layouts of operands and results of all convolutions, such as `b01f,01io->b01f`."""
    found = re.findall(r"dim_numbers = \[([\w, ]+)\]x\[([\w, ]+)\]->\[([\w, ]+)\]", text)
    return {f"{image},{kernel}->{result}".replace(", ", "") for image, kernel, result in found}


def image_transposes(text: str, batch: int) -> list[str]:
    """Returns the transposes of arrays [batch, ., ., .] that no attention asks for."""
    names = dict(re.findall(r"^(#loc\d+) = loc\((.*)\)$", text, re.MULTILINE))
    found = []
    for shape, location in re.findall(r"stablehlo\.transpose .*?: \(tensor<([\dx]+)\w+>\).*loc\((#loc\d+)\)", text):
        sides = [int(side) for side in shape.split("x") if side]
        if len(sides) == 4 and sides[0] == batch and not re.search(r"/attn\d|/attentions_\d", names[location]):
            found.append(f"{shape} {names[location]}")
    return found
