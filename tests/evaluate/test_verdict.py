"""The verdict: each outcome from losses with a known answer, its error rates, and a whole run that tells it everywhere."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from retrack_jax import files
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.cli.flags import parse
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.data.dataset import image_set
from retrack_jax.evaluate.turned import turned_copies
from retrack_jax.evaluate.verdict import FEWEST, MARGIN, Losses, _log_noise, memory, verdict
from retrack_jax.main import main
from retrack_jax.problem.judged import _chosen
from retrack_jax.problem.judged import judged as judged_images
from retrack_jax.problem.judged import losses as losses_of
from retrack_jax.problem.problem import build_problem
from retrack_jax.problem.target import make_target
from retrack_jax.report.verdict import box, file_rows, in_words
from tests.tiny import flags

NOISES = 64
_RISE = np.exp(np.linspace(1.0, -3.0, NOISES))  # losses fall along the schedule, as a network's do


def draws(levels, rng, noise=0.2):
    """Losses `[N, NOISES]` of images whose mean losses are about `levels`."""
    shape = (len(levels), NOISES)
    return np.asarray(levels)[:, None] * _RISE / _RISE.mean() * np.exp(noise * rng.standard_normal(shape))


def losses(
    rng,
    count,
    memory=1.0,
    kind=1.0,
    is_known=False,
    num_remaining=64,
    num_held_out=0,
    is_random=False,
    spread=0.15,
    of_turned=0.15,
    noise=0.2,
):
    """Losses before unlearning: forgotten images have `kind` times the others' loss if unseen, and `memory` of that if not.

    A turned copy has 1.4 times the loss of its image, were that unseen. If `kind` is not 1, other images turned by a quarter have
    as much as their copies, and so have the forgotten ones unless the model `is_known` to know their kind.

    Returns (losses, levels of all images).
    """
    size = count + num_remaining + num_held_out
    levels = 6.0 * np.exp(spread * rng.standard_normal(size))
    levels[:count] *= kind
    turned = 1.4 * levels * np.exp(of_turned * rng.standard_normal(size))
    sideways = None
    if kind != 1.0:
        turned[:count] /= 1.0 if is_known else 1.4
        others = 20.0 * np.exp(spread * rng.standard_normal(size - count))
        sideways = others, others * np.exp(of_turned / 2 * rng.standard_normal(size - count))
        sideways = tuple(draws(each, rng, noise) for each in sideways)
    seen = levels.copy()
    seen[:count] *= memory
    return Losses(
        names=[f"file{i}" for i in range(count)],
        num_forgotten=count,
        num_remaining=num_remaining,
        before=draws(seen, rng, noise),
        turned=draws(turned, rng, noise),
        usable=np.ones(size, bool),
        is_random=is_random,
        sideways=sideways,
    ), levels


def after(before, count, rng, times=1.0, others=1.0, noise=0.02):
    """Losses after unlearning under the same draws: those of the forgotten images `times`, the others' `others` times as high."""
    factor = np.where(np.arange(len(before)) < count, times, others)
    return before * factor[:, None] * np.exp(noise * rng.standard_normal((len(before), 1)))


def judged(known, now, copies=1.0):
    """The verdict if unlearning left the losses of turned copies as they were, or made them `copies` times as high."""
    return verdict(known, now, copies * known.turned[known.forgotten])


@pytest.mark.parametrize("kind", [1.0, 4.0], ids=["same kind", "another kind"])
@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize(
    ("times", "outcome"), [(1.0, "unchanged"), (1.3, "unchanged"), (8.0, "forgotten"), (80.0, "singled out")]
)
def test_a_remembered_image(kind, count, times, outcome):
    """The loss before is an eighth of an unseen image's, as of the T-shirt among digits."""
    rng = np.random.default_rng(count)
    known, _ = losses(rng, count, memory=1 / 8, kind=kind)
    found = judged(known, after(known.before, count, rng, times))
    assert found["remembered_before"] is True and found["forgotten"] == outcome and found["kept"] == "kept"
    assert "the model remembers" in found["why"] and "\n" not in found["why"]
    assert [file["name"] for file in found["files"]] == known.names
    assert found["files"][0]["after"] / found["files"][0]["before"] == pytest.approx(times, rel=0.1)


NOT_REMEMBERED = [(1.0, "unchanged"), (0.5, "unchanged"), (1.1, "unknown"), (4.0, "singled out")]


