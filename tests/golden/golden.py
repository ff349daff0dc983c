"""Golden outputs: computed before the code was reorganised, and still required.

Rounding depends on the compiler's options, so there is a file for each of the two sets of options that are used:
``golden.json`` for ``COMPILED`` of ``compiler_options.py``, with which they were first computed, and
``golden_quick.json`` for ``QUICK``, with which the ordinary tests run. ``python tests/golden/golden.py`` writes the
first anew, with ``--quick`` the second: only to be done when the numbers are meant to change, and then said in the
commit.
``IDML_JAX_TESTS=compiled pytest tests/test_golden.py`` compares with the first file.

``runs/`` was written by the code of version 0.1.0 and is never made again: it stands for the run folders that users
have. ``fields_0_1_0.json`` lists that version's settings and options.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import compiler_options

    KIND = "quick" if "--quick" in sys.argv else "compiled"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {compiler_options.of_tests(KIND)}"

import cv2
import jax
import numpy as np

from idml_jax import default_config

HERE = Path(__file__).resolve().parent
PIXELS = 16
CLASSES = 6
PER_CLASS = 8


def machine() -> str:
    """What rounding may depend on: the processor's name and the version of the compiler."""
    path = Path("/proc/cpuinfo")
    known = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    known = {name.strip(): value.strip() for name, value in known.items()}
    features = [f for f in known.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    options = "cpu_max_isa|backend_optimization_level|cpu_use_fusion_emitters"
    limit = sorted(set(re.findall(rf"xla_(?:{options})=\w+", os.environ["XLA_FLAGS"])))
    digest = hashlib.sha256(" ".join(features + limit).encode()).hexdigest()[:8]
    return f"{known.get('model name', platform.processor())}, features {digest}, jaxlib {jax.lib.__version__}"


def file_of(kind: str) -> Path:
    """The golden numbers for the options of a kind of tests."""
    return HERE / ("golden_quick.json" if kind == "quick" else "golden.json")


def pictures(count: int, seed: int) -> np.ndarray:
    """``[count, PIXELS, PIXELS, 1]`` uint8, from integers alone, so that every machine draws the same."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows, columns = np.mgrid[:PIXELS, :PIXELS]
    kinds = np.arange(count) % CLASSES
    stripes = [((k + 1) * rows + (CLASSES - k) * columns) // 3 % 2 * 120 for k in kinds]
    return (np.stack(stripes) + rng.integers(0, 100, (count, PIXELS, PIXELS))).astype(np.uint8)[..., None]


def folder(root: Path, shared: bool) -> Path:
    """An image folder; training and test classes are the same ones if ``shared``."""
    for number, split in enumerate(("train", "test")):
        first = 0 if shared else number * CLASSES
        for i, picture in enumerate(pictures(CLASSES * PER_CLASS, seed=number)):
            target = root / split / f"class_{first + i % CLASSES:02d}"
            target.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(target / f"{i // CLASSES}.png"), picture[..., 0])
    return root


def config_of(root: str, **changes):
    """Settings of a tiny run."""
    config = default_config()
    flat = {
        "batch_size": 24,
        "epochs": 2,
        "data.root": root,
        "data.image_size": PIXELS,
        "data.resize": PIXELS,
        "data.channels": 1,
        "data.mean": (0.5,),
        "data.std": (0.25,),
        "data.crop_scale": (0.6, 1.0),
        "model.name": "resnet_tiny",
        "model.embedding_dim": 8,
        "model.uncertainty_dim": 4,
        "model.uncertainty_hidden": 4,
        "model.batchnorm": "live",
        "optim.warmup_epochs": 0,
        "optim.learning_rate": 3e-3,
        "optim.proxy_lr_factor": 10.0,
        "eval.batch_size": 24,
        "eval.ambiguity_images": 16,
        "log.tensorboard": False,
        "log.every_steps": 1,
        "checkpoint.keep_latest": 1,
        "sharding.partners": "any",  # what version 0.1.0 did
    }
    with config.unlocked():
        config.update_from_flattened_dict(flat | changes)
    return config


CLASSIFIER = {
    "task": "classification", "mixup.enabled": False, "classification.mixing": "cutmix",
    "classification.per_sample": True, "model.uncertainty_head": "linear",
    "model.pooling": "avg", "optim.name": "sgd", "optim.learning_rate": 0.05, "optim.ema": 0.9,
    "eval.best_metric": "top1",
}  # fmt: skip
STEPS = {
    "retrieval_mixup_ism": {},
    "retrieval_ranking": {"ism.ranking": 0.1, "ism.prior": 0.1, "ism.variant": "absolute"},
    "retrieval_released": {"ism.variant": "released", "mixup.enabled": False},
    "pairs_with_memory": {"loss.name": "multi_similarity", "memory.size": 48, "memory.warmup_epochs": 0},
    "margin_learned": {"loss.name": "margin_distance_weighted", "loss.learned": "per_class"},
    "contrastive_plain": {"loss.name": "contrastive", "ism.enabled": False, "mixup.enabled": False},
    "accumulated": {"optim.accumulate": 3, "model.batchnorm": "frozen", "batch_size": 24},
    "classification_cutmix": CLASSIFIER | {"model.name": "pyramidnet_tiny"},
}
RUNS = {
    "retrieval": {"data.validation_classes": 0.34, "epochs": 1, "optim.name": "sgd", "optim.momentum": 0.0},
    "classification": CLASSIFIER | {"epochs": 1},
}
# Metrics whose numbers changed when the confidence came to use the classes of the neighbours. Metrics of today that the
# runs of version 0.1.0 do not have: the vote, open-set identification, and scores that use classes.
REFITTED = re.compile(r"(corrupted/)?(R-AUROC|AURC|E-AURC)\(confidence\)|answered(_precision)?")
STOPPED = {"data.validation_classes": 0.34, "epochs": 2}


def leaves(tree) -> dict:
    """Of every array a digest of its bytes, its length and 3 of its values."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        flat = array.astype(np.float64).ravel()
        picked = flat[np.linspace(0, flat.size - 1, min(3, flat.size)).astype(int)] if flat.size else flat
        found[jax.tree_util.keystr(path)] = {
            "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16],
            "norm": float(f"{np.linalg.norm(flat):.7g}"),
            "values": [float(f"{value:.7g}") for value in picked],
        }
    return found


def three_steps(name: str, root: Path) -> dict:
    """Metrics and parameters of three steps of training on given batches."""
    from idml_jax.runtime import sharding
    from idml_jax.training import steps, train

    run = train.build(config_of(str(root), **STEPS[name]))
    state, metrics = run.initial_state(), []
    for step in range(3):
        batch = {"image": pictures(24, 10 + step), "label": np.arange(24, dtype=np.int32) % CLASSES}
        state, found = steps.jit_train_step(state, sharding.shard_batch(batch, run.mesh), setup=run.setup)
        metrics.append({k: float(v) for k, v in sorted(found.items())})
    return {
        "metrics": metrics,
        "state": leaves(
            {
                "params": state.params,
                "batch_stats": state.batch_stats,
                "opt_state": state.opt_state,
                "memory": state.memory,
            }
        ),
    }


def metrics_of(result: dict) -> dict:
    """The parts of a ``result.json`` that must not change."""
    return {key: result[key] for key in ("untrained", "final", "best", "history")}


def write_runs() -> None:
    """Writes ``runs/``: of each task a finished run, and one of retrieval that was stopped inside an epoch."""
    import signal

    from idml_jax.runtime import interrupt
    from idml_jax.training import loop, train

    shutil.rmtree(HERE / "runs", ignore_errors=True)
    for name, changes in RUNS.items():
        root = folder(HERE / "images" / name, shared=name == "classification")
        train.train_and_evaluate(config_of(str(root), **changes), HERE / "runs" / name)
    real, calls = loop.steps.jit_train_step, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    loop.steps.jit_train_step = stops
    try:
        train.train_and_evaluate(config_of(str(HERE / "images" / "retrieval"), **STOPPED), HERE / "runs" / "stopped")
        raise AssertionError("the run was not stopped")
    except interrupt.Stopped:
        pass
    finally:
        loop.steps.jit_train_step = real
    # No path of the machine that wrote them.
    for name in ("config.json", "result.json", "commit_success.txt"):
        for path in (HERE / "runs").rglob(name):
            text = path.read_text().replace(str(HERE / "images"), "images").replace(f"{HERE}/", "")
            path.write_text(text)


def stopped_config(root: Path):
    """Settings of the run that was stopped."""
    return config_of(str(root), **STOPPED)


def copied(name: str, root: Path, target: Path) -> Path:
    """A run folder of version 0.1.0, with its data where the images of this call are."""
    shutil.copytree(HERE / "runs" / name, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["data"]["root"] = str(root)
    path.write_text(json.dumps(config))
    return target


def resumed(workdir: Path, root: Path) -> dict:
    """The result of the stopped run of version 0.1.0 after it went on."""
    from idml_jax.training import train

    train.train_and_evaluate(stopped_config(root), workdir)
    return metrics_of(json.loads((workdir / "result.json").read_text()))


def vectors(workdir: Path, scratch: Path) -> dict:
    """What the exported program of a run and ``embed`` give for some images."""
    from jax import export as jax_export

    from idml_jax import export, load

    model = load(workdir)
    out = export.write(model, scratch / "exported", ("cpu",))
    program = jax_export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    given = program.call(pictures(10, 99))
    return {name: np.asarray(value, np.float64).round(9).tolist() for name, value in sorted(given.items())}


def main() -> None:
    import tempfile

    from idml_jax.training import train

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        roots = {False: folder(scratch / "disjoint", False), True: folder(scratch / "shared", True)}
        of = lambda changes: roots[changes.get("task") == "classification"]
        if not (HERE / "runs").exists():
            write_runs()
            shutil.rmtree(HERE / "images")
        found = {
            "machine": machine(),
            "steps": {name: three_steps(name, of(changes)) for name, changes in STEPS.items()},
            "results": {
                name: metrics_of(train.train_and_evaluate(config_of(str(of(changes)), **changes), scratch / name))
                for name, changes in RUNS.items()
            },
            "resumed": resumed(copied("stopped", roots[False], scratch / "stopped"), roots[False]),
            "vectors": {name: vectors(HERE / "runs" / name, scratch / f"of_{name}") for name in RUNS},
        }
    text = json.dumps(found, sort_keys=True, default=float)
    file_of(KIND).write_text(text.replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    main()
