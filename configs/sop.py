r"""Stanford Online Products: 11,318 products for training, 11,316 others for testing.

    python -m idml_jax.prepare --dataset=sop --source=Stanford_Online_Products.zip
    python -m idml_jax.main --config=configs/sop.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/sop

The settings are the paper's, which start from a ResNet-50 trained on ImageNet (torchvision's or timm's file, see
docs/networks.md); from random weights use ``configs/sop.py:scratch``. Published, R@1:
81.5 (introspective), 79.5 (``:plain``). Meant for a GPU or TPU;
``configs/sop.py:quick`` is for a laptop with patience.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings
without using test classes: ``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("sop", arg)
