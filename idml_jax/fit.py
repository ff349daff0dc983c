"""Makes a run whose metric is a closed form of pretrained features: no training, each image once through the trunk.

    python -m idml_jax.fit --config=folder:large --config.data.root=PHOTOS --workdir=runs/fitted \\
        --config.model.init_from=resnet50.safetensors

The semantic head whitens the training images' features within classes (``docs/closed_form.md``); its shrinkage is
chosen on held-out training classes. The run is used like any other: ``embed``, ``search``, ``report``, ``export``. It
has no uncertainty. A table compares it with the features as they are, a random projection, whitening and LDA. Flags and
exit codes are those of ``idml_jax.main``. A stopped command goes on when it is run again.
"""

from idml_jax.runtime import huge_pages, interrupt

if __name__ == "__main__":
    huge_pages.start_again()
    interrupt.end_when_asked()  # before the imports below, which take a while

from typing import Any

from idml_jax.errors import UserError
from idml_jax.runtime.callable_module import make_callable


def _call(config: Any, workdir: str, **options: Any) -> dict[str, Any]:
    """``idml_jax.training.fit.fit``, imported when it is called."""
    from idml_jax.training.fit import fit

    return fit(config, workdir, **options)


make_callable(__name__, _call)  # idml_jax.fit(config, "runs/fitted")


def _fit(config: Any, workdir: str) -> None:
    from absl import flags

    from idml_jax import main as training
    from idml_jax.runtime.compiled import loading

    with loading():
        from idml_jax.training.fit import fit  # imported late, so that wrong flags fail fast

    if flags.FLAGS.mode != "train":
        raise UserError(f"--mode={flags.FLAGS.mode} is for python -m idml_jax.main, which also evaluates a fitted run")
    if flags.FLAGS.resume != "auto":
        raise UserError(f"--resume={flags.FLAGS.resume} is for python -m idml_jax.main; a fitted run has no epochs")
    fit(training.resolved(config, workdir), workdir, overwrite=flags.FLAGS.overwrite)
    training.say_next(workdir)


def main() -> None:
    """The command line."""
    from absl import app, flags

    from idml_jax import main as training  # imported late: it defines flags, which a program of one's own may have too

    if "overwrite" not in flags.FLAGS:
        flags.DEFINE_bool("overwrite", False, "Move the files of another run in the workdir to its folder replaced.")
    parse = lambda argv: training.parse(argv, __doc__, ("overwrite",))
    app.run(lambda _: training.command(_fit), flags_parser=parse)


if __name__ == "__main__":
    main()
