"""Tells whether two images are of the same class, e.g. the same bird species or the same product.

    python -m idml_jax.compare A.jpg B.jpg --workdir=RUN
    python -m idml_jax.compare --pairs=pairs.csv --workdir=RUN --held_out=other.npz --out=answers.csv

The answer is "same" if the similarity of the images reaches a threshold: the one at which a share ``--fmr`` of the
pairs of different held-out classes would be taken for the same (by default 0.001, or 0.01 or 0.1 where the held-out
images are too few for that). The probability is that of a logistic model of the similarity, for the share ``--share``
of pairs of one class among those you compare. Two files of the same content are the same. Similarity, threshold and
model are chosen on ``--held_out``: embeddings of ``idml_jax.embed``, or a folder of class folders, of classes that the
network was not trained on. Without it they are chosen on the run's validation classes, or else on its test images,
which are then embedded first.

``--pairs`` is a ``.csv`` or ``.tsv`` file with a header line; its first two columns hold the images, relative to the
file. ``--out`` gets the same lines with the columns same, probability, score and problem; without it they are printed.
"""

import argparse
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, printable, run_command
from idml_jax.runtime.callable_module import late
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import check_result, user_path, write_bytes
from idml_jax.runtime.options import Help

if TYPE_CHECKING:
    from idml_jax.inference.compare import Compared, Decision, compare, decide

__all__ = ["Compared", "Decision", "compare", "decide", "main"]

__getattr__ = late(__name__, dict.fromkeys(("Compared", "Decision", "compare", "decide"), "inference.compare"))


def _described(decision: "Decision", share: float) -> str:
    rates, judge = decision.rates, decision.judge
    return (
        f"threshold {rates.threshold:.4f} of the score {judge.name}, FMR {rates.fmr:.2g} and FNMR {rates.fnmr:.2g} on "
        f"{decision.about}; probability for {share:.0%} of pairs of one class"
    )


def _compare(given: dict[str, Any]) -> None:
    images, out = given["images"], user_path(given["out"]) if given["out"] else None
    if bool(given["pairs"]) == bool(images) or (images and len(images) != 2):
        raise UserError(f"give either two images or --pairs; here are {len(images)} images")
    for name in ("fmr", "share"):
        if given[name] is not None and not 0 < given[name] < 1:
            raise UserError(f"--{name}={given[name]}: a share above 0 and below 1")
    if out is not None and not given["pairs"]:
        raise UserError("--out needs --pairs; the answer for two images is printed")
    with loading():
        from idml_jax.inference.compare import TABLES, as_text, compare, decide, read_table
        from idml_jax.inference.model import load

    if out is not None:
        check_result(out, (given["pairs"], given["held_out"]), tuple(TABLES))
    table = read_table(given["pairs"]) if given["pairs"] else None
    paths = [(str(user_path(images[0])), str(user_path(images[1])))] if table is None else table.paths
    model = load(given["workdir"])
    decision = decide(model, given["held_out"], given["fmr"])
    found = compare(model, decision, paths, given["share"])
    if table is None:
        if found[0].problem:
            raise UserError(found[0].problem)
        print(f"{_answer(found[0])}\n{printable(_described(decision, given['share']))}")
        return
    if out is None:
        for row, one in zip(table.rows, found, strict=True):
            print(printable(f"{row[0]}  {row[1]}  {one.problem or _answer(one)}"))
    else:
        write_bytes(out, as_text(table, found, TABLES[out.suffix]))
    bad = [one.problem for one in found if one.problem]
    same = sum(one.same for one in found)
    told = f"; {len(bad):,} cannot be compared, the first {bad[0]}" if bad else ""
    print(printable(f"{same:,} of {len(found):,} pairs are the same{told}"))
    print(printable(_described(decision, given["share"])))


def _answer(found: "Compared") -> str:
    return f"{'same' if found.same else 'different'}: probability {found.probability:.3f}, score {found.score:.4f}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("images", nargs="*", help="two images")
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--pairs", default="", help="table of pairs, .csv or .tsv with a header line")
    parser.add_argument("--held_out", default="", help="embeddings or class folders to choose the threshold on")
    parser.add_argument(
        "--fmr", type=float, help="share of other pairs that may be taken for the same; default 0.001, or more"
    )
    parser.add_argument("--share", type=float, default=0.5, help="share of pairs of one class among the compared ones")
    parser.add_argument("--out", default="", help="table to write, .csv or .tsv; default: print")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _compare(given))


if __name__ == "__main__":
    main()
