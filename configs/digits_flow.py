"""Digits T-Shirt by a flow: a diffusion transformer, trained by rectified flow, forgets its T-shirt. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_flow.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_flow.py:all --config.seeds=0,1,2   # every method, one comparison

Hardware: any CPU; two cores are enough. Scores: docs/flows.md, measured.
"""

from retrack_jax.config.base import config_beside, with_method


def get_config(method=None):
    config = config_beside(__file__, "digits_tshirt").get_config()
    config.unlock()
    config.name = "digits_flow"
    config.schedule.prediction_type = "flow_prediction"
    config.network = "dit"
    config.dit.update(sample_size=8, in_channels=1, patch_size=2, num_layers=4, num_attention_heads=4, attention_head_dim=24)
    config.sampling.sampler, config.sampling.num_steps = "flow_euler", 20
    config.pretrain.num_steps = 3000
    config.pretrain.logit_normal = config.unlearn.logit_normal = (0.0, 1.0)
    # Chosen on seed 100, which no table uses. Without the cap and with lambda 0.005, 3 of 2,000 samples there were T-shirts.
    config.unlearn.retrack.snr_cap, config.unlearn.retrack.lam = 5.0, 0.01
    config.compute.cpu_devices = 1
    return with_method(config, method)
