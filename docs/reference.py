"""The pages of the reference: every public name, under the path that it is imported by."""

import importlib
import inspect
from pathlib import Path

PACKAGES = ("", "data", "networks", "families", "programs", "infer", "evaluation", "reports", "runs")
MORE = {"ppl_vae.estimator": ["VAEEstimator"]}


def write_reference(folder: Path) -> None:
    """Write a page for each package, and one that lists them."""
    folder.mkdir(exist_ok=True)
    pages = {".".join(filter(None, ("ppl_vae", name))): None for name in PACKAGES} | MORE
    for path, names in pages.items():
        module = importlib.import_module(path)
        names = names or [n for n in sorted(module.__all__) if not inspect.ismodule(getattr(module, n))]
        lines = [path, "=" * len(path), "", *_summary(module)]
        for name in names:
            value = getattr(module, name)
            lines += ["", f".. py:currentmodule:: {path}", "", *_entry(path, name, value)]
        (folder / f"{path}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")
    head = ["Reference", "=========", "", "Every public name, under the path that it is imported by.", ""]
    tree = [".. toctree::", "   :maxdepth: 1", "", *(f"   {path}" for path in pages)]
    (folder / "index.rst").write_text("\n".join([*head, *tree]) + "\n", encoding="utf-8")


def _summary(module: object) -> list[str]:
    doc = inspect.getdoc(module) or ""
    return [doc.split("\n\n")[0].replace("*", r"\*"), ""]


def _entry(path: str, name: str, value: object) -> list[str]:
    """The directive of a name; what is known under a shorter path too is described there."""
    if path != "ppl_vae" and name in getattr(importlib.import_module("ppl_vae"), "__all__", ()):
        return [f"`{path}.{name}` is `ppl_vae.{name}`, see :doc:`ppl_vae`."]
    if inspect.isclass(value):
        shared = path in ("ppl_vae.families", "ppl_vae.networks") and not inspect.isabstract(value)  # with the base
        lines = [f".. autoclass:: {name}"]
        if all(base is not object and base.__name__[0] != "_" for base in value.__bases__):
            lines.append("   :show-inheritance:")
        return lines if shared else [*lines, "   :members:"]
    if callable(value):
        return [f".. autofunction:: {name}"]
    return [f".. autodata:: {name}"]
