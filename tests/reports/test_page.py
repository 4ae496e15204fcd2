"""The page of a report: one file that asks for nothing, in which every figure, picture and term is explained."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from ppl_vae import Program
from ppl_vae.evaluation import check_guide
from ppl_vae.reports import comparison_page, guide_page, html_page, terms
from ppl_vae.reports.more_pages import sweep_page
from ppl_vae.runs import sweep
from ppl_vae.runs.run import fit_spec

MODELS = Path(__file__).parents[2] / "models"
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its text, and the errors of their nesting."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, "elements are left open"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [each["tag"] for each in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attrs):
        wanted = {key.strip("_"): value for key, value in attrs.items()}
        return [e for e in self.elements if e["tag"] == tag and wanted.items() <= e["attrs"].items()]


def check_page(text):
    """Hold a page against its promises, and give its elements."""
    found = Page(text)
    for element in found.elements:
        for name, value in element["attrs"].items():
            if name in ("src", "href", "action", "data", "poster", "srcset", "content") and value:
                assert not re.search(r"https?:|//", value) or value.startswith("data:"), (element["tag"], value)
            assert not name.startswith("on")
    (style,) = found.all("style")
    (script,) = found.all("script")
    assert not re.search(r"https?:|//|@import|url\(", style["text"] + script["text"])
    assert not {"link", "iframe", "object", "embed", "form"} & {e["tag"] for e in found.elements}
    assert found.all("html", lang="en")
    assert found.all("title")[0]["text"]
    ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    images = found.all("img")
    assert all(image["attrs"].get("alt") for image in images)
    assert all(image["attrs"]["src"].startswith("data:image/") for image in images)
    levels = [int(e["tag"][1]) for e in found.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(e["attrs"].get("scope") for e in found.all("th"))
    named = {e["attrs"]["href"].removeprefix("#"): e["attrs"]["title"] for e in found.all("a", class_="term")}
    assert named.keys() <= set(ids)
    entries = {
        e["attrs"]["id"]: e["text"].strip()
        for e in found.all("div")
        if "glossary" in str(e["inside"]) or "id" in e["attrs"]
    }
    assert all(entries[name].endswith(sentence) for name, sentence in named.items())
    assert not [e for e in found.all("a") if "button" in e["inside"] or "summary" in e["inside"]]
    for group in found.all("dl", class_="numbers"):
        assert group
    values, errors, units, kinds = (found.all("dd", class_=name) for name in ("value", "error", "unit", "kind"))
    assert len(values) == len(errors) == len(units) == len(kinds)
    assert all(re.search(r"\d", each["text"]) for each in values)
    assert all(re.search(r"±.\d|^error not known|^no Monte Carlo error", each["text"]) for each in errors)
    assert all(each["text"] for each in (*units, *kinds))
    return found, values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a table whose names, words and file try to be markup."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 3))
    rows = [f"{EVIL},b|c*d*,[e](http://x),species"]
    rows += [
        ",".join(["" if i % 9 == j == 0 else f"{v:.3f}" for j, v in enumerate(row)] + ["<b>$a$" if i % 2 else "no"])
        for i, row in enumerate(x)
    ]
    file = folder / "a&b.csv"
    file.write_text("\n".join(rows))
    torch.set_default_dtype(torch.float32)
    settings = {"data.name": str(file), "data.missing": "model", "data.scaling": "standardize", "model.latent": 2}
    settings |= {"svi.epochs": 3, "evaluation.samples": 30, "data.validation_fraction": 0.2, "svi.keep": "best"}
    return fit_spec(MODELS / "mixed_table.toml", settings, out=folder / "<i>run")


def test_a_page_keeps_its_promises(made):
    text = (made.path / "report.html").read_text()
    found, values = check_page(text)
    assert len(values) == 3
    assert found.all("h1")[0]["text"] == "<i>run"
    assert text.count("<script") == 1
    assert "alert(1)" in found.elements[0]["text"]  # the name is shown, and is no element
    assert not found.all("b")
    assert not found.all("i")
    assert len(text) < 2e6
    assert "a&b.csv" in found.all("p", class_="about")[0]["text"]
    assert not [e for e in found.all("a") if e["attrs"].get("class") != "term"]


def test_the_pictures_are_those_of_the_run(made):
    found = Page((made.path / "report.html").read_text())
    shown = {
        base64.b64decode(e["attrs"]["src"].partition(",")[2]) for e in found.all("img") if "png" in e["attrs"]["src"]
    }
    assert shown == {path.read_bytes() for path in (made.path / "figures").iterdir()}


def test_the_epoch_that_was_kept_is_named(made):
    kept = made.report["train"]["kept_epoch"]
    values = [line["validation"] for line in map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())]
    assert kept == 1 + int(np.argmax(values))
    for name in ("report.md", "report.html"):
        assert f"epoch {kept} was kept" in re.sub("<[^>]*>", "", (made.path / name).read_text())


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_in_all_themes(made):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1 or more of all text."""
    style = Page((made.path / "report.html").read_text()).all("style")[0]["text"]
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    assert len(themes) == 3  # light, dark, and paper
    for theme in themes:
        for text in ("text", "soft", "link", "warn"):
            for ground in ("back", "card"):
                light, dark = sorted((luminance(theme[text]), luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_markdown_of_a_user_stays_text():
    text = (
        "# A\n\nintro\n\n## B\n\n| "
        + " | ".join(map(html_page.plain, ["a|b", "*c*", "`d`", "$e$", EVIL]))
        + " |\n|---|---|---|---|---|\n| 1 | 2 | 3 | 4 | 5 |\n"
    )
    found = Page(html_page.page(text, about=html_page.plain("[x](javascript:y) # <b>")))
    assert [e["text"] for e in found.all("th")] == ["a|b", "*c*", "`d`", "$e$", EVIL]
    assert found.all("p", class_="about")[0]["text"] == "[x](javascript:y) # <b>"
    assert not [e for e in found.elements if e["tag"] in ("em", "code", "b")]


def test_formulas_are_drawn_and_can_be_read():
    found = Page(html_page.page("# A\n\n$\\frac{1}{2} z_j$ and $\\nonsense{$.\n", about="x"))
    (image,) = found.all("img")
    assert image["attrs"]["alt"] == "\\frac{1}{2} z_j"
    assert base64.b64decode(image["attrs"]["src"].partition(",")[2]).lstrip().startswith(b"<?xml")
    assert found.all("code")[0]["text"] == "\\nonsense{"


def test_pictures_on_a_ground_of_their_own_are_told_from_transparent_ones():
    pictures = []
    for ground in ("white", "none"):
        figure, file = Figure((2, 1), facecolor=ground), io.BytesIO()
        figure.add_subplot()
        figure.savefig(file)
        pictures.append(html_page.Picture("A picture.", file.getvalue()))
    found = Page(html_page.page("# A\n", about="x", pictures=pictures))
    assert [e["attrs"].get("class") for e in found.all("img")] == ["chart", ""]


def test_options_in_code_are_not_broken():
    found = Page(html_page.page("# A\n\n`ppl-vae evaluate <RUN> --samples 10`\n", about="x"))
    assert [e["text"] for e in found.all("span")] == ["--samples"]
    assert found.all("code")[0]["text"] == "ppl-vae evaluate <RUN> --samples 10"


def test_terms_are_found_whole_and_explained_in_a_sentence():
    assert [term for _, term in terms.split("generate the approximate posterior at a rate of 2 nats") if term] == [
        "guide",
        "rate",
        "nats",
    ]
    assert all(sentence.endswith(".") and 5 < len(sentence.split()) for _, sentence in terms.TERMS.values())
    assert all(
        [name for name in terms.TERMS if terms.TERMS[name][0] == how] == [term]
        for term, (how, _) in terms.TERMS.items()
    )


def test_the_page_of_a_guide_check_has_its_moments(tmp_path):
    """The truth: m given five data is N(3.8 / 6, 1 / 6)."""
    torch.set_default_dtype(torch.float64)
    y = torch.tensor([1.0, 0.2, -0.4, 2.0, 1.0])

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(y):
        pyro.sample("m", dist.Normal(3.8 / 6, 6**-0.5))

    check = check_guide(Program(model, guide), {"y": y}, samples=200, reference="closed-form")
    found, values = check_page(guide_page(check, title=EVIL))
    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(y)
    assert values[0]["text"] == f"−{-exact:.3f}"
    assert found.all("h1")[0]["text"] == EVIL
    cells = [e["text"] for e in found.all("td")]
    assert cells[0] == "m"
    assert f"{3.8 / 6:.3f}" in cells[-3]
    assert "Trust the guide" in found.all("section", class_="doubts")[0]["text"]


def test_a_guide_of_single_data_has_a_page_too():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    found, values = check_page(guide_page(check_guide(Program(model, guide), {"x": torch.randn(6)}, samples=200)))
    assert len(values) == 3
    assert found.all("dt")[2]["text"] == "tail shape k of the weights, largest"


def run_of(path, mean, ppca=None):
    evidence = {"mean": mean, "se": 0.4, "mc_se": 0.02, "kind": "lower bound" if mean > -9 else "estimate"}
    test = {"n": 50, "elbo": {"mean": mean - 1, "se": 0.4, "mc_se": 0.02}, "log_evidence": evidence}
    baseline = None if ppca is None else {"ppca": {"log_evidence": ppca}}
    data = {"name": "table.csv", "part": "test"}
    return {"path": path, "data": data, "test": test, "exact": None, "baseline": baseline, "train": {"seconds": 2.0}}


@pytest.mark.parametrize(("best", "apart"), [(-9.5, True), (-9.9, False), (-5.0, True)])
def test_the_page_of_a_comparison_has_the_best_first(best, apart):
    runs = [run_of("runs/a", -10.0, -11.0), run_of("runs/<b>|", best), run_of("runs/c", -12.0)]
    pairs = [("runs/a", "runs/<b>|", -10 - best), ("runs/a", "runs/c", 2.0), ("runs/<b>|", "runs/c", best + 12)]
    differences = [{"a": a, "b": b, "mean": mean, "se": 0.1} for a, b, mean in pairs]
    found, values = check_page(comparison_page({"runs": runs, "differences": differences}))
    assert values[1]["text"] == f"{best + 10:.3f}"
    assert found.all("td")[0]["text"] == "runs/<b>|"
    doubts = "".join(e["text"] for e in found.all("section", class_="doubts"))
    assert ("cannot be told apart" in doubts) == (not apart)
    assert ("Only a lower bound" in doubts) == (best > -9)


@pytest.mark.parametrize("chosen", [None, 1])
def test_the_page_of_a_sweep_has_the_chosen_setting(chosen):
    rows = []
    for number, mean in enumerate((-10.0, -9.0)):
        value = {"mean": mean, "se": 0.3, "se_seeds": 0.2 if number else None, "mc_se": 0.01, "kind": "estimate"}
        row = {"values": {"model.latent": number + 1}, "seeds": 1 + number, "log_evidence": value, "elbo": mean - 1}
        rows.append({**row, "seconds": 2.0, "ppca": -11.0, "validation": None, "difference": None})
    other = 1 if chosen is None else 0
    rows[other]["difference"] = {"mean": rows[other]["log_evidence"]["mean"] - rows[1 - other]["log_evidence"]["mean"]}
    rows[other]["difference"] |= {"se": 0.1, "se_seeds": None}
    summary = {"settings": rows, "chosen": chosen, "compared_with": 1 - other, "failed": {"<b>": "no luck"}}
    found, values = check_page(sweep_page(summary, sweep.told(summary)))
    assert values[0]["text"] == ("−10.000" if chosen is None else "−9.000")
    doubts = found.all("section", class_="doubts")[0]["text"]
    assert ("No setting is chosen" in doubts) == (chosen is None)
    assert "<b> failed: no luck" in doubts
    assert [e["text"] for e in found.all("td")][0].startswith("model.latent = 1")


def test_in_a_browser_nothing_overflows_and_tables_sort(made, page):
    page.errors.clear()
    for width in (390, 1440):
        page.open(made.path / "report.html", width=width, dark=width == 390)
        page("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
        assert page("document.documentElement.scrollWidth") == width
        chart = page.pixels("img.chart")[..., :3]
        assert (np.median(chart) < 0.15) if width == 390 else (np.median(chart) > 0.95)  # dark on the dark page
    first = "[...document.querySelectorAll('#section-the-strangest-rows')][0].closest('details')"
    column = f"[...{first}.querySelectorAll('tbody tr')].map(row => row.cells[1].textContent)"
    as_they_are = page(column)
    values = [float(cell.replace("\N{MINUS SIGN}", "-")) for cell in as_they_are]
    assert values == sorted(values)
    button = f"{first}.querySelectorAll('th button')[1]"
    page(f"{button}.click(), {button}.click()")
    assert page(column) == as_they_are[::-1]
    assert page(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"
    page(f"{button}.click()")
    assert page(column) == as_they_are
    page("location.hash = document.querySelector('a.term').getAttribute('href')")
    assert page("document.querySelector('.glossary div:target dd').textContent.length") > 20
    assert not page.errors
