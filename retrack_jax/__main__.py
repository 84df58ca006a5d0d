from retrack_jax.main import command

command()
