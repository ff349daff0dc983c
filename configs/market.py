r"""Market-1501: 751 persons for training; queries of 750 others search a gallery, without images of their own camera.

    python -m idml_jax.prepare --dataset=market --source=FOLDER
    python -m idml_jax.main --config=configs/market.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/market

FOLDER holds Market-1501-v15.09.15.zip or its unpacked content. The paper has no results for this set; the
settings start from a ResNet-50 trained on ImageNet (docs/networks.md). From random weights use
``configs/market.py:scratch``; meant for a GPU or TPU; ``configs/market.py:quick`` is for a laptop with patience.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings without using test classes:
``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("market", arg)
