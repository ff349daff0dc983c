r"""In-shop Clothes Retrieval: 3,997 items for training; queries of 3,985 others search a gallery.

    python -m idml_jax.prepare --dataset=inshop --source=FOLDER
    python -m idml_jax.main --config=configs/inshop.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/inshop

FOLDER holds list_eval_partition.txt and img.zip, or its unpacked content. The paper has no results for this set; the
settings are those of Stanford Online Products, which start from a ResNet-50 trained on ImageNet (docs/networks.md).
From random weights use ``configs/inshop.py:scratch``; meant for a GPU or TPU; ``configs/inshop.py:quick`` is for a
laptop with patience.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings
without using test classes: ``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("inshop", arg)
