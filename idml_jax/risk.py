"""Fits a risk head to a finished run: how likely is, from the image alone, that its nearest image is of another class.

    python -m idml_jax.risk --workdir=RUN

The run's network stays as it is. A small network learns from the pooled features of the training images, clean, cropped
and corrupted, in which order they are confused with other classes, with classes left out in turn. It is stored in the
run's folder (``risk.npz``, and what was measured in ``risk.json``); from then on ``embed`` writes a column ``risk``,
and ``search``, ``evaluate`` and ``report`` have it among their scores. Features are kept, so a stopped command goes on
when it is run again.
"""

import argparse
from typing import TYPE_CHECKING, Any

from idml_jax.errors import run_command
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import show_progress

if TYPE_CHECKING:
    from idml_jax.training.risk import Settings, fit_risk

__getattr__ = late(__name__, dict.fromkeys(("Settings", "fit_risk"), "training.risk"))
make_callable(__name__, "training.risk:fit_risk")  # idml_jax.risk("runs/mine")

__all__ = ["OPTIONS", "Settings", "fit_risk", "main"]

# The fields of training.risk.Settings: default and meaning.
OPTIONS: dict[str, tuple[int | float, str]] = {
    "crops": (1, "pictures per image by the training transform"),
    "corrupted": (1, "pictures per image that are cropped, blurred, noised or occluded"),
    "folds": (4, "folds of training classes, each left out once"),
    "epochs": (10, "most passes over the pictures"),
    "batch_size": (256, "pictures in a step"),
    "learning_rate": (1e-3, "of AdamW"),
    "gap": (0.1, "least difference of two risks in the right order"),
    "shrinkage": (1.0, "of the closed forms that the folds search with"),
    "seed": (0, "of folds, weights and order"),
}
_SHOWN = ("risk", "uncertainty", "norm", "feature_norm", "nearest_distance", "vote_share")


def _risk(given: dict[str, Any]) -> None:
    show_progress()
    with loading():
        from idml_jax.training.risk import RESULT, Settings, fit_risk
    workdir, overwrite = given.pop("workdir"), given.pop("overwrite")
    found = fit_risk(workdir, Settings(**given), overwrite=overwrite)
    best = [value for value in found["held_out/clean"] if value is not None]
    print(f"left-out classes: AUROC of the risk {max(best):.3f}" if best else "left-out classes: no wrong answers")
    measured = found["evaluation"]
    print(f"evaluation images: R@1 {100 * measured['R@1']:.1f}; AUROC for wrong answers:")
    for name in _SHOWN:
        value = measured.get(f"R-AUROC({name})")
        if value is not None:
            print(f"  {name:<18} {value:.3f}")
    print(f"all metrics      {workdir}/{RESULT}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--workdir", required=True, help="folder of a finished run")
    for name, (default, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing risk head")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _risk(given), "stopped; rerun the same command to go on")


if __name__ == "__main__":
    main()
