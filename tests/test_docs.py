"""The documents name only what exists: files, functions, modules, fields of the config, each other; and their examples run."""

import importlib
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from retrack_jax import api, parallel
from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.checkpoints.diffusers_import import FAMILIES
from retrack_jax.config.reading import default_config, read_config
from retrack_jax.data.dataset import image_set, pixels_to_model
from retrack_jax.data.sources.load import load_images
from retrack_jax.data.sources.table import SOURCES
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.evaluate.images import EVALUATORS
from retrack_jax.evaluate.results import evaluate
from retrack_jax.evaluate.task import Subject
from retrack_jax.metrics.membership import denoising_losses
from retrack_jax.problem.conditioning import remembered_conditions
from retrack_jax.problem.target import make_target
from retrack_jax.sampling import SAMPLERS, initial_noise, make_sampler, sample
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests import toys

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
NOT_THE_CHANGELOG = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]  # which names what is gone
# A path in a document starts from one of these.
BASES = [ROOT / name for name in (".", "retrack_jax", "configs", "launch", "docs", "tests")]
_FILE = r"(?:\w+/)*\w+\.(?:py|sh|sbatch)"
_PATH = re.compile(rf"(?<![\w/.*-])((?:retrack_jax|tests|configs|docs|launch)/[\w./-]*\w|{_FILE})(?![\w*{{])")
_PLACEHOLDER = re.compile(r"(^|/)(NAME|FILE)\.py$")
_MODULE = re.compile(r"(?<![\w/.@])((?:retrack_jax|tests)(?:\.[a-zA-Z]\w*)+)")
_FIELD = re.compile(r"(?<![\w.])config((?:\.[a-z_0-9]+|\.METHOD)+)(?![\w(*])")
_BENCHMARK = re.compile(r"-m (tests\.benchmarks[\w.]*)((?:[ \\n]+(?!python|`)[^\s`;,]+)*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# `path.py`: `name` and `name` in `path.py`.
_NAMES = (re.compile(rf"`({_FILE})`: `([\w.]+)`"), re.compile(rf"`(?P<name>[\w.]+)` in `(?P<file>{_FILE})`"))
each_document = pytest.mark.parametrize("document", NOT_THE_CHANGELOG, ids=lambda path: path.name)


def read(document: Path) -> str:
    """The text of a document, with `a.{b,c}` spelled out as `a.b a.c`."""

    def spelled_out(found: re.Match) -> str:
        return " ".join(found[1] + part + found[3] for part in found[2].split(","))

    return re.sub(r"([\w./]+)\{([\w,]+)\}([\w./]*)", spelled_out, document.read_text())


def located(path: str) -> Path | None:
    return next((base / path for base in BASES if (base / path).exists()), None)


def is_importable(dotted: str) -> bool:
    """Whether `dotted` is a module, or a name in one."""
    if any((ROOT / f"{dotted.replace('.', '/')}{ending}").exists() for ending in ("", ".py")):
        return True
    module, _, name = dotted.rpartition(".")
    return is_importable(module) and hasattr(importlib.import_module(module), name)


def is_field(dotted: str, config: ConfigDict) -> bool:
    node = config
    for name in dotted.strip(".").replace("METHOD", "retrack").split("."):
        if not isinstance(node, ConfigDict) or name not in node:
            return False
        node = node[name]
    return True


def anchors(document: Path) -> set[str]:
    """The anchors that the headings of a document have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_files_exist(document):
    paths = set(_PATH.findall(read(document)))
    assert not sorted(path for path in paths if not _PLACEHOLDER.search(path) and located(path) is None)


@each_document
def test_functions_and_tables_are_where_the_document_says(document):
    text, missing = document.read_text(), []
    pairs = _NAMES[0].findall(text) + [(found["file"], found["name"]) for found in _NAMES[1].finditer(text)]
    for path, name in pairs:
        code = located(path).read_text()
        defined = {part: rf"^\s*(def|class) {part}\b|^{part}\b.* = " for part in name.split(".")}
        missing += [f"{part} in {path}" for part, pattern in defined.items() if not re.search(pattern, code, re.MULTILINE)]
    assert not missing


def test_the_walks_and_the_table_of_what_to_touch_are_checked():
    walks, touch = ((ROOT / "docs" / name).read_text() for name in ("architecture.md", "extending.md"))
    assert len(_NAMES[0].findall(walks)) > 20 and len(list(_NAMES[1].finditer(touch))) >= 4


@each_document
def test_modules_and_their_names_exist(document):
    assert not sorted(name for name in set(_MODULE.findall(read(document))) if not is_importable(name))


@pytest.mark.parametrize("document", [*NOT_THE_CHANGELOG, *ROOT.glob("docs/results/*.json")], ids=lambda path: path.name)
def test_benchmarks_have_the_flags_that_are_shown(document):
    for module, rest in _BENCHMARK.findall(document.read_text()):
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        source = source if source.exists() else ROOT.joinpath(*module.split("."), "__main__.py")
        known = source.read_text()
        assert not [flag for flag in re.findall(r"--[a-z_-]+", rest) if flag not in known], (module, rest)


@each_document
def test_fields_of_the_config_exist(document):
    of_an_example = {".json", ".md", ".unlearn.hush.weight"}
    config, names = default_config(), set(_FIELD.findall(read(document))) - of_an_example
    assert not sorted(f"config{name}" for name in names if not is_field(name, config))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in _LINK.findall(document.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = document.parent / path if path else document
            assert target.exists() and (not anchor or anchor in anchors(target)), link


def test_generated_documents_are_current():
    """docs/config.md is what the options say, and every table is what docs/results/ says; `make docs` writes them anew."""
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    assert not [path.name for path, text in pages.items() if path.read_text() != text]


def test_what_documents_say_of_results_is_what_results_say():
    """Every quote of docs/results/ stands in a document, and every result is shown or quoted."""
    result = runpy.run_path(str(ROOT / "docs" / "generate.py"))["result"]
    texts = [document.read_text() for document in DOCUMENTS]
    words = [" ".join(text.split()) for text in texts]
    for path in (ROOT / "docs" / "results").glob("*.json"):
        quoted, shown = result(path.stem).get("quoted", []), f"<!-- table {path.stem}"
        assert not [quote for quote in quoted if not any(quote in text for text in words)], path.name
        assert quoted or any(re.search(rf"{shown}\b", text) for text in texts), path.name


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def tables():
    """The public tables, which the examples add to, as they were when the test ends."""
    before = [(table, dict(table)) for table in (METHODS, SAMPLERS, SOURCES, FAMILIES)]
    evaluators = list(EVALUATORS)
    yield
    EVALUATORS[:] = evaluators
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture
def extending(tables) -> dict:
    """The names that the examples of docs/extending.md define."""
    names = {"__name__": "extending"}
    for block in blocks("docs/extending.md"):
        exec(block, names)
    return names


@pytest.mark.parametrize("page", ["flows", "edm"])
def test_the_examples_of_flows_and_of_edm_run(page):
    (block,) = blocks(f"docs/{page}.md")
    names = {"__name__": "flows"}
    exec(block, names)
    assert 0 < toys.relative(names["forgotten"], names["params"]) < 1


def test_the_method_of_the_guide_trains_by_its_option(extending):
    common = dict(method="hush", rng=jax.random.key(0), num_steps=2, batch_size=8)
    data = toys.ToyNet().apply, toys.params(), toys.schedule(), toys.images(20), toys.images(2, seed=1)
    weak, strong = (api.unlearn(*data, **common, weight=weight) for weight in (0.01, 0.5))
    assert toys.relative(weak, strong) > 1e-6
    config = default_config()
    config.data.source, config.method, config.unlearn.hush.weight = "digits_tshirt", "hush", 0.25
    assert read_config(config).recipe("hush").own.weight == 0.25


def test_the_metric_of_the_guide(extending, tmp_path):
    samples = np.full((3, 4, 4, 1), 7, np.uint8)
    samples[:, :2] = 207
    found = evaluate(EVALUATORS, ("contrast",), None, Subject({}, samples), tmp_path / "metrics.json")
    assert found.values == {"contrast": pytest.approx(100 / 255)}


def test_the_sampler_of_the_guide_is_ddim_without_clipping(extending):
    schedule = toys.schedule().replace(clip_sample=False)
    rngs = jax.random.split(jax.random.key(0), 3)

    def drawn(name):
        def eps_fn(x, t):
            return 0.5 * jnp.tanh(x) + jnp.sin(t.astype(jnp.float32))[:, None, None, None]

        return sample(eps_fn, initial_noise(rngs, toys.SHAPE), rngs, make_sampler(name, schedule, 50))

    np.testing.assert_allclose(drawn("own_euler"), drawn("ddim"), rtol=2e-5, atol=2e-3)


def test_the_source_of_the_guide(extending):
    images = load_images({"source": "stripes"})
    assert len(images) == 80 and images.labels.max() == 7


def test_the_family_of_the_guide_is_exported_and_imported(extending, tmp_path):
    module = extending["PlainDenoiser"](in_channels=1, width=4)
    params = module.init(jax.random.key(0), *FAMILIES["PlainDenoiser"].inputs(module))["params"]
    export_diffusers(tmp_path / "model", module, params)
    read, read_params = import_diffusers(tmp_path / "model")
    assert read == module
    jax.tree.map(np.testing.assert_array_equal, params, read_params)


def test_the_conditioning_of_the_guide_reaches_the_network(extending):
    conditioning = extending["OneLabel"](7)
    table = conditioning.table(None)

    def eps_fn(params, x_t, t, label):
        return x_t * params["of_label"][label][:, None, None, None]

    optimizer = make_optimizer(learning_rate=0.1, b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=0.0)
    step = make_train_step(METHODS["vanilla"], eps_fn, StepOptions(t_max=1000))
    batch = {"remain": {"pixels": toys.images(8)}, "remain_index": np.arange(8, dtype=np.int32)}
    state = parallel.replicate(create_state({"of_label": jnp.ones(10)}, optimizer))
    shared = parallel.replicate(Shared(schedule=Schedule.create(), conditions=table))
    state, _ = step(state, parallel.shard_batch(batch), shared, jax.random.key(0))
    changed = np.flatnonzero(np.asarray(state.params["of_label"]) != 1.0)
    assert changed.tolist() == [7]
    images = image_set("toys", toys.images(4), "abcd")
    target = make_target("a", images, np.array([0]), np.arange(1, 4))
    conditions = remembered_conditions(conditioning, target, [(images, target.unique)])
    params, schedule = {"of_label": jnp.arange(10.0)}, Schedule.create()
    found = denoising_losses(
        eps_fn, params, schedule, pixels_to_model(images.images[:1]), jax.random.key(0), conditions=conditions
    )
    alone = denoising_losses(lambda p, x, t: 7.0 * x, {}, schedule, pixels_to_model(images.images[:1]), jax.random.key(0))
    np.testing.assert_allclose(found, alone, rtol=1e-5)
