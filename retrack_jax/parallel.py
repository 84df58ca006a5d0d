"""The only pmap: its axis, its collectives, and how batches and keys meet devices.

State is passed with `in_axes=None, out_axes=None`, un-stacked, and only the batch carries a device axis. pmap is
`jit` over `shard_map` today, so such a state is donated, replicated once and saved by Orbax as it is; a move to `shard_map`
touches this file alone.

Randomness never depends on the device: a key is folded with each example's *global* index, so one device equals four, and four
processes equal one.
"""

import pickle
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from retrack_jax.checks import Diverged, Preempted, UserError, check
from retrack_jax.notation import Array, PyTree, Rng

AXIS = "batch"
_CHUNK = 1 << 30  # bytes that process 0 sends at once: such a number fits 32 bits, the whole size may not
Value = TypeVar("Value")


def pmap(fn: Callable, in_axes, out_axes=None, *, donate_argnums=()) -> Callable:
    """Maps `fn` over the devices under the axis name `AXIS`; None marks what every device shares."""
    return jax.pmap(fn, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate_argnums)


def pmean(tree: PyTree) -> PyTree:
    """Inside `pmap`: returns `tree` with every leaf averaged over all devices of all processes."""
    return jax.lax.pmean(tree, AXIS)


def local_rows(global_rows: int) -> slice:
    """Returns the rows of a global batch that this process holds: processes take equal, consecutive shares."""
    share = global_rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def shard_batch(batch: PyTree) -> PyTree:
    """Reshapes each leaf `[B, ...]` of this process's batch to `[local devices, B / local devices, ...]`."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda leaf: leaf.reshape((devices, leaf.shape[0] // devices) + leaf.shape[1:]), batch)


def to_devices(batch: PyTree) -> PyTree:
    """Puts each leaf `[local devices, ...]` on this process's devices, as `pmap` would when it is called, but ahead of that."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS)))


def unshard_batch(batch: PyTree) -> PyTree:
    """Undoes `shard_batch`: `[local devices, b, ...]` to `[B, ...]`, as NumPy arrays on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape((-1,) + leaf.shape[2:]), batch)


def check_settings() -> None:
    """Raises `UserError` if float64 is enabled in jax, or random numbers are such that an example's depend on its batch."""
    check(
        not jax.config.jax_enable_x64,
        "float64 is enabled in jax, which changes the weights that a run ends with; unset JAX_ENABLE_X64 (jax_enable_x64)",
    )
    generator = jax.config.jax_default_prng_impl
    check(
        generator == "threefry2x32",
        f"jax's random numbers are by {generator}, which draws other noise for the same image in another batch, on another "
        "number of devices or after a restart; unset JAX_DEFAULT_PRNG_IMPL (jax_default_prng_impl)",
    )
    check(
        jax.config.jax_threefry_partitionable,
        "jax_threefry_partitionable is off, which changes all random numbers; unset JAX_THREEFRY_PARTITIONABLE",
    )


def check_divisible(field: str, batch: int, parts: int = 1) -> None:
    """Raises `UserError` unless `batch` divides evenly over all devices, `parts` microbatches each.

    A recipe fixes the batch and not its microbatches, so the message suggests fewer microbatches if that helps.
    """
    devices = jax.device_count()
    if batch % (devices * parts):
        over = f"{devices} devices" + (f" x {parts} accumulation steps" if parts > 1 else "")
        hint = f"choose a multiple of {devices * parts}"
        if batch % devices == 0:  # so parts > 1
            group, dot, _ = field.rpartition(".")
            hint += f", or set {group}{dot}accumulation to {batch // devices}"
        raise UserError(f"{field} is {batch}, which does not divide evenly over {over}; {hint}")


@partial(jax.vmap, in_axes=(None, 0))
def example_rngs(rng: Rng, index_B: Array) -> Rng:
    """Returns one key per example: `rng` folded with the example's global index in the batch, int `[B]`."""
    return jax.random.fold_in(rng, index_B)


def all_processes_agree(data: bytes) -> bool:
    """Whether every process passed the same bytes, by their checksum (True on a single process)."""
    return largest(_checksum(data)) == -largest(-_checksum(data))


def check_same_everywhere(what: str, values: Mapping[str, str]) -> None:
    """Raises `UserError` on every process, naming what differs, unless all processes passed the same `values`.

    Called before anything else that processes do together: with another number of steps one would wait for the others forever.

    Args:
      what: what the values are, for the message.
      values: name -> text, in any order.
    """
    if jax.process_count() == 1:
        return
    names = sorted(values)
    check(
        all_processes_agree("\n".join(names).encode()),
        f"the processes have other fields in {what}; give every host the same version of retrack_jax and the same config",
    )
    mine = np.array([_checksum(values[name].encode()) for name in names], np.int32)
    same = (np.asarray(multihost_utils.process_allgather(mine)) == mine).all(axis=0)
    differing = [f"{name} ({values[name][:60]} here)" for name, agrees in zip(names, same, strict=True) if not agrees]
    # Process 0 agrees with itself, so all learn here whether any process differs.
    if any_process(bool(differing)):
        shown = ", ".join(differing[:4]) or "another process says which"
        raise UserError(f"the processes differ in {what}: {shown}; give every host the same")


