"""What a run has learnt, on one self-contained HTML page.

    python -m idml_jax.report --workdir=RUN [--compare=OTHER_RUN] [--out=page.html]

Training curves, right and wrong answers, the most and least uncertain pictures, risk over coverage beside the free
baselines, uncertainty against the true ambiguity where that is known, a map of the embeddings, confused classes, and a
second run beside the first. The pictures are the run's test pictures; its best checkpoint embeds them.
"""

import argparse

from idml_jax.errors import run_command
from idml_jax.reporting.page import comparison, look, make, read_record

__all__ = ["comparison", "look", "main", "make", "read_record"]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--compare", default="", help="folder of a finished run, e.g. the plain one")
    parser.add_argument("--out", default="", help="default: report.html in the run's folder")
    parser.add_argument("--threads", type=int, default=4, help="that read and decode")
    given = vars(parser.parse_args(argv))
    run_command(lambda: print(f"report           {make(**given)}"))


if __name__ == "__main__":
    main()
