"""Memory per device of a train step with very many classes: proxies on every device, and split over the devices.

    python benchmarks/many_classes.py                                # 1,000,000 x 512, 8 devices; compiled, not run
    python benchmarks/many_classes.py --classes 100000 --steps 3     # runs it too
    python benchmarks/many_classes.py --losses proxy_nca --plain
    python benchmarks/many_classes.py --classes 100000 --losses arcface --only split --batch 16 --steps 3
    python benchmarks/many_classes.py --losses arcface --shares 1.0 0.1 --devices 1 --only split --batch 32 --steps 5
    python benchmarks/many_classes.py --processes 8 --only split --losses proxy_anchor --batch 8 --steps 2

On a CPU, --devices simulated devices are used, each with the program and arrays of a real one; on GPUs or TPUs, all
existing devices. With --processes the devices are divided among that many processes on this machine, which communicate
over sockets as hosts do. The step is the real one (``steps.train_step``: Mixup, AdamW,
clipping) behind a tiny trunk, so nearly all of it is proxies, their moments and gradient, and the pair matrices of
batch and classes.

One row per program, in MB (1e6 bytes) per device: ``state`` is the state between two steps plus the batch; ``work`` is
the temporary memory that XLA plans for the step; ``sum`` is both, with the new state replacing the old; ``moved`` is
what the step reads and writes by XLA's cost model. ``whole`` says whether an array with all rows occurs anywhere in
the program of a device. With --steps: ``held``, bytes of the live arrays on the fullest device after the steps, seconds
per step (the fastest), and the peak resident set of the largest process, which on a CPU covers all its devices. With
several --shares (of the classes that a batch is compared with, for the softmax losses) the programs of a loss take
turns, step by step, so that other load on the machine affects all; the ratio is of the fastest steps. Exit code 1 if a
split program contains an array with all rows.
"""

import argparse
import itertools
import os
import re
import resource
import socket
import subprocess
import sys
import time

LOSSES = ("proxy_anchor", "proxy_nca")
OTHERS = ("normalized_softmax", "cosface", "arcface", "subcenter_arcface", "soft_triple")
PIXELS = 8


def make_setup(name, arguments, mesh, share):
    """The protocol's loss and optimizer behind a trunk of two small layers."""
    from idml_jax.ism import Metric
    from idml_jax.models import EmbeddingModel
    from idml_jax.models.convnet import ConvNet
    from idml_jax.models.heads import Heads
    from idml_jax.training.optim import GroupOptimizer, Schedule
    from idml_jax.training.steps import StepSetup
    from idml_jax.training.tasks.objective import Objective

    width = arguments.dimension
    model = EmbeddingModel(
        ConvNet(depth=2, width=8, frozen_statistics=True), Heads(width, width, uncertainty_hidden=128)
    )
    objective = Objective(
        loss=name,
        options=(),
        metric=Metric("plain" if arguments.plain else "relative"),
        num_classes=arguments.classes,
        dim=width,
        uncertainty_dim=width,
        mesh=mesh,
        class_share=share,
    )
    rule = GroupOptimizer(
        name="adamw",
        schedule=Schedule("constant", 1e-4, 100),
        factors=(("proxies", 100.0),),
        weight_decay=1e-4,
        clip_value=10.0,
    )
    return StepSetup(model=model, objective=objective, optimizer=rule, mean=(0.5,), std=(0.25,), mixup_alpha=1.0)


