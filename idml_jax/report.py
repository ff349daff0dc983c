"""Writes a report of a run as one self-contained HTML page.

    python -m idml_jax.report --workdir=RUN [--compare=OTHER_RUN] [--out=page.html]

The page shows training curves, right and wrong answers, the most and least uncertain images, risk over coverage of the
uncertainty and of the baseline scores, uncertainty against the true ambiguity where that is known, a map of the
embeddings, confused classes and, with ``--compare``, a second run. The best checkpoint embeds the run's test images.
"""

import argparse
from typing import TYPE_CHECKING, Any

from idml_jax.errors import printable, run_command
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import show_progress

if TYPE_CHECKING:
    from idml_jax.reporting.page import comparison, look, make, read_record

__getattr__ = late(__name__, dict.fromkeys(("comparison", "look", "make", "read_record"), "reporting.page"))
make_callable(__name__, "reporting.page:make")  # idml_jax.report("runs/mine")

__all__ = ["comparison", "look", "main", "make", "read_record"]


def _report(given: dict[str, Any]) -> None:
    show_progress()
    with loading():
        from idml_jax.reporting.page import make

    print(f"report           {printable(make(**given))}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--compare", default="", help="folder of a finished run to compare with, e.g. a plain one")
    parser.add_argument("--out", default="", help="HTML file to write; default: report.html in the run's folder")
    parser.add_argument("--threads", type=int, default=4, help="number of reader and decoder threads")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _report(given))


if __name__ == "__main__":
    main()