@pytest.mark.parametrize(
    ("kind", "times", "outcome"),
    [(1.0, 1.25, "forgotten"), *((kind, *case) for kind in (1.0, 4.0) for case in NOT_REMEMBERED)],
)
def test_an_image_that_was_not_remembered(kind, times, outcome):
    """A rise by less than the reference resolves is neither "unchanged" nor "forgotten"."""
    rng = np.random.default_rng(5)
    known, _ = losses(rng, 20, kind=kind)
    found = judged(known, after(known.before, 20, rng, times))
    assert found["remembered_before"] is False and found["forgotten"] == outcome


def test_a_model_that_is_broken_for_all_images_has_forgotten_nothing_in_particular():
    rng = np.random.default_rng(11)
    known, _ = losses(rng, 64)
    found = judged(known, after(known.before, 64, rng, 20.0, 20.0))
    assert (found["forgotten"], found["kept"]) == ("unknown", "damaged")
    assert judged(known, after(known.before, 64, rng, 0.7, 0.7))["forgotten"] == "unchanged"  # one that was trained longer


def test_an_image_of_another_kind_is_not_compared_with_the_others():
    """It has four times the others' loss before and after, which neither hides a memory nor singles it out."""
    rng = np.random.default_rng(0)
    known, _ = losses(rng, 1, memory=1 / 4, kind=4.0)
    assert known.before[0].mean() == pytest.approx(known.before[1:].mean(), rel=0.35)  # as ordinary as can be
    assert memory(known).remembered is True
    assert judged(known, after(known.before, 1, rng, 4.0))["forgotten"] == "forgotten"


def exactly_unseen(known, memory):
    """`known` with a forgotten image whose turned copy has exactly the loss that the image would have if it were unseen."""
    turned = known.turned.copy()
    turned[0] *= known.before[0].mean() / memory / turned[0].mean()
    return replace(known, turned=turned)


@pytest.mark.parametrize(
    ("level", "outcome"), [(0.4, "unchanged"), (0.8, "forgotten"), (1.0, "forgotten"), (1.1, "forgotten"), (1.8, "singled out")]
)
@pytest.mark.parametrize("copies", [1.0, 1.6], ids=["copies as unseen", "copies harder to a model that remembers"])
def test_an_image_of_a_kind_that_the_model_does_not_know(level, outcome, copies):
    """Upright it is as hard as turned. If it is remembered, the copies may be harder than they are once it is forgotten."""
    rng = np.random.default_rng(13)
    known = exactly_unseen(losses(rng, 1, memory=1 / 8, kind=8.0, spread=0.1, of_turned=0.1)[0], 1 / 8)
    known.turned[0] *= copies
    now = after(known.before, 1, rng, 8 * level)
    assert judged(known, now, copies=1 / copies)["forgotten"] == outcome
    assert judged(known, now, copies=3.0) == judged(known, now)  # a model that got worse is no reference


@pytest.mark.parametrize("is_known", [True, False])
def test_the_reference_of_another_kind_lies_between_known_and_unknown_kinds(is_known):
    """Equation 8: the unseen loss is anywhere from 1/1.4 of the copy's to all of it."""
    rng = np.random.default_rng(14)
    known = exactly_unseen(losses(rng, 1, memory=1 / 8, kind=8.0, is_known=is_known, spread=0.1, of_turned=0.1)[0], 1 / 8)
    of_copy = np.log(known.turned[0].mean())
    easier = np.log(known.before[1:].mean(axis=1) / known.turned[1:].mean(axis=1))
    sideways = np.log(known.sideways[0].mean(axis=1) / known.sideways[1].mean(axis=1))
    found = memory(known)
    assert np.log(found.unseen) == pytest.approx(of_copy + (easier.mean() + sideways.mean()) / 2)
    variance = (easier.var(ddof=1) + sideways.var(ddof=1)) / 2 + (easier.mean() - sideways.mean()) ** 2 / 12
    assert found.single == pytest.approx(np.sqrt(variance * (1 + 1 / 64) + _log_noise(known.turned[:1]) ** 2))
    assert judged(known, after(known.before, 1, rng, 8.0))["forgotten"] == "forgotten"

    # Images that are not square are not turned by a quarter.
    found = memory(replace(known, sideways=None))
    assert np.log(found.unseen) == pytest.approx(of_copy + easier.mean() / 2)


def test_the_line_says_what_unseen_images_have_by_now():
    """A range from before unlearning would contradict the verdict if turned copies, or all images, became easier."""
    rng = np.random.default_rng(16)
    known, _ = losses(rng, 1, memory=1 / 8, kind=8.0)
    unseen = memory(known).unseen
    found = judged(known, after(known.before, 1, rng, 8.0), copies=0.5)
    assert f"unseen {0.5 * unseen:.3g} by now" in found["why"]
    assert "by now" not in judged(known, after(known.before, 1, rng, 8.0, others=1.01), copies=1.5)["why"]