def planned(setup, mesh, batch):
    """The compiled step; nothing is computed."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from idml_jax.runtime import sharding
    from idml_jax.training import steps
    from idml_jax.training.state import create_state

    create = lambda: create_state(jax.random.key(0), setup.model, setup.objective, setup.optimizer, (PIXELS, PIXELS, 1))
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    state = jax.eval_shape(create)
    state = jax.tree.map(put, state, sharding.placement(state, mesh, setup.objective.split))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    data = {
        "image": jax.ShapeDtypeStruct((batch, PIXELS, PIXELS, 1), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows),
    }
    return steps.jit_train_step.lower(state, data, setup=setup).compile()


def measured(programs, mesh, batch, count):
    """Of programs that take turns: bytes on the fullest device after the steps, seconds of the fastest, last loss."""
    import jax
    import numpy as np

    from idml_jax.runtime import sharding
    from idml_jax.training.state import create_state_on

    shape = (PIXELS, PIXELS, 1)
    setup = programs[0][0]
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 256, (batch, *shape), np.uint8),
        "label": rng.integers(0, setup.objective.num_classes, batch).astype(np.int32),
    }
    mine = lambda rows: np.split(rows, jax.process_count())[jax.process_index()]
    data = sharding.shard_batch(jax.tree.map(mine, data), mesh)
    states = [create_state_on(mesh, jax.random.key(0), s.model, s.objective, s.optimizer, shape) for s, _ in programs]
    seconds, losses = [[] for _ in programs], [0.0] * len(programs)
    for _ in range(count):
        for turn, (_, compiled) in enumerate(programs):
            start = time.perf_counter()
            states[turn], metrics = compiled(states[turn], data)
            losses[turn] = float(metrics["loss"])
            seconds[turn].append(time.perf_counter() - start)
    assert np.isfinite(losses).all(), losses
    found = []
    for state, times, loss in zip(states, seconds, losses, strict=True):
        held = dict.fromkeys(mesh.devices.flat, 0)
        for leaf in jax.tree.leaves(state):
            for part in leaf.addressable_shards:
                held[part.device] += part.data.nbytes
        found.append((max(held.values()), min(times), loss))
    return found


def in_processes(arguments):
    """The same command in so many processes, with the devices shared out; returns the exit code of the run."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{opened.getsockname()[1]}"
    started = [
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--coordinator", address, "--process-index", str(i)])
        for i in range(arguments.processes)
    ]
    try:
        return int(any([process.wait() for process in started]))
    finally:
        for process in started:
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=120)
    parser.add_argument("--devices", type=int, default=8, help="forced ones, on a CPU")
    parser.add_argument("--processes", type=int, default=1, help="that share the devices")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--losses", nargs="+", choices=LOSSES + OTHERS, default=LOSSES)
    parser.add_argument("--shares", nargs="+", type=float, default=(1.0,), help="of the classes, compared in a step")
    parser.add_argument("--plain", action="store_true", help="without introspection")
    parser.add_argument("--only", choices=("split", "whole"), help="one of the two")
    parser.add_argument("--steps", type=int, default=0, help="run so many, at least 2; split proxies only")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process-index", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.devices % arguments.processes:
        parser.error(f"--devices {arguments.devices} do not share out to --processes {arguments.processes}")
    if arguments.devices < 1 or 3840 % arguments.devices:
        parser.error(
            f"--devices {arguments.devices}: the rows of split proxies are a multiple of 3,840, which it must divide"
        )
    if arguments.batch < 1 or arguments.batch % arguments.devices:
        parser.error(f"--batch {arguments.batch} must be a multiple of --devices {arguments.devices}")
    if arguments.processes > 1 and arguments.coordinator is None:
        sys.exit(in_processes(arguments))
    forced = f" --xla_force_host_platform_device_count={arguments.devices // arguments.processes}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + forced

    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from idml_jax.runtime import hosts, sharding

    if arguments.coordinator is not None:
        hosts.connect(arguments.coordinator, arguments.processes, arguments.process_index)
    tell = print if arguments.process_index == 0 else lambda *_, **__: None
    mesh, classes = sharding.data_mesh(), arguments.classes
    rows, failed = sharding.padded_rows(classes), False
    sharding.check_rows(classes, mesh)
    sharding.check_divisible(arguments.batch, mesh, "--batch")
    tell(
        f"{classes:,} classes x {arguments.dimension}, batch {arguments.batch}, {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s) in {jax.process_count()} process(es); table "
        f"{4e-6 * arguments.dimension * classes:,.0f} MB, one matrix {4e-6 * arguments.batch * classes:,.0f} MB"
    )
    tell(f"{'loss':18s} {'proxies':8s} {'share':>5s} {'state':>8s} {'work':>8s} {'sum':>8s} {'moved':>8s}  whole")
    ways = ("whole", "split") if arguments.only is None else (arguments.only,)
    for name, way in itertools.product(arguments.losses, ways):
        split, programs = way == "split", []
        for share in arguments.shares:
            setup = make_setup(name, arguments, mesh if split else None, share)
            compiled = planned(setup, mesh, arguments.batch)
            programs.append((setup, compiled))
            memory = compiled.memory_analysis()
            size = rows if split else classes
            found = re.search(rf"[\[,]{size}[\],]", compiled.as_text()) is not None
            failed |= split and mesh.size > 1 and found
            state, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            # What is donated is written over.
            work += max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
            moved = (compiled.cost_analysis() or {}).get("bytes accessed", float("nan"))
            told = " ".join(f"{x / 1e6:8,.0f}" for x in (state, work, state + work, moved))
            tell(f"{name:18s} {way:8s} {share:5g} {told}  {'yes' if found else 'no'}", flush=True)
        if not (arguments.steps and split):
            continue
        results = measured(programs, mesh, arguments.batch, max(arguments.steps, 2))
        for share, (held, seconds, loss) in zip(arguments.shares, results, strict=True):
            faster = f", {results[0][1] / seconds:.2f} times as fast as the first" if len(results) > 1 else ""
            tell(
                f"  run, share {share:g}: held {held / 1e6:,.0f} MB a device, {seconds:.2f} s a step{faster}, "
                f"loss {loss:.3f}"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = multihost_utils.process_allgather(np.asarray([peak / 1e9])).max()
        tell(f"  peak of {'the fullest' if jax.process_count() > 1 else 'the'} process {peak:.1f} GB", flush=True)
    if failed:
        tell("error: the program of one device knows an array with the rows of all", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
