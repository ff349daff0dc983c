"""What a step will cost on TPUs or GPUs, read from their compilers on a machine that has none.

    pip install -e '.[tpu]'                                                          # for TPUs
    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V  (V: jax's)        # for GPUs; no CUDA needed
    python benchmarks/aot.py v5e:2x4                                                 # ResNet-50, ProxyAnchor, 224 px
    python benchmarks/aot.py v5e:16x16 --per_chip 128 --loss multi_similarity
    python benchmarks/aot.py h100:8 --trunk vit_b16 --largest
    python benchmarks/aot.py v5e:2x4 --step embed retrieval --set eval.batch_size=1024

The first argument is a chip and its arrangement: v4:2x2x1, v5p:2x2x2, v5e:4x4, v6e:8x8 as Cloud TPU calls them; h100:8,
a100:1. Printed are memory per chip, arithmetic, bytes, every collective, the time that arithmetic, memory and links
would take alone at the data sheet's numbers, which of them is longest, and the images/s that follow: an upper bound,
since the three do not overlap completely and nothing reaches its data sheet. A step that does not fit is refused;
--largest looks for the largest batch that does.

All numbers are the compiler's; nothing has been run. Without the GPU, its compiler cannot try out its algorithms
(autotuning), so memory and fusions of a GPU's program differ somewhat from those of a run; bytes are the operands and
results of its kernels. Arithmetic in float32 counts at the peak for bfloat16. For TPUs a ResNet-50 takes minutes.
"""

import argparse
import ast
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import chips
import compiled

