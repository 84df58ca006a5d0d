"""Stable Diffusion v1.4: forget a training picture that the model reproduces for a prompt. 48 concepts, each one run.

    launch/download.sh configs/stable_diffusion.py                                      # checkpoint, concepts, feature networks
    python -m retrack_jax.main --config=configs/stable_diffusion.py                     # ReTrack, 48 runs
    python -m retrack_jax.main --config=configs/stable_diffusion.py:siss --config.targets=bjork_vulnicura_spotify,willy_wonka

Hardware: one accelerator of 24 GB for ReTrack, on paper (docs/stable_diffusion.md has the arithmetic). Time and score to
expect: not measured by us on the real model; the tests run all of this on a toy, and the networks are compared with diffusers'.
"""

import importlib.util
from pathlib import Path

# The official sweep, in its order.
CONCEPTS = (
    "bjork_vulnicura_spotify", "daft_punk_jay_z_collaboration", "border_guards_movie",
    "aaron_paul_luke_skywalker_reading", "ricky_gervais_slough_performance", "buddhist_ethics_talk",
    "no_limits_business_woman_podcast", "freddy_adu_club_transfer", "insights_with_laura_powers_podcast",
    "george_rr_martin_wolf_sanctuary_donation", "mrs_doubtfire_sequel_titles", "bloodborne_video_game",
    "living_in_the_light_podcast", "mother_hippo_influence", "sylvester_stallone", "danny_boyle_fx_tv_deal",
    "the_happy_scientist_podcast", "steve_carell_north_korea_movie_canceled", "prince_warner_brothers_album",
    "st_vincent_apple_music_show", "anna_kendrick_essay_collection", "sound_advice_podcast",
    "chipotle_bag_essays_yale", "charlize_theron_dark_places_trailer", "ethan_hawke_chet_baker_biopic",
    "grieve_cream_navy_area_rug", "netflix_att_streaming_deal", "f_scott_fitzgerald_lost_story",
    "health_mastery_cafe_podcast", "dc_all_stars_podcast", "willy_wonka", "fractal_art_canvas",
    "air_conditioners_parts", "plattville_green_rug", "shaw_floors_sahara", "colbert_coffee", "chris_robinson_beer",
    "winds_of_winter_delay", "south_park_game_review", "aretha_franklin_lawsuit", "foyer_salty_air",
    "bellevue_stripe_curtain", "christmas_woofs_curtain", "watercolor_skull_bedding", "red_floor_pillow",
    "shimmering_green_kitchen", "icelandic_poppy_iphone_case", "move_or_be_moved_tee",
)  # fmt: skip
# Method -> what differs from retrack's values in config.unlearn (method.md: the official recipes).
RECIPES = {
    "siss": {"lam": 0.5, "siss_scale": 750.0},
    "siss_no_is": {"siss_scale": 750.0},
    "erasediff": {"erasediff_eta": 1e-2},
}


def get_config(method=None):
    base = _base()
    config = base.get_config()
    config.name = "stable_diffusion"
    config.targets = CONCEPTS
    config.checkpoint = "checkpoints/stable_diffusion/pretrained/stable_diffusion_v1_4"
    config.checkpoint_every = 30  # once, at the end: 30 steps are short; before its end a run's checkpoint is 10 GB, then 3.4
    config.save_float = True  # CLIP-IQA and the classifier take floats in the official code
    config.export = "unet"  # what a run leaves for diffusers: the UNet (3.4 GB); or pipeline (the whole folder), or none

    config.data.source = "concepts"
    config.data.dir = "datasets/sd"
    config.data.original_prompts = "original_prompts.json"  # below data.dir, or absolute
    config.data.modified_prompts = "modified_prompts.json"
    config.data.resolution = 512
    config.data.encode_batch_size = 4  # pictures the VAE encodes at once
    config.data.latent_seed = 0  # of the one draw of forgotten and neighbor latents that ReTrack keeps

    config.unlearn.num_steps = 30
    config.unlearn.batch_size = 16
    config.unlearn.accumulation = 16
    config.unlearn.learning_rate = 1e-5
    config.unlearn.b1 = 0.9
    config.unlearn.b2 = 0.999
    config.unlearn.weight_decay = 1e-2
    config.unlearn.lam = 0.5

    config.sampling.num_steps = 50
    config.sampling.num_images = 16  # of each of the two prompts
    config.sampling.batch_size = (
        4  # images at once; guidance doubles it, and attention over 64 x 64 latents takes 0.5 GB of each
    )
    config.sampling.guidance_scale = 7.5
    config.sampling.negative_prompt = ""

    config.eval.metrics = (
        "sscd_original", "sscd_modified", "clip_iqa_original", "clip_iqa_modified",
        "success_rate_original", "success_rate_modified",
    )  # fmt: skip
    config.eval.classifier = (
        "joblib"  # the shipped k-means, read without unpickling; or labels: refitted from the shipped labels
    )
    config.eval.grid_images = 32

    config.compute.remat = True
    config.compute.param_dtype = "float32"  # of the UNet in sampling; bfloat16 is half. Training is in float32 always
    return base.with_method(config, method, RECIPES)


def _base():
    # Config files are loaded by path, so that a copy of one outside this folder works as long as base.py lies beside it.
    spec = importlib.util.spec_from_file_location("base", Path(__file__).with_name("base.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
