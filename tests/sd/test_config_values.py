"""Fields that a run of Stable Diffusion has no use for are refused, not passed over in silence."""

import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.text_to_image import check_text_to_image
from tests.sd.tiny import tiny_config


@pytest.mark.parametrize(
    "field, value", [("held_out", 0.05), ("exclude", "red_circle"), ("channels", 3), ("skip_corrupt", True), ("copies", 2)]
)
def test_fields_of_other_sources_of_images(tmp_path, field, value):
    config = tiny_config(tmp_path)
    check_text_to_image(config)
    config.data[field] = value
    with pytest.raises(UserError, match=rf"config.data.{field} is {value!r}, which concepts have no use for"):
        check_text_to_image(config)