TILE = 4096  # rows of a tile of distances on an accelerator
STEPS = ("train", "embed", "retrieval")
# libtpu then describes TPUs without looking for one; an instance of it that another process uses is not in the way.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def settings_of(options):
    """The settings of the run whose step is compiled."""
    from idml_jax import default_config
    from idml_jax.errors import UserError
    from idml_jax.training import recipes
    from idml_jax.training.fields import value_of
    from idml_jax.training.settings import check_known

    try:
        config = recipes.get_config(options.config) if options.config else default_config()
    except UserError as error:
        raise SystemExit(f"--config {error}") from None
    plain = {
        "model.name": options.trunk,
        "loss.name": options.loss,
        "data.image_size": options.pixels,
        "optim.accumulate": options.accumulate,
        "optim.ema": options.ema,
        "memory.size": options.memory,
        "sharding.partners": options.partners,
        "sharding.proxies": options.proxies,
        "model.dtype": options.dtype,
        "task": options.task,
        "model.remat": options.remat or None,
        "ism.enabled": False if options.plain else None,
    }
    for word in options.set:
        name, found, value = word.partition("=")
        if not found:
            raise SystemExit(f"--set {word}: write name=value, for example model.pooling=max")
        try:
            plain[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            plain[name] = value
    try:
        with config.unlocked():
            config.update_from_flattened_dict({k: v for k, v in plain.items() if v is not None})
            if options.task == "classification" and config.eval.best_metric not in ("top1", "top5"):
                config.eval.best_metric = "top1"
        check_known(config)
    except (KeyError, TypeError, UserError) as error:
        raise SystemExit(f"no such setting, or not of this type: {error}") from None
    for field in ("optim.cached_features", "loss.relation", "loss.levels"):
        if value := value_of(config, field):
            raise SystemExit(f"{field} = {value!r} depends on the images of a run; this tool compiles without them")
    return config


def setup_of(config, classes: int, mesh):
    """The fixed parts of the train step, as ``training.build`` makes them from settings and data."""
    from idml_jax.training import build, steps
    from idml_jax.training.config_checks import validate
    from idml_jax.training.learning import learning_of
    from idml_jax.training.tasks import task_of

    validate(config)
    task, per_epoch = task_of(config), 100
    model = task.model(config, classes)
    learning = learning_of(config, model, build.image_shape(config))
    per_class = config.data.per_class if config.data.per_class >= 0 else task.images_per_class(config)
    return steps.StepSetup(
        model=model,
        objective=task.criterion(config, classes, per_epoch, mesh),
        optimizer=build.optimizer_of(config, per_epoch, learning),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        mixup_alpha=task.mixup_alpha(config),
        seed=config.seed,
        accumulate=config.optim.accumulate,
        ema=config.optim.ema,
        near=0 if config.sharding.partners == "any" else max(1, per_class),
    )


def turns(gallery: int, devices: int) -> int:
    """Number of tiles of distances that a device computes in a retrieval step, as ``metrics.ranking`` shares them."""
    count = -(-gallery // TILE)
    return count + -(-(count * (count - 1) // 2) // devices)  # those with the targets on every device


def shapes(tree, places):
    """Shapes and places of arrays that do not exist."""
    import jax

    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def lowered(step: str, config, batch: int, classes: int, gallery: int, mesh):
    """A step traced for the mesh, ready to be compiled."""
    with mock.patch("jax.default_backend", lambda: mesh.devices.flat[0].platform):  # which layers ask while they trace
        return _lowered(step, config, batch, classes, gallery, mesh)


def _lowered(step: str, config, batch: int, classes: int, gallery: int, mesh):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from idml_jax.metrics import tiles
    from idml_jax.runtime import sharding
    from idml_jax.training import build, embedder, steps
    from idml_jax.training.state import create_state

    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    some = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    if step == "retrieval":
        # The images search each other, each with 4 others of its class.
        tile, width, count = TILE, config.model.embedding_dim, -(-gallery // TILE)
        work = turns(gallery, mesh.size)
        blocks = tiles.Blocks(
            some((count, tile, width), jnp.float32, whole),
            some((count, tile), jnp.float32, whole),
            some((count, tile), jnp.int32, whole),
        )
        targets = tiles.Targets(
            some((count, 4, tile), jnp.int32, whole),
            some((count, 4, tile), jnp.int32, whole),
            some((count,), jnp.int32, whole),
        )
        lists = some((mesh.size, work, 4), jnp.int32, rows), some((mesh.size,), jnp.int32, rows)
        return tiles._count_before.lower(blocks, None, targets, *lists, mesh=mesh)
    setup, shape = setup_of(config, classes, mesh), build.image_shape(config)
    state = jax.eval_shape(
        lambda key: create_state(key, setup.model, setup.objective, setup.optimizer, shape, setup.ema > 0),
        jax.random.key(0),
    )
    state = shapes(state, sharding.placement(state, mesh, setup.objective.split))
    images = some((batch, *shape), jnp.uint8, rows)
    if step == "embed":
        return embedder.jit_embed_step.lower(
            state.variables, images, network=embedder.Network(setup.model, setup.mean, setup.std)
        )
    data = {"image": images, "label": some((batch,), jnp.int32, rows)}
    return steps.jit_train_step.lower(state, data, setup=setup)


def useful_operations(config, classes: int, step: str, mesh) -> float:
    """Arithmetic that an image needs: the trunk's forward pass, three times for a train step, twice that with Mixup.

    Where only a part of the trunk learns, a train step needs the forward pass and that part's gradient.
    """
    import jax
    import jax.numpy as jnp

    from idml_jax.models import EmbeddingModel
    from idml_jax.training import build
    from idml_jax.training.learning import replaced

    setup, shape = setup_of(config, classes, mesh), build.image_shape(config)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(setup.model.init, jax.random.key(0), images)
    forward = lambda v, x: setup.model.apply(v, x, method=EmbeddingModel.features)
    once = jax.jit(forward).lower(variables, images).cost_analysis()["flops"]
    if step != "train":
        return once
    learning, times = setup.optimizer.trunk, 2 if setup.mixup_alpha and config.task == "retrieval" else 1
    if learning.everything:
        return 3 * times * once
    trunk = variables["params"]["trunk"]

    def total(part, rest, x):
        params = {**rest["params"], "trunk": replaced(rest["params"]["trunk"], part)}
        return jnp.sum(forward({**rest, "params": params}, x).astype(jnp.float32))

    part = learning.learning(trunk)
    if not jax.tree.leaves(part):
        return times * once
    return times * jax.jit(jax.grad(total)).lower(part, variables, images).cost_analysis()["flops"]


def room(name: str) -> float:
    """Bytes of a chip that a program may use; for a TPU its compiler decides."""
    return chips.CHIPS[name].memory * 2**30 * chips.GPU_SHARE if name in chips.GPUS else float("inf")


def checked(program: compiled.Program, name: str) -> compiled.Program:
    """The program, if it fits.

    Raises:
      DoesNotFit: otherwise.
    """
    if program.memory > room(name):
        raise compiled.DoesNotFit(
            f"it needs {program.memory / 2**30:.1f} GiB of {room(name) / 2**30:.1f} GiB that jax reserves"
        )
    return program


def largest_batch(attempt, first: int, multiple: int, most: int = 6) -> tuple[int, compiled.Program | None]:
    """The largest batch that fits, to a sixteenth of itself, by bisection; memory of the first try guides the second.

    Args:
      attempt: function from a batch to its program; raises ``DoesNotFit``.
      first: batch to start from.
      multiple: the batch is a multiple of this.
      most: number of compilations.

    Returns:
      The batch, 0 if none fits, and its program.
    """
    low, high, found, batch = 0, 0, None, first
    for _ in range(most):
        try:
            found, low = attempt(batch), batch
        except compiled.DoesNotFit:
            high = batch
        if high and high - low <= max(multiple, low // 16):
            break
        batch = (low + high) // 2 if high else 2 * low
        batch = max(multiple, batch // multiple * multiple)
        if batch in (low, high):
            break
    return low, found


def report(options, config, batch: int, program: compiled.Program, useful: float, step: str, devices: int) -> dict:
    """The numbers of a step as a dictionary, and printed."""
    target = options.target
    chip = chips.CHIPS[target.split(":")[0]]
    received = sum(c.received for c in program.exchanges)
    # Without the compiler's word at least the trunk's model is computed.
    limit = chips.bounds(chip, max(program.operations, useful * batch / devices), program.read, received)
    images = batch / limit.seconds if step != "retrieval" else 0.0
    mfu = useful * images / devices / chip.peak / 1e12
    what = f"{config.model.name}, {config.data.image_size} px, batch {batch} ({batch // devices} a chip)"
    if step == "train":
        what += f", {config.loss.name if config.task == 'retrieval' else config.task}"
        what += ", introspective" if config.ism.enabled and config.task == "retrieval" else ""
    if step == "retrieval":
        what = f"{options.gallery} images, {config.model.embedding_dim} numbers each"
    print(f"{step} step on {target} ({devices} x {chip.name}): {what}; compiled in {program.seconds:.0f} s")
    parts = ", ".join(f"{k} {getattr(program, k) / 2**30:.3f}" for k in ("arguments", "temporaries", "outputs", "code"))
    print(f"  memory of a chip: {program.memory / 2**30:.2f} of {chip.memory:g} GiB; {parts}")
    total = f"{program.operations / 1e12:.3f} TFLOP" if program.operations else "arithmetic unknown"
    print(
        f"  work of a chip: {total} (trunk: {useful * batch / devices / 1e12:.3f}), "
        f"{program.read / 1e9:.2f} GB read and written, {received / 1e9:.4f} GB received"
    )
    for c in program.exchanges:
        shape = c.shape if len(c.shape) <= 90 else c.shape[:80] + f" ... {len(c.shape.split())} arrays"
        print(f"    {c.count:4d} x {c.kind:18} {c.bytes / 2**20:10.3f} MiB over {c.group}: {shape}")
    times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in limit._asdict().items())
    print(f"  at best: {times}; {limit.binds} binds")
    if step != "retrieval":
        print(f"  upper bound: {images:,.0f} images/s, {images / devices:,.0f} a chip, MFU {100 * mfu:.0f} %")
    row = {
        "target": target,
        "step": step,
        "trunk": config.model.name,
        "pixels": config.data.image_size,
        "loss": config.loss.name if config.task == "retrieval" else config.task,
        "batch": batch,
        "devices": devices,
        **{k: getattr(program, k) for k in ("arguments", "temporaries", "outputs", "code", "memory", "seconds")},
        "operations": program.operations,
        "read": program.read,
        "received": received,
        "useful": useful * batch / devices,
        "bounds": limit._asdict(),
        "binds": limit.binds,
        "images_per_second": images,
        "mfu": mfu,
        "collectives": compiled.totals(program.exchanges),
    }
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def arguments(words=None):
    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="chip and arrangement: v5e:2x4, h100:8")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=["train"])
    parser.add_argument("--config", default="", help="settings of a run; the defaults otherwise")
    parser.add_argument("--per_chip", type=count, default=128, help="images of a batch on one chip")
    parser.add_argument("--largest", action="store_true", help="find the largest batch that fits")
    parser.add_argument("--trunk", help="config.model.name")
    parser.add_argument("--loss", help="config.loss.name")
    parser.add_argument("--plain", action="store_true", help="the loss on the plain metric")
    parser.add_argument("--task", choices=("retrieval", "classification"))
    parser.add_argument("--pixels", type=count, help="config.data.image_size")
    parser.add_argument("--classes", type=count, default=100)
    parser.add_argument("--dtype", default="bfloat16", help="of the trunk")
    parser.add_argument("--accumulate", type=count, help="parts of a batch")
    parser.add_argument("--remat", action="store_true", help="activations recomputed")
    parser.add_argument("--ema", type=float, help="moving averages of the weights")
    parser.add_argument("--memory", type=int, help="size of a cross-batch memory")
    parser.add_argument("--proxies", choices=("auto", "split", "whole"))
    parser.add_argument("--partners", choices=("any", "near"))
    parser.add_argument("--gallery", type=count, default=60_502, help="images of the retrieval step")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--keep", default="", help="file for the compiled text")
    parser.add_argument("--json", default="", help="file to which a line per step is added")
    return parser.parse_args(words)


def main(options) -> None:
    for variable, value in ENVIRONMENT.items():  # before jax is imported
        os.environ.setdefault(variable, value)
    if options.target.split(":")[0] in chips.GPUS:
        # There is no GPU to time algorithms on, and Triton's matrix products need that.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    from idml_jax.errors import UserError
    from idml_jax.runtime import sharding
    from idml_jax.runtime.files import first_line
    from idml_jax.training.config_checks import validate
    from idml_jax.training.tasks import task_of

    config = settings_of(options)
    for flag, text in (("--json", options.json), ("--keep", options.keep)):  # before minutes of compiling
        path = Path(text)
        if text and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            raise SystemExit(f"{flag} {text}: is a folder, or cannot be written")
    chip, devices = chips.devices_of(options.target)
    mesh, count, name = sharding.data_mesh(devices), len(devices), options.target.split(":")[0]
    config.batch_size = options.per_chip * count
    try:
        validate(config)
        task_of(config).model(config, options.classes)  # refuses an unknown network
    except UserError as error:
        raise SystemExit(f"settings that no run could have: {error}") from None
    if "train" in options.step and options.per_chip % config.optim.accumulate:
        raise SystemExit(f"--per_chip {options.per_chip} must be a multiple of --accumulate {config.optim.accumulate}")
    for step in options.step:

        def attempt(batch: int, step: str = step) -> compiled.Program:
            config.batch_size = batch
            what = lowered(step, config, batch, options.classes, options.gallery, mesh)
            return checked(compiled.compile_step(what, count, options.keep), name)

        batch = options.per_chip * count
        try:
            if options.largest and step != "retrieval":
                batch, program = largest_batch(attempt, batch, count * max(1, config.optim.accumulate))
                if program is None:
                    raise SystemExit(f"not even one image a chip fits into the {chip.memory:g} GiB of a {chip.name}")
            else:
                program = attempt(batch)
        except compiled.DoesNotFit as error:
            raise SystemExit(
                f"the {step} step with {batch} images ({options.per_chip} a chip) does not fit into a {chip.name}: "
                f"{error}; --largest finds the largest batch that does; --remat or --accumulate N need less memory"
            ) from None
        except (UserError, TypeError, ValueError) as error:  # of networks and losses that do not fit the images
            raise SystemExit(f"the {step} step cannot be traced: {first_line(error)}") from None
        if step == "retrieval":  # whose loop the compiler counts once
            often = turns(options.gallery, count)
            program = program._replace(operations=program.operations * often, read=program.read * often)
        useful = 0.0 if step == "retrieval" else useful_operations(config, options.classes, step, mesh)
        report(options, config, batch, program, useful, step, count)


if __name__ == "__main__":
    main(arguments())
