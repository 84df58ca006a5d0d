"""Fills the templates of the reports: each page is one HTML file with its style inside, no script and no network."""

import functools
from pathlib import Path


@functools.cache
def _templates():
    import jinja2  # imported here, so that the package loads quickly

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template: str, **values) -> str:
    """Returns the text of `templates/TEMPLATE` with `values` filled in and escaped for HTML; a missing value is an error."""
    return _templates().get_template(template).render(values) + "\n"


def standalone_svg(svg: str) -> str:
    """Returns the text of an `.svg` file: a chart with its style inside and the background of the page."""
    opening, body = svg.split(">", 1)
    return render("chart.svg", opening=f"{opening}>", body=body)