def test_what_is_still_remembered_is_so_in_a_model_that_got_worse_for_all_images():
    rng = np.random.default_rng(17)
    known, _ = losses(rng, 1, memory=1 / 8)
    found = judged(known, after(known.before, 1, rng, 1.2, others=1.2))
    assert (found["forgotten"], found["kept"]) == ("unchanged", "damaged")


def test_held_out_images_show_what_remaining_ones_hide():
    """All training images are a tenth easier than unseen ones: among themselves nothing shows."""
    rng = np.random.default_rng(1)
    known, _ = losses(rng, 64, memory=0.85, num_held_out=64, is_random=True)
    known.before[64:128] *= 0.85
    assert memory(known).remembered is True
    blind = Losses(**{**vars(known), "before": known.before[:128], "turned": known.turned[:128], "usable": known.usable[:128]})
    assert memory(blind).remembered is False
    found = judged(known, after(known.before, 64, rng, 1 / 0.85))
    assert found["forgotten"] == "forgotten" and found["kept"] == "kept"


def test_false_alarms_are_rare():
    """Of models that remember nothing and change nothing, about one in a hundred is called something else."""
    rng = np.random.default_rng(2)
    alarms = {"remembered": 0, "changed": 0, "not kept": 0}
    trials = 400
    for trial in range(trials):
        count, kind, is_random = ((1, 1.0, False), (1, 4.0, False), (64, 1.0, True))[trial % 3]
        known, _ = losses(rng, count, kind=kind, is_random=is_random)
        found = judged(known, after(known.before, count, rng))
        alarms["remembered"] += found["remembered_before"] is not False
        alarms["changed"] += found["forgotten"] != "unchanged"
        alarms["not kept"] += found["kept"] != "kept"
    assert all(count <= 0.025 * trials for count in alarms.values()), alarms


@pytest.mark.parametrize(
    ("others", "kept"),
    [(0.9, "kept"), (1.0, "kept"), (1.0 + MARGIN, "unknown"), (1.0 + 1.5 * MARGIN, "damaged"), (40.0, "damaged")],
)
def test_remaining_images(others, kept):
    rng = np.random.default_rng(10)
    known, _ = losses(rng, 1)
    assert judged(known, after(known.before, 1, rng, others=others))["kept"] == kept


@pytest.mark.parametrize("num_remaining", [1, FEWEST - 1])
def test_too_few_images_to_compare_with_decide_nothing(num_remaining):
    rng = np.random.default_rng(4)
    known, _ = losses(rng, 1, memory=1 / 8, num_remaining=num_remaining)
    found = judged(known, after(known.before, 1, rng, 8.0))
    assert (found["remembered_before"], found["forgotten"], found["kept"]) == (None, "unknown", "unknown")
    assert f"{num_remaining} other images" in found["why"]


def test_images_that_differ_too_much_decide_nothing():
    """Unseen images lie within a factor of 5 each way: a loss like theirs is no sign that nothing is remembered."""
    rng = np.random.default_rng(6)
    known, _ = losses(rng, 1, spread=1.0, of_turned=1.0)
    found = judged(known, after(known.before, 1, rng, 2.0))
    assert found["remembered_before"] is None and found["forgotten"] == "unknown"


def test_an_image_that_is_the_same_upside_down_has_no_reference():
    rng = np.random.default_rng(7)
    known, _ = losses(rng, 1, memory=1 / 8)
    known.usable[0] = False
    found = judged(known, after(known.before, 1, rng, 8.0))
    assert found["remembered_before"] is None and found["forgotten"] == "unknown" and found["kept"] == "kept"
    assert judged(known, after(known.before, 1, rng))["forgotten"] == "unchanged"  # no rise is known without a reference


def test_turned_copies():
    rng = np.random.default_rng(8)
    images = rng.standard_normal((4, 8, 8, 3)).astype(np.float32)
    images[1] += images[1, ::-1]
    images[1] /= 2  # the same upside down, but not rotated
    images[2] = images[2] + images[2, ::-1] + images[2, :, ::-1] + images[2, ::-1, ::-1]  # the same in every way
    images[3] = 0.5  # one color
    copies, usable = turned_copies(images)
    np.testing.assert_array_equal(usable, [True, True, False, False])
    np.testing.assert_array_equal(copies[1], images[1, ::-1, ::-1])
    np.testing.assert_allclose(np.sort(copies, axis=None), np.sort(images, axis=None))


