"""The digits config at toy size: the whole command in seconds."""

TINY = {
    "data.copies": 8,
    "model.block_out_channels": (8,),  # one block each way and no attention: what compiles quickest
    "model.down_block_types": ("DownBlock2D",),
    "model.up_block_types": ("UpBlock2D",),
    "model.add_attention": False,
    "model.norm_num_groups": 4,
    "pretrain.num_steps": 6,
    "pretrain.batch_size": 8,
    "pretrain.warmup_steps": 2,
    "unlearn.num_steps": 4,
    "unlearn.batch_size": 8,
    "unlearn.num_neighbors": 3,
    "sampling.num_images": 12,
    "sampling.num_steps": 4,
    "sampling.batch_size": 8,
    "checkpoint_every": 2,
    "log_every": 1,
    "eval.metrics": ("frequency",),
    "compute.cpu_devices": 4,  # as tests/conftest.py has it
}


def flags(workdir, **more) -> list[str]:
    """The command's arguments after `--config=...`."""
    cache = {} if "://" in str(workdir) else {"data.cache_dir": f"{workdir}-cache"}  # shared with no other test
    fields = {**TINY, **cache, **{name.replace("__", "."): value for name, value in more.items()}}

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    # A tuple that the config file holds cannot change from strings to numbers, so each is written as Python does.
    return [f"--workdir={workdir}", *(f"--config.{name}={text(value)}" for name, value in fields.items())]
