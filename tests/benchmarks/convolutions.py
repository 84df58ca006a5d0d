"""What the CPU's own convolutions and attention gain, one at a time on one device: milliseconds, the least of some calls.

python -m tests.benchmarks.convolutions [forms|layouts|attention ...] [--results=docs/results]

forms        XLA's direct convolution and models/cpu/winograd.py: time, and how many cores are busy
layouts      both gradients as JAX writes them and as models/cpu/conv.py does, alone and inside `lax.scan`
attention    jax's form and models/cpu/attention.py, alone and with its gradient
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from retrack_jax.models.cpu import attention as cpu_attention
from retrack_jax.models.cpu import winograd
from retrack_jax.models.cpu.conv import conv
from tests.benchmarks.measure import Table, parser_of

COMMAND = "python -m tests.benchmarks.convolutions"
SAME = ((1, 1), (1, 1))
# Images, pixels per side, channels in and out.
VALUES = ((500, 8, 64, 64), (16, 32, 32, 32), (16, 32, 128, 128), (16, 16, 256, 256), (2, 128, 128, 128))
GRADIENTS = ((16, 32, 128, 128), (16, 32, 256, 128), (16, 16, 256, 256), (2, 128, 128, 128), (1, 256, 128, 128))
# Images, tokens, heads and channels per head of an attention in: the small digits, MNIST, CIFAR-10, DiT-XL/2, Stable Diffusion.
ATTENTIONS = ((64, 16, 8, 8), (8, 196, 8, 8), (8, 256, 1, 256), (2, 256, 16, 72), (1, 4096, 8, 40))


def seconds(call: Callable, *arguments, rounds: int = 10) -> list[tuple[float, float]]:
    """Returns the seconds of each call, by the clock and of all processors, after one call that compiles."""
    jax.block_until_ready(call(*arguments))
    found = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(*arguments))
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def least(form: Callable, *arguments) -> tuple[str, str]:
    """Returns the milliseconds of the quickest call of a compiled `form`, and the cores that it kept busy."""
    wall, cpu = min(seconds(jax.jit(form), *arguments))
    return f"{1e3 * wall:.1f}", f"{cpu / wall:.2f}"


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(number), shape) for number, shape in enumerate(shapes)]


def direct(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as models/cpu/conv.py gives it to XLA where Winograd does not pay."""
    return jax.lax.conv_general_dilated(x_BHWC, kernel, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def direct_kernel_gradient(x_BHWC: jax.Array, dy_BHWO: jax.Array) -> jax.Array:
    """The same of its gradient in the kernel: the images are the kernel of a convolution over them."""
    return direct(x_BHWC.transpose(3, 1, 2, 0), dy_BHWO.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)


def forms() -> Table:
    columns = "direct, ms", "cores busy", "Winograd, ms", "cores busy with it"
    table = Table("convolution_forms", "3 x 3 convolution of images, channels", *columns)
    for count, side, channels, features in VALUES:
        x, kernel = arrays((count, side, side, channels), (3, 3, channels, features))
        pays = winograd.pays(x.shape, kernel.shape, 1, SAME, x.dtype)
        ours = least(winograd.convolve, x, kernel) if pays else ("", "")
        table.add(f"value, {count} of {side} x {side}, {channels} to {features}", *least(direct, x, kernel), *ours)
    for count, side, channels, features in GRADIENTS:
        x, dy = arrays((count, side, side, channels), (count, side, side, features))
        both = *least(direct_kernel_gradient, x, dy), *least(winograd.kernel_gradient, x, dy)
        table.add(f"kernel gradient, {count} of {side} x {side}, {channels} to {features}", *both)
    return table


def layouts() -> Table:
    columns = "JAX's, ms", "JAX's in `lax.scan`, ms", "ours, ms", "ours in `lax.scan`, ms"
    table = Table("convolution_layouts", "gradient, 16 images of 32 x 32, 128 to 128", *columns)
    x, kernel, dy = arrays((16, 32, 32, 128), (3, 3, 128, 128), (16, 32, 32, 128))

    def gradient(form: Callable, which: int, x, kernel, dy):
        return jax.vjp(form, x, kernel)[1](dy)[which]

    def scanned(form: Callable, x, kernel, dy):
        """One turn of a loop; the result enters the next, so that the compiler cannot take it out."""

        def turn(total, _):
            return form(x + 1e-30 * total, kernel, dy).mean(), None

        return jax.lax.scan(turn, jnp.zeros(()), None, length=1)[0]

    for name, which in (("of the kernel", 1), ("of the input", 0)):
        cells = []
        for form in (direct, partial(conv, strides=1, padding=SAME)):
            of_form = partial(gradient, form, which)
            cells += [least(one, x, kernel, dy)[0] for one in (of_form, partial(scanned, of_form))]
        table.add(name, *cells)
    return table


def attention() -> Table:
    columns = "jax's", "models/cpu", "jax's, with its gradient", "models/cpu, with its gradient"
    table = Table("attention_cpu", "tokens, heads of channels", *(f"{column}, ms" for column in columns))
    for images, tokens, heads, width in ATTENTIONS:
        given = arrays(*[(images, tokens, heads, width)] * 4)
        plain = jax.nn.dot_product_attention, cpu_attention.attend
        with_gradient = [lambda *qkvc, form=form: jax.vjp(form, *qkvc[:3])[1](qkvc[3]) for form in plain]
        cells = []
        for form in (*plain, *with_gradient):
            taken = seconds(jax.jit(form), *given[: 3 if form in plain else 4])
            cells.append(f"{1e3 * statistics.median(wall for wall, _ in taken):.2f}")
        table.add(f"{images} image{'s' * (images > 1)} of {tokens:,}, {heads} of {width}", *cells)
    return table


PARTS = {one.__name__: one for one in (forms, layouts, attention)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS))
    options = parser.parse_args()
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"unknown part {unknown[0]}")
    jax.config.update("jax_platforms", "cpu")
    for part in options.parts:
        PARTS[part]().write(options.results, f"{COMMAND} {part}")


if __name__ == "__main__":
    main()
