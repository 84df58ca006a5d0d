"""Both experiments offer what the stages ask for, under the same names and arguments."""

import inspect

import pytest

from retrack_jax.problem.experiment import Experiment
from retrack_jax.problem.pixels import PixelExperiment
from retrack_jax.problem.text_to_image import TextToImageExperiment

ASKED = [name for name, _ in inspect.getmembers(Experiment, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("kind", [PixelExperiment, TextToImageExperiment])
@pytest.mark.parametrize("name", ASKED)
def test_each_offers_what_is_asked_for(kind, name):
    asked, offered = (inspect.signature(getattr(each, name)).parameters for each in (Experiment, kind))
    rest = [parameter for parameter in offered.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    missing = set(asked) - set(offered)
    assert not missing or rest, missing
    assert set(offered) - set(asked) <= {parameter.name for parameter in rest}


def test_something_is_asked_for():
    assert {"target", "gather", "forget_data", "sample", "evaluate", "pictures"} <= set(ASKED)
