"""Trackers: what `fit` and `fit_spec` call after each epoch, to follow a training elsewhere.

A tracker is any function of the epoch and the `State`, whose history has the figures so far. Those of Weights & Biases
and MLflow take two lines each, and need no more of ppl_vae::

    wandb.init(project="digits")
    fit_spec("digits.toml", on_epoch=lambda epoch, state: wandb.log(latest(state), step=epoch))

    with mlflow.start_run():
        fit_spec("digits.toml", on_epoch=lambda epoch, state: mlflow.log_metrics(latest(state), step=epoch))
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppl_vae.infer.step import State
from ppl_vae.runs.storage import METRICS


def latest(state: State) -> dict[str, float]:
    """The figures of the last epoch by name, as `metrics.jsonl` has them; bounds in nats per datum."""
    columns = {name: getattr(state.history, name) for name in METRICS}
    return {name: float(column[-1]) for name, column in columns.items() if column}


def tensorboard(folder: str | Path) -> Callable[[int, State], None]:
    """Write the figures of each epoch for TensorBoard: `tensorboard --logdir FOLDER` shows them while they grow.

    Args:
        folder: where its files go.

    Raises:
        ValueError: If the package `tensorboard` is missing.

    Example:
        ``fit(program, x, on_epoch=tensorboard("runs/board"))``
    """
    try:
        board: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ValueError(f"Expected tensorboard; got: {error}. Install ppl-vae[tensorboard].") from error
    writer = board.SummaryWriter(str(folder))

    def write(epoch: int, state: State) -> None:
        for name, value in latest(state).items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return write
