"""The look of a report: one HTML file with its style inside, no script, no network; light, dark and paper."""

import html
import json
from collections.abc import Mapping, Sequence

# Text and chart colours keep 4.5:1 and 3:1 against their background in both themes.
_LIGHT = """
  --paper: #ffffff; --panel: #f6f7f9; --line: #dde1e6; --ink: #1f2328; --soft: #59636e; --accent: #0b62c4; --mark: #d9480f;
  --good: #1a7f37; --bad: #b35900; --shade: #eef4fb;
  --m-retrack: #0b62c4; --m-siss: #2b7a3d; --m-siss_no_is: #0b7285; --m-erasediff: #c92a2a; --m-neggrad: #8430a0;
  --m-vanilla: #ad5700; --m-retrain: #1f2328; --m-pretrained: #6a737d;"""
_FONTS = """
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;"""
_DARK = """
  --paper: #101418; --panel: #181d23; --line: #2f363f; --ink: #e6eaef; --soft: #9aa5b1; --accent: #6cb2ff; --mark: #ff8f4d;
  --good: #5cc777; --bad: #ffb454; --shade: #16232f;
  --m-retrack: #6cb2ff; --m-siss: #6fd088; --m-siss_no_is: #5fd3e3; --m-erasediff: #ff8a8a; --m-neggrad: #d79bf0;
  --m-vanilla: #ffb866; --m-retrain: #f0f3f6; --m-pretrained: #a5afba;"""
_METHODS = ("retrack", "siss", "siss_no_is", "erasediff", "neggrad", "vanilla", "retrain", "pretrained")

_CHART = """
.chart { display: block; width: 100%; height: auto; overflow: visible; font-family: var(--sans); }
.chart .grid { stroke: var(--line); } .chart .base, .chart .mark { stroke: var(--soft); }
.chart text { fill: var(--soft); } .chart .tick { font-size: 11.5px; } .chart .axis { font-size: 13px; }
.chart .title { font-size: 14px; font-weight: 600; fill: var(--ink); } .chart .note { font-size: 12px; }
.chart .line, .chart .raw { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .raw { stroke-width: 1; opacity: .32; } .chart .dot { fill: var(--accent); }
.chart .of-method { fill: none; stroke: var(--c, var(--soft)); stroke-width: 2; stroke-linejoin: round; }
.chart .gold { stroke: var(--m-retrain); stroke-dasharray: 5 5; opacity: .5; }
.chart .error { fill: none; stroke-width: 1.6; opacity: .75; stroke: var(--c, var(--soft)); }
.chart .point { fill: var(--c, var(--soft)); stroke: var(--paper); stroke-width: 1.5; }
.chart .point.hollow { fill: var(--paper); stroke: var(--c, var(--soft)); stroke-width: 2.2; }
.chart .label { font-size: 13px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px;
  stroke-linejoin: round; fill: var(--c, var(--soft)); } .chart .strong { font-weight: 700; }
""" + "".join(f".m-{m} {{ --c: var(--m-{m}); }}" for m in _METHODS)

_PAGE = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .35rem; }
figure h3 { margin-top: 0; }
p { margin: .4rem 0 .9rem; max-width: 46rem; } .soft, figcaption, .lead { color: var(--soft); }
.lead { font-size: 1.05rem; }
a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem;
  margin: 1.4rem 0 0; padding: 0; list-style: none; }
.tiles li { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .85rem 1rem; }
.tiles .name { color: var(--soft); font-size: .9rem; }
.tiles .value { font-size: 1.45rem; font-weight: 650; line-height: 1.35; }
.tiles .from { color: var(--soft); font-weight: 400; font-size: 1.05rem; }
.tiles .foot { font-size: .85rem; color: var(--soft); }
.better { color: var(--good); } .worse { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; font-size: .88rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tbody th { font-weight: 600; }
td.wrap, th.wrap { white-space: normal; text-align: left; }
td small, th small { display: block; font-weight: 400; color: var(--soft); white-space: normal; }
tr.strong > * { background: var(--shade); } tr.reference th, tr.reference td { color: var(--soft); }
tr.strong > :first-child { box-shadow: inset 3px 0 0 var(--m-retrack); padding-left: .7rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1.4rem 2rem; margin: 1rem 0; } .pair img { width: 100%; max-width: 40rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: 1.6rem 1.6rem; margin: 1rem 0; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .9rem; margin-top: .4rem; }
.rows { display: grid; gap: 1.3rem; margin: 1rem 0; } .rows img { width: 100%; }
img { max-width: 100%; height: auto; display: block; } img.pixels { image-rendering: pixelated; }
.key { display: inline-block; width: .95em; height: .95em; border: 3px solid var(--mark); border-radius: 2px;
  vertical-align: -.12em; margin-right: .3em; }
.strip { display: flex; flex-wrap: wrap; gap: .55rem; align-items: flex-start; margin: .8rem 0 1.2rem;
  padding: 0; list-style: none; }
.strip li { text-align: center; font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.strip li.first { margin-right: .9rem; } .strip li.first img { outline: 3px solid var(--mark); outline-offset: 2px; }
.strip img { width: 4.4rem; margin-bottom: .35rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; font: .85rem/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .9em var(--mono); }
table.facts th, table.facts td { padding-top: .28rem; padding-bottom: .28rem; font-size: .92rem; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { text-align: left; font-weight: 500; color: var(--soft); padding-left: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print {
  main { max-width: none; padding: 0; } body { font-size: 10.5pt; } h2 { margin-top: 1.4rem; break-after: avoid; }
  figure, tr, .tiles li, .strip { break-inside: avoid; } .scroll { overflow: visible; } th, td { padding: .3rem .45rem; }
  .tiles li, tr.strong > *, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
# Paper is white whatever the screen's theme: the dark colours are for screens only.
_THEME = f":root {{{_FONTS}{_LIGHT} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK} }} }}\n"


def escape(value) -> str:
    """Returns `value` as text that is safe between tags and inside quoted attributes."""
    return html.escape(str(value))


def page(title: str, body: str) -> str:
    """Returns a whole HTML document with `body` in its `<main>`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_THEME}{_PAGE}{_CHART}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def standalone_svg(svg: str) -> str:
    """Returns a chart as an `.svg` file's text, with its style inside and the page's background."""
    style = f"<style>{_THEME}{_CHART}.paper {{ fill: var(--paper); }}</style>"
    opened, body = svg.split(">", 1)
    return f'{opened} xmlns="http://www.w3.org/2000/svg">{style}<rect class="paper" width="100%" height="100%"/>{body}\n'


def section(title: str, *parts: str) -> str:
    """Returns a headed section, or nothing where no part holds anything."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def figure(source: str, alt: str, *, title: str = "", caption: str = "", pixels: bool = True) -> str:
    """Returns a figure of an image address, `caption` being HTML."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    kind = ' class="pixels"' if pixels else ""
    return f'<figure>{heading}<img{kind} src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def facts(values: Mapping) -> str:
    """Returns a two-column table of nested plain values, nested names joined by points."""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in flat(values))
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>' if rows else ""


def flat(values: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, text) for each leaf of nested mappings."""
    rows = []
    for name, value in values.items():
        name = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, "–" if value is None else str(value)))
    return rows


def details(summary: str, value) -> str:
    """Returns a folded block that shows `value` as indented JSON."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(json.dumps(value, indent=2, default=str))}</pre></details>"
