"""The rows of the experiments and their settings. No row is tuned on test classes."""

from typing import Any

from idml_jax.losses import LOSSES

Overrides = dict[str, Any]

TINY: Overrides = {
    "epochs": 4, "data.channels": 3, "data.mean": (0.48, 0.45, 0.40), "data.std": (0.27, 0.26, 0.28),
    "data.flip": True, "data.rotation": 0.0, "data.crop_scale": (0.4, 1.0), "model.pooling": "avg",
}  # fmt: skip
# Short runs on two cores. Evaluation once, at the end.
DATA: dict[str, dict[str, Any]] = {
    "omniglot": {"config": "omniglot.py", "root": "omniglot_small", "overrides": {"epochs": 12}},
    "glyphs": {"config": "glyphs.py:quick", "root": None, "overrides": {}},
    "tiny": {"config": "omniglot.py", "root": "tiny_retrieval", "overrides": TINY},
    # Its trunk is that of table P, pretrained as a classifier of the same training classes.
    "tiny_pretrained": {
        "config": "omniglot.py",
        "root": "tiny_retrieval",
        "overrides": {**TINY, "model.init_from": "{out}/P/tiny_classes/pretrain/seed0"},
    },
    "tiny_classes": {
        "config": "cifar10.py:baseline,quick",
        "root": "tiny_classes",
        "overrides": {"data.name": "folder", "epochs": 2},
    },
    "cifar10": {
        "config": "cifar10.py:{row},quick",
        "root": "cifar10",
        "overrides": {"data.name": "folder", "epochs": 1},
    },
    "birds": {
        "config": "cub100.py",
        "root": "cub100",
        "overrides": {
            "epochs": 12,
            "batch_size": 128,
            "data.image_size": 64,
            "data.resize": 64,
            "data.crop_scale": (0.3, 1.0),
            "model.name": "convnet4",
            "model.embedding_dim": 64,
            "model.uncertainty_dim": 64,
            "model.dtype": "float32",
            "optim.learning_rate": 2e-3,
            "optim.schedule": "cosine",
            "optim.proxy_lr_factor": 10.0,
        },
    },
    # From a ResNet-50 pretrained on ImageNet (imagenet_trunk.py); two epochs of the heads, two of all parameters.
    "birds_imagenet": {
        "config": "cub100.py",
        "root": "cub100",
        "overrides": {
            "model.name": "resnet50_v1",
            "model.init_from": "{root}/resnet50_v1.safetensors",
            "model.semantic_init": "random",
            "model.batchnorm": "frozen",
            "model.dtype": "float32",
            "epochs": 4,
            "batch_size": 60,
            "data.image_size": 96,
            "data.resize": 96,
            "data.crop_scale": (0.3, 1.0),
            "optim.learning_rate": 1e-4,
            "optim.schedule": "cosine",
            "optim.warmup_epochs": 2,
            "eval.batch_size": 60,
        },
    },
}
# Handwritten characters with the same network: far from what ImageNet shows.
DATA["omniglot_imagenet"] = {
    "config": "cub100.py",
    "root": "omniglot_small",
    "overrides": {
        **DATA["birds_imagenet"]["overrides"],
        "data.crop_scale": (0.6, 1.0),
        "data.flip": False,
        "data.rotation": 10.0,
    },
}

METRICS: dict[str, Overrides] = {
    "plain": {"ism.enabled": False, "mixup.enabled": False, "model.uncertainty_head": "none"},
    "plain+mixup": {"ism.enabled": False, "mixup.enabled": True, "model.uncertainty_head": "none"},
    "ism": {"ism.enabled": True, "mixup.enabled": False},
    "ism+mixup": {"ism.enabled": True, "mixup.enabled": True},
}


def table_a() -> dict[str, Overrides]:
    """Accuracy: every loss, plain and introspective, without and with Mixup; all other settings are equal."""
    return {f"{loss}/{metric}": {"loss.name": loss, **METRICS[metric]} for metric in METRICS for loss in FIRST}


