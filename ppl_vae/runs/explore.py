"""The latent explorer of a run, as one file."""

from pathlib import Path
from typing import Any

from ppl_vae.reports.explorer import explorer_page
from ppl_vae.runs.blame import blamed
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.trained import check_same_data


def write_explorer(
    path: str | Path, out: str | Path | None = None, *, program: Any = None, trust_code: bool = False
) -> Path:
    """Write the latent explorer of a finished run: one HTML file that works offline.

    Args:
        path: the run directory.
        out: the file, by default `NAME.html` beside the run of that name.
        program: as of `load_run`.
        trust_code: whether the run's copy of a program file may run.

    Returns:
        The file.

    Raises:
        ValueError: If the run has no latent space to show, its data have changed, or the file is there already.
    """
    run = load_run(path, program=program, trust_code=trust_code)
    home = run.path.resolve()
    file = home.with_name(f"{home.name}.html") if out is None else Path(out)
    if file.exists():
        raise ValueError(f"Expected --out to be new; {file} is there. Choose another name, or move it away.")
    data = run.spec.load_data()
    check_same_data(run.path, run.report["data"]["protocol"], data)
    with blamed(run.spec.programs):
        text = explorer_page(run.program, data, title=home.name, seed=run.spec.svi.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file
