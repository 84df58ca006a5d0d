"""Stable Diffusion v1.4: forget a training picture that the model reproduces for a prompt. 48 concepts, each one run.

    launch/download.sh configs/stable_diffusion.py                                      # checkpoint, concepts, feature networks
    python -m retrack_jax.main --config=configs/stable_diffusion.py                     # ReTrack, 48 runs
    python -m retrack_jax.main --config=configs/stable_diffusion.py:siss --config.targets=bjork_vulnicura_spotify,willy_wonka

Hardware: one accelerator of 24 GB for ReTrack, on paper (docs/measurements/text-to-image.md has the arithmetic). Time and
score to expect: we have not measured them on the real model. The tests run all of this on a toy and compare the networks with
diffusers'.
"""

from retrack_jax.config.base import base_config, with_method

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


def get_config(method=None):
    config = base_config("stable_diffusion", pretrained_here=False)
    config.targets = CONCEPTS
    config.checkpoint = "checkpoints/stable_diffusion/pretrained/stable_diffusion_v1_4"
    config.checkpoint_every = 30  # once, at the end: a checkpoint before the end has 10 GB, the last one 3.4
    config.save_float = True  # CLIP-IQA and the classifier take floats in the official code

    config.data.source = "concepts"
    config.data.dir = "datasets/sd"
    config.data.resolution = 512

    config.unlearn.num_steps = 30
    config.unlearn.batch_size = 16
    config.unlearn.accumulation = 16
    config.unlearn.learning_rate = 1e-5
    config.unlearn.b1 = 0.9
    config.unlearn.b2 = 0.999
    config.unlearn.weight_decay = 1e-2
    config.unlearn.retrack.lam = 0.5
    config.unlearn.siss.scale = config.unlearn.siss_no_is.scale = 750.0
    config.unlearn.erasediff.eta = 1e-2

    config.sampling.num_steps = 50
    config.sampling.num_images = 16  # of each of the two prompts
    config.sampling.batch_size = 4  # guidance doubles it, and attention over 64 x 64 latents takes 0.5 GB of each

    config.eval.metrics = (
        "sscd_original", "sscd_modified", "clip_iqa_original", "clip_iqa_modified",
        "success_rate_original", "success_rate_modified",
    )  # fmt: skip
    config.eval.grid_images = 32

    config.compute.remat = True
    return with_method(config, method)
