"""Sphinx: the pages of this folder, the notebooks as they are committed, and a reference made of the docstrings."""

import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from reference import write_reference  # noqa: E402

project, author = "ppl_vae", "the authors of ppl_vae"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", "ppl_vae"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False
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
  const wide = "pre, .table-wrapper, .output, math[display=block]";
  document.querySelectorAll(wide).forEach((one) => { one.tabIndex = 0; });
  document.querySelectorAll("aside.sidebar-drawer").forEach((one) => one.setAttribute("aria-label", "Pages"));
  document.querySelectorAll("aside.toc-drawer").forEach((one) => one.setAttribute("aria-label", "On this page"));
});"""  # what scrolls can be reached by keys, and what is a heading has a level


def as_code(app, what, name, obj, options, lines):
    """Write `x` as ``x``, before colons inside are taken for those of a type."""
    pattern = r"(:\w+:`[^`]*`|``[^`]*``)|`([^`]+)`"
    lines[:] = [re.sub(pattern, lambda found: found[1] or f"``{found[2]}``", line) for line in lines]


def escape(app, what, name, obj, options, lines):
    """Let stars, bars and trailing underscores stand, which reStructuredText would read as markup."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(:math:`[^`]*`|``[^`]*``|`[^`]*`)", line)
            lines[number] = "".join(p if k % 2 else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", p)
                                    for k, p in enumerate(parts))  # fmt: skip


def mathml(block):
    """A visitor that writes formulas as MathML, which needs no script from elsewhere."""

    def visit(self, node):
        code = latex2mathml.converter.convert(node.astext(), display="block" if block else "inline")
        self.body.append(re.sub(r"(<mi>(?:log|ln|det)</mi>)", r'\1<mspace width="0.17em"/>', code))
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