def test_copies_are_measured_once_and_never_taken_for_others():
    """Held-out images may hold copies of a forgotten one, and remaining images copies of each other."""
    pictures = np.random.default_rng(12).integers(0, 256, (12, 4, 4, 1), np.uint8)
    rows = np.array([0, 0, 0, *range(1, 10), 1, 1])  # three copies of the forgotten image, three of one that remains
    images = image_set("toys", pictures[rows], [str(i) for i in range(len(rows))])
    target = make_target("0+1+2", images, np.arange(3), np.arange(3, len(rows)))
    assert list(_chosen(images, target.unique, 64)) == [target.unique[0]]
    remaining = _chosen(images, target.remain, 64, target)
    assert sorted(rows[remaining]) == list(range(1, 10))
    assert len(_chosen(images, target.remain, 5, target)) == 5
    held_out = image_set("held out", pictures[[0, 10, 0, 11]], ["a", "b", "c", "d"])
    assert sorted(_chosen(held_out, np.arange(4), 64, target)) == [1, 3]


def test_words_and_colors():
    rng = np.random.default_rng(9)
    known, _ = losses(rng, 2, memory=1 / 8)
    cases = ((1.0, 1.0, "worse", "better"), (8.0, 1.0, "better", "better"), (80.0, 9.0, "worse", "worse"))
    for times, others, word, kept in cases:
        found = judged(known, after(known.before, 2, rng, times, others, noise=0.0))
        assert [answer for answer, _ in box(found)["answers"]] == [word, kept]
        assert found["why"] in in_words(found)
        assert {row["word"] for row in file_rows(found)} == ({word} if times > 1 else {""})
    fresh, _ = losses(rng, 2)
    unchanged = judged(fresh, fresh.before)
    assert unchanged["forgotten"] == "unchanged" and box(unchanged)["answers"][0][0] == ""  # no color: nothing was achieved


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("verdict")
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(workdir)]) == 0
    return workdir


def test_a_run_tells_its_verdict_everywhere(finished, capsys):
    run = finished / "retrack" / "seed0-label_10"
    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics["verdict"]
    assert list(found) == ["forgotten", "kept", "remembered_before", "why", "files"]
    # Of 8 images the network has learned nothing by heart in 6 steps, and 4 steps at a small rate change next to nothing.
    assert found["remembered_before"] is False and found["kept"] == "kept"
    assert len(found["files"]) == 1 and found["files"][0]["name"].startswith("tshirt")
    page, card = (run / "report.html").read_text(), (run / "diffusers" / "README.md").read_text()
    assert "Remaining images are kept." in page and all(line in page for line in box(found)["why"])
    assert in_words(found) in card
    assert found["files"][0]["name"] in page
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(finished)]) == 0
    assert f"verdict: {in_words(found)}" in capsys.readouterr().out


def test_a_finished_run_without_a_verdict_gets_it(finished):
    run = finished / "retrack" / "seed0-label_10"
    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics.pop("verdict")
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "losses.npz").unlink()
    (finished / "pretrained" / "losses-label_10.npz").unlink()
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(finished)]) == 0
    assert json.loads((run / "metrics.json").read_text())["verdict"] == found


def test_other_images_are_turned_by_a_quarter_for_a_target_of_another_kind(finished, tmp_path):
    """The kept losses say that the target's copy is harder than the others': the network's own on the others turned follow."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = tmp_path / "pretrained"
    assert not (before / "sideways-label_10.npz").exists()
    kept = files.read_npz(before / "losses-label_10.npz")
    kept["turned"][0] *= 4
    files.write_npz(before / "losses-label_10.npz", **kept)
    run = tmp_path / "retrack" / "seed0-label_10"
    (run / "metrics.json").unlink()
    old = files.read_npz(run / "losses.npz")
    files.write_npz(run / "losses.npz", after=old["after"])  # as a workdir has it whose runs were judged before copies were
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(tmp_path)]) == 0

    config, _ = parse(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(tmp_path)])
    problem = build_problem(complete(read_config(config)))
    chosen = judged_images(problem, problem.target("label:10"))
    sideways = np.rot90(chosen.images[1 : 1 + chosen.num_remaining], axes=(1, 2))
    turned, usable = turned_copies(sideways)
    _, params = import_diffusers(before / "diffusers")
    found = files.read_npz(before / "sideways-label_10.npz")
    np.testing.assert_allclose(files.read_npz(run / "losses.npz")["turned"], old["turned"], rtol=1e-6)
    for name, pictures in (("before", sideways), ("turned", turned)):
        expected = losses_of(problem, params, pictures[usable], None, "")
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)