# The losses of table A in the published runs.
FIRST = (
    "contrastive", "triplet_semihard", "margin_distance_weighted", "multi_similarity", "fast_ap", "proxy_nca",
    "proxy_anchor",
)  # fmt: skip
LATER = (*(loss for loss in LOSSES if loss not in FIRST), "proxy_anchor+sup_con")


def table_l() -> dict[str, Overrides]:
    """Accuracy: the losses that came later and a sum, plain and introspective, as in table A."""
    return {f"{loss}/{metric}": {"loss.name": loss, **METRICS[metric]} for metric in ("plain", "ism") for loss in LATER}


# Uncertainty: a fifth of the training classes is held out, so that a confidence can be fitted and settings chosen.
HELD_OUT: Overrides = {"data.validation_classes": 0.2}
HARD: Overrides = {"data.corrupt": 0.3, "data.corrupt_kinds": ("noise", "occlusion")}  # crop and blur stay unseen
VARIANTS: dict[str, Overrides] = {
    "plain+mixup": METRICS["plain+mixup"],
    "ism+mixup": {},
    "ism+mixup, corrupt": HARD,
    "ism+mixup, ranking": {"ism.ranking": 1.0},
    "ism+mixup, ranking, corrupt": {"ism.ranking": 1.0, **HARD},
    "plain+mixup, ranking, corrupt": {"ism.enabled": False, "ism.ranking": 1.0, **HARD},
    "plain+mixup, corrupt": {**METRICS["plain+mixup"], **HARD},
    "ism": METRICS["ism"],
    "released": {"ism.variant": "released"},
    "linear head": {"model.uncertainty_head": "linear"},
    "absolute, tau 2": {"ism.variant": "absolute", "ism.temperature": 2.0},
    "tau 1": {"ism.temperature": 1.0},
    "tau 20": {"ism.temperature": 20.0},
    "u scale 0.1": {"model.uncertainty_scale": 0.1},
    "u width 8": {"model.uncertainty_dim": 8},
    "prior": {"ism.prior": 0.1},
    # Not settings of the package: variants.py.
    **{
        name: {"variant": name}
        for name in (
            "tau learned",
            "tau from 50 to 5",
            "tau from 1 to 5",
            "ranking reaches the trunk",
            "softplus u",
            "u detached",
        )
    },
}


def table_b() -> dict[str, Overrides]:
    """Uncertainty: the variants of the uncertainty head and of the metric, all with ProxyAnchor."""
    return {name: {**HELD_OUT, **overrides} for name, overrides in VARIANTS.items()}


def table_k() -> dict[str, Overrides]:
    """Classification, plain and introspective, without mixing, with Mixup, with CutMix."""
    rows = [f"{mixing}{ism}" for mixing in ("baseline", "mixup", "cutmix") for ism in ("", ",ism")]
    return {row: {} for row in rows} | {"baseline,ism, mlp head": {"model.uncertainty_head": "mlp"}}


# Losses under which u collapses, and settings that may prevent it.
COLLAPSING = ("multi_similarity", "margin_distance_weighted", "fast_ap")
ALIVE: dict[str, Overrides] = {
    "prior 0.1": {"ism.prior": 0.1}, "prior 0.01": {"ism.prior": 0.01}, "ranking": {"ism.ranking": 1.0},
}  # fmt: skip


def table_u() -> dict[str, Overrides]:
    """What keeps u from collapsing; compare with the same loss in table A, ism+mixup."""
    return {
        f"{loss}, {name}": {"loss.name": loss, **METRICS["ism+mixup"], **overrides}
        for loss in COLLAPSING
        for name, overrides in ALIVE.items()
    }


TABLES = {"A": table_a, "B": table_b, "K": table_k, "L": table_l, "P": lambda: {"pretrain": {}}, "U": table_u}
