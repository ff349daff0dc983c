r"""CUB-200-2011: birds, classes 1 to 100 for training, 101 to 200 for testing.

    python -m idml_jax.prepare --dataset=cub --source=CUB_200_2011.tgz
    python -m idml_jax.main --config=configs/cub200.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/cub200

The settings are the paper's, which start from a ResNet-50 trained on ImageNet (torchvision's or timm's file, see
docs/networks.md); from random weights use ``configs/cub200.py:scratch``. Published, R@1:
70.7 (introspective), 69.0 (``:plain``). Meant for a GPU or TPU;
``configs/cub200.py:quick`` is for a laptop.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings
without using test classes: ``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("cub", arg)
