"""CIFAR-100, classification: PyramidNet-200 (``resnet``, ``resnet50``: other networks).

    python -m idml_jax.prepare --dataset=cifar100 --source=cifar-100-python.tar.gz
    python -m idml_jax.main --config=configs/cifar100.py:cutmix,ism --workdir=runs/cifar100

Rows: ``baseline``, ``mixup`` or ``cutmix``, each alone (plain) or with ``,ism`` (introspective).
Published, top-1: baseline 83.55, Mixup 84.22, CutMix 85.53; introspective 84.08, 84.59, 85.65.
Meant for a GPU or TPU; ``,quick`` is for a laptop. A folder with ``train/<class>/`` and ``test/<class>/`` works
too: ``--config.data.name=folder --config.data.root=PATH``. The words after the colon are explained in
``idml_jax/training/protocols/classification.py``.
"""

from idml_jax.training.protocols.classification import classification_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.classification.classification_config``."""
    return classification_config("cifar100", arg)
