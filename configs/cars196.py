r"""Cars196: cars, classes 1 to 98 for training, 99 to 196 for testing.

    python -m idml_jax.prepare --dataset=cars --source=FOLDER
    python -m idml_jax.main --config=configs/cars196.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/cars196

FOLDER holds car_ims.tgz and cars_annos.mat, or another layout of docs/data.md. The settings are the paper's, which
start from a ResNet-50 trained on ImageNet (torchvision's or timm's file, see docs/networks.md); from random weights use
``configs/cars196.py:scratch``. Published, R@1: 90.6 (introspective), 87.3 (``:plain``). Meant for a GPU or TPU;
``configs/cars196.py:quick`` is for a laptop.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings
without using test classes: ``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("cars", arg)
