"""ImageNet-1K, classification: ResNet-50 for 300 epochs (``epochs90``: for 90).

    python -m idml_jax.prepare --dataset=imagenet --source=FOLDER
    python -m idml_jax.main --config=configs/imagenet.py:cutmix,ism --workdir=runs/imagenet

Rows: ``baseline``, ``mixup`` or ``cutmix``, each alone (plain) or with ``,ism`` (introspective).
Published, top-1: baseline 76.32, Mixup 77.42, CutMix 78.60; introspective 76.94, 77.95, 79.04.
Meant for a GPU or TPU; ``,quick`` is for a laptop. A folder with ``train/<class>/`` and ``test/<class>/`` works
too: ``--config.data.name=folder --config.data.root=PATH``. The words after the colon are explained in
``idml_jax/training/protocols/classification.py``.
"""

from idml_jax.training.protocols.classification import classification_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.classification.classification_config``."""
    return classification_config("imagenet", arg)