def _checksum(data: bytes) -> int:
    return zlib.crc32(data) >> 1  # 31 bits, so that an int32 holds it and its negative


def barrier(name: str) -> None:
    """Waits until every process is here; nothing on a single process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_main_process() -> bool:
    """Whether this process writes reports."""
    return jax.process_index() == 0


def replicated_sharding() -> jax.sharding.NamedSharding:
    """Returns the sharding of what every device of every process holds whole."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def replicate(tree: PyTree) -> PyTree:
    """Puts a copy of every leaf on every device, so that no later step moves it; leaves that are None stay None."""
    return jax.device_put(tree, replicated_sharding())


@jax.jit  # one program; leaf by leaf it would compile one for every shape
def copy(tree: PyTree) -> PyTree:
    """Returns a copy of `tree` in new buffers, which a step may donate."""
    return jax.tree.map(jnp.copy, tree)


def across_processes(tree: PyTree) -> PyTree:
    """Returns `tree`, of which each process holds a whole copy, as arrays that span all processes: what Orbax saves."""
    if jax.process_count() == 1:
        return tree
    sharding = replicated_sharding()
    return jax.tree.map(lambda leaf: multihost_utils.host_local_array_to_global_array(leaf, sharding.mesh, sharding.spec), tree)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    return bool(largest(int(flag)))


def largest(value: int) -> int:
    """Returns the largest `value`, an int of 32 bits, of all processes."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(jnp.asarray(value, jnp.int32))))


def stop_together(should_stop: Callable[[], bool], where: str) -> None:
    """Raises `Preempted` on every process if any of them must stop; `where` names, for the user, what would have come next."""
    if any_process(should_stop()):
        raise Preempted(f"stopped before {where}")


def together(call: Callable[[], Value], error: type[UserError] = UserError) -> Value:
    """Returns `call()`; if it fails on any process, raises on all, so that no process blocks on a peer that has failed.

    Args:
      call: holds no collectives, because it may end early.
      error: what the other processes raise after a `UserError` (after `Diverged` they raise `Diverged`, else `RuntimeError`); the
        process that failed raises its own error.
    """
    if jax.process_count() == 1:
        return call()
    value = problem = None
    try:
        value = call()
    except Exception as reason:  # the other processes must know first; raised below
        problem = reason
    kinds = (Diverged, UserError, Exception)
    worst = largest(0 if problem is None else 1 + next(i for i, kind in enumerate(kinds) if isinstance(problem, kind)))
    if problem is not None:
        raise problem
    if worst:
        kind = (Diverged, error, RuntimeError)[worst - 1]
        raise kind("another process failed here and says why; all processes stop")
    return value


def on_main(call: Callable[[], object]) -> None:
    """Calls `call()`, which holds no collective, on process 0; all return when it is done, and all raise if it fails."""
    together(call if is_main_process() else lambda: None)


def from_main(make: Callable[[], Value]) -> Value:
    """Returns on every process what `make()` returns on process 0, arrays as NumPy arrays; the others do not call it.

    For values that must be the same everywhere and might differ: the state of a disk, an approximate search.
    """
    if jax.process_count() == 1:
        return make()
    main, packed = is_main_process(), bytearray()
    on_main(lambda: packed.extend(pickle.dumps(jax.device_get(make()))))
    whole, rest = map(int, multihost_utils.broadcast_one_to_all(np.array(divmod(len(packed), _CHUNK), np.int32)))
    for index, size in enumerate([_CHUNK] * whole + [rest] * (rest > 0)):
        chunk = np.frombuffer(packed, np.uint8, size, index * _CHUNK) if main else np.empty(size, np.uint8)
        chunk = np.asarray(multihost_utils.broadcast_one_to_all(chunk))
        if not main:
            packed += chunk.data
    return pickle.loads(packed)


def split_rows(apply: Callable[[int, int], dict[str, np.ndarray]], num_rows: int) -> dict[str, np.ndarray]:
    """Returns `apply(0, num_rows)` on every process; each computes a share of the rows.

    Args:
      apply: `(first, stop)` to arrays `[stop - first, ...]`, one row per image; its only collective is a pmap.
      num_rows: the same on every process. Shares are equal and consecutive; if they do not divide it, the last ones overlap.
    """
    count = jax.process_count()
    if count == 1:
        return apply(0, num_rows)
    share = -(-num_rows // count)
    starts = [min(index * share, num_rows - share) for index in range(count)]
    first = starts[jax.process_index()]
    mine = apply(first, first + share)
    whole = {}
    for name, gathered in multihost_utils.process_allgather(mine).items():
        whole[name] = np.empty((num_rows, *gathered.shape[2:]), gathered.dtype)
        for start, part in zip(starts, gathered, strict=True):
            whole[name][start : start + share] = part
    return whole


def block_on_cpu(tree: PyTree) -> PyTree:
    """Waits for `tree` on CPU, whose devices share threads: collectives of two concurrent steps could deadlock."""
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(tree)
    return tree
