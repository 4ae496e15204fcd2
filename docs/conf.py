"""Sphinx: the pages of this folder, the notebooks as they are committed, and a reference made of the docstrings."""

import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from matplotlib.image import imread

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from reference import write_reference  # noqa: E402

project, author = "ppl_vae", "the authors of ppl_vae"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", "ppl_vae"
html_theme_options = {
    "navigation_with_keys": True,
    "dark_css_variables": {"color-code-background": "#1e2126", "mystnb-source-border-color": "#3b3f46"},
}
html_show_copyright = False
html_static_path, html_css_files = ["_static"], ["pages.css"]
pygments_dark_style = "github-dark"
smartquotes_action = "qe"  # quotes and dots, not the hyphens of options
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs, which a test holds to their sources
html_math_renderer = "mathml"
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


REACH = """addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("p.caption[role=heading]").forEach((one) => one.setAttribute("aria-level", "2"));
  const wide = "pre, .table-wrapper, .output, math[display=block], :is(.cell_output, article p):has(> img)";
  document.querySelectorAll(wide).forEach((one) => { one.tabIndex = 0; });
  document.querySelectorAll("aside.sidebar-drawer").forEach((one) => one.setAttribute("aria-label", "Pages"));
  document.querySelectorAll("aside.toc-drawer").forEach((one) => one.setAttribute("aria-label", "On this page"));
});"""  # what scrolls can be reached by keys, and what is a heading has a level


COLON = "\ue000"  # one that is no sign of a type


def as_code(app, what, name, obj, options, lines):
    """Write `x` as ``x``, and keep the colon in a property's sentence, before a colon is taken for that of a type."""
    pattern = r"(:\w+:`[^`]*`|``[^`]*``)|`([^`]+)`"
    lines[:] = [re.sub(pattern, lambda found: found[1] or f"``{found[2]}``", line) for line in lines]
    if what in ("property", "attribute"):
        lines[:1] = [line.replace(": ", COLON + " ") for line in lines[:1]]


def escape(app, what, name, obj, options, lines):
    """Let stars, bars and trailing underscores stand, which reStructuredText would read as markup."""
    code = r"(^ *(?:>>>|\.\.\.).*$|:math:`[^`]*`|``[^`]*``|`[^`]*`|\\\*|\w\(\*\*\w+|\*\*\w+\*\*|(?<!\S)\*\w+\*(?!\w))"
    parts = re.split(code, "\n".join(lines).replace(COLON, ":"), flags=re.MULTILINE)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def shorten(app, what, name, obj, options, signature, answer):
    """Write "()" for a constructor that takes what torch's takes alone, and "..." for a default without a name."""
    if signature == "(*args, **kwargs)":
        return "()", answer
    return re.sub(r"=<(?:[^<>]|<[^<>]*>)*>", "=...", signature or "") or None, answer


def describe(app, doctree):
    """Describe a picture by its section, if nothing else does, and set the dash between a parameter and its text."""
    for dash in [text for text in doctree.findall(nodes.Text) if text == " -- "]:
        dash.parent.replace(dash, nodes.Text(" \N{EN DASH} "))
    for image in doctree.findall(nodes.image):
        section = image
        while section.parent and not isinstance(section, nodes.section):
            section = section.parent
        image.setdefault("alt", f"Picture: {section.next_node(nodes.title).astext()}")
        if (imread(app.srcdir / image["uri"])[..., :3].max(-1) < 0.4).mean() > 0.2:
            image["classes"].append("pixels")  # and no axes whose numbers must be read


def lead_back(app, pagename, templatename, context, doctree):
    """Lead from source to reference by the path that the page there has, where another page shares the source."""
    if pagename.startswith("_modules/") and "body" in context:
        link = r"(reference/(ppl_vae\.(\w+))\.html#)ppl_vae\.(?!\3\.)"
        context["body"] = re.sub(link, r"\1\2.", context["body"])


def mathml(block):
    """A visitor that writes formulas as MathML, which needs no script from elsewhere."""

    def visit(self, node):
        parts = node.astext().split(r"\qquad") if block else [node.astext()]
        code = "".join(latex2mathml.converter.convert(one, display="block" if block else "inline") for one in parts)
        name, space = "<mi>(?:log|ln|det)</mi>", '<mspace width="0.17em"/>'
        code = re.sub(f"(</mi>|</mn>|</mstyle>|&#x00029;</mo>)(?={name})", rf"\1{space}", code)
        code = re.sub(f"({name})", rf"\1{space}", code)
        code = code.replace("<mo>&#x23DF;</mo>", '<mspace class="brace"/>')  # which no font need stretch
        self.body.append(f'<div class="formulas">{code}</div>' if block else code)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Copy what lies outside this folder, and write the reference."""
    notebooks = HERE / "notebooks"
    shutil.rmtree(notebooks, ignore_errors=True)
    notebooks.mkdir()
    for file in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        shutil.copy(file, notebooks)
    write_reference(HERE / "reference")
    app.add_js_file(None, body=REACH)
    app.add_html_math_renderer("mathml", mathml(False), mathml(True))
    app.connect("autodoc-process-docstring", as_code, priority=100)
    app.connect("autodoc-process-docstring", escape, priority=900)
    app.connect("autodoc-process-signature", shorten)
    app.connect("doctree-read", describe)
    app.connect("html-page-context", lead_back)
