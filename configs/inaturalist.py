r"""iNaturalist 2018 for retrieval: 5,690 species for training, 2,452 others for testing.

    python -m idml_jax.prepare --dataset=inaturalist --source=FOLDER
    python -m idml_jax.main --config=configs/inaturalist.py --config.model.init_from=resnet50.safetensors \
      --workdir=runs/inaturalist

FOLDER holds train_val2018.tar.gz or its unpacked content, and the lists Inaturalist_train_set1.txt and
Inaturalist_test_set1.txt. The paper has no results for this set; the settings start from a ResNet-50 trained on
ImageNet (docs/networks.md). From random weights use ``configs/inaturalist.py:scratch``; meant for a GPU or TPU;
``configs/inaturalist.py:quick`` is for a laptop with patience.
The words after a colon (``plain``, a loss, ``scratch``, ``quick``) are explained in
``idml_jax/training/protocols/retrieval.py``. To choose settings without using test classes:
``--config.data.validation_classes=0.2 --config.eval.split=validation``.
"""

from idml_jax.training.protocols.retrieval import retrieval_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.retrieval.retrieval_config``."""
    return retrieval_config("inaturalist", arg)
