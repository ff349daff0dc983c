"""Time and memory of every loss, value and gradient, against pytorch-metric-learning on the same device in one run.

    python benchmarks/losses.py                       # the whole table in docs/losses.md, some minutes
    python benchmarks/losses.py --sizes 256 --losses contrastive fast_ap --rounds 20
    python benchmarks/losses.py --introspective       # ours on the introspective metric, theirs as it is
    python benchmarks/losses.py --compiled --losses smooth_ap --sizes 4096    # memory of the compiled program, not run
    python benchmarks/losses.py --gpu --sizes 1024 4096                       # both libraries on a GPU

Needs the extra 'parity'. Each combination of loss, size and library runs in a separate process, so that peak memory is
measured separately. The processes of a loss and size alternate, so that other load on the machine affects all.
Times are minima over the rounds; a ratio above 1 means that this package is faster or needs less memory. "Products" are
the matrix products alone that value and gradient need, in jax: two for a matrix of a batch with itself, three for one
of a batch with proxies, twice that on the introspective metric where both sides are uncertain; "at most" is the time of
pytorch-metric-learning over theirs. Memory is the peak resident set minus its size before the first evaluation: it
includes compilation, but not libraries and inputs. As in training, both libraries have huge pages where the system
offers them (docs/networks.md); ``GLIBC_TUNABLES= python benchmarks/losses.py`` measures without.

On a GPU a library has one process for all losses. Memory is the device's, without arguments: of ours what the compiled
program allocates, of theirs the allocator's peak. A time ends when the value has reached the host.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from idml_jax.runtime import huge_pages

DIMENSION, PER_CLASS = 512, 4
LOSSES = (
    "contrastive",
    "triplet_semihard",
    "margin_distance_weighted",
    "multi_similarity",
    "fast_ap",
    "proxy_nca",
    "proxy_anchor",
    "normalized_softmax",
    "cosface",
    "arcface",
    "subcenter_arcface",
    "soft_triple",
    "info_nce",
    "sup_con",
    "circle",
    "n_pair",
    "lifted_structure",
    "triplet_hard",
    "smooth_ap",
    "recall_at_k",
    "mc_info_nce",
    "elk",
    "hedged_instance",
)


# Losses that pytorch-metric-learning lacks, and those that read embeddings, not a matrix of them.
OURS_ALONE = ("recall_at_k", "mc_info_nce", "elk", "hedged_instance")
NO_MATRIX = ("mc_info_nce", "elk", "hedged_instance")


def our_loss(name, size, introspective):
    """The jitted value and gradient, and its arguments."""
    import jax
    import jax.numpy as jnp

    from idml_jax import ism, losses

    spec = losses.LOSSES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"semantic": jax.random.normal(keys[0], (size, DIMENSION))}
    if introspective:
        params["uncertainty"] = 0.1 * jax.random.normal(keys[1], (size, DIMENSION))
    if spec.references == "proxies":
        params["proxies"] = jax.random.normal(keys[2], (size // PER_CLASS * spec.centres, DIMENSION))
    read = ism.introspective_distance if spec.reads == "distance" else ism.introspective_similarity
    labels = jnp.arange(size) // PER_CLASS

    @jax.jit
    @jax.value_and_grad
    def loss(params, key):
        # Both libraries are given rows of any length; similarities normalise them themselves.
        unit = (lambda x: x) if spec.reads == "similarity" else ism.l2_normalize
        batch = ism.Embedding(unit(params["semantic"]), params.get("uncertainty"))
        references = classes = None
        if "proxies" in params:
            references = ism.Embedding(unit(params["proxies"]))
            classes = jnp.repeat(jnp.arange(size // PER_CLASS), spec.centres)
        options = {"key": key} if spec.needs_key else {}
        compared = batch if spec.reads == "embeddings" else read(batch, references)
        return spec.function(compared, losses.pairs_from_labels(labels, classes), **options)

    return loss, (params, jax.random.key(0))


def planned(program):
    """MiB that a compiled program allocates on its device for itself and its results."""
    analysis = program.memory_analysis()
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20


def our_step(name, size, options):
    """A function without arguments that computes value and gradient once, and one that gives its memory in MiB."""
    import jax

    loss, arguments = our_loss(name, size, options.introspective)
    if options.gpu:
        loss = loss.lower(*arguments).compile()
        return lambda: float(jax.block_until_ready(loss(*arguments))[0]), partial(planned, loss)
    before = peak_mib()
    return lambda: float(jax.block_until_ready(loss(*arguments))[0]), lambda: peak_mib() - before


def compiled(name, size, introspective):
    """Prints the memory that the compiled program allocates besides arguments and results."""
    loss, arguments = our_loss(name, size, introspective)
    analysis = loss.lower(*arguments).compile().memory_analysis()
    print(f"| {name} | {size} | {analysis.temp_size_in_bytes / 2**20:.0f} |", flush=True)


def their_step(name, size, options):
    """The same with pytorch-metric-learning."""
    import torch
    from pytorch_metric_learning import losses, miners, reducers

    torch.manual_seed(0)
    device = torch.device("cuda" if options.gpu else "cpu")
    classes = size // PER_CLASS
    loss, miner = {
        "contrastive": lambda: (losses.ContrastiveLoss(pos_margin=0, neg_margin=0.5), None),
        "triplet_semihard": lambda: (
            losses.TripletMarginLoss(margin=0.1),
            miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard"),
        ),
        "margin_distance_weighted": lambda: (losses.MarginLoss(margin=0.2, beta=1.2), miners.DistanceWeightedMiner()),
        "multi_similarity": lambda: (
            losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
            miners.MultiSimilarityMiner(epsilon=0.1),
        ),
        "fast_ap": lambda: (losses.FastAPLoss(num_bins=10), None),
        "proxy_nca": lambda: (losses.ProxyNCALoss(classes, DIMENSION, softmax_scale=32), None),
        "proxy_anchor": lambda: (losses.ProxyAnchorLoss(classes, DIMENSION), None),
        "normalized_softmax": lambda: (losses.NormalizedSoftmaxLoss(classes, DIMENSION), None),
        "cosface": lambda: (losses.CosFaceLoss(classes, DIMENSION), None),
        "arcface": lambda: (losses.ArcFaceLoss(classes, DIMENSION), None),
        "subcenter_arcface": lambda: (
            losses.SubCenterArcFaceLoss(num_classes=classes, embedding_size=DIMENSION),
            None,
        ),
        "soft_triple": lambda: (losses.SoftTripleLoss(classes, DIMENSION), None),
        "info_nce": lambda: (losses.NTXentLoss(), None),
        "sup_con": lambda: (losses.SupConLoss(), None),
        "circle": lambda: (losses.CircleLoss(), None),
        "n_pair": lambda: (losses.NPairsLoss(), None),
        "lifted_structure": lambda: (losses.GeneralizedLiftedStructureLoss(), None),
        "triplet_hard": lambda: (
            losses.TripletMarginLoss(margin=0.1, reducer=reducers.MeanReducer()),
            miners.BatchHardMiner(),
        ),
        "smooth_ap": lambda: (losses.SmoothAPLoss(), None),
    }[name]()
    loss = loss.to(device)
    embedding = torch.randn(size, DIMENSION, device=device, requires_grad=True)
    labels = torch.arange(size, device=device) // PER_CLASS

    def step():
        embedding.grad = None
        value = loss(embedding, labels, None if miner is None else miner(embedding, labels))
        value.backward()
        return value.item()

    if not options.gpu:
        before = peak_mib()
        return step, lambda: peak_mib() - before

    def memory():
        embedding.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    return step, memory


def products_step(name, size, options):
    """The matrix products alone: of all pairs, and of their gradient with each side that learns."""
    import jax

    from idml_jax import losses

    spec = losses.LOSSES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.random.normal(keys[0], (size, DIMENSION))
    proxies = spec.references == "proxies"
    other = jax.random.normal(keys[1], (size // PER_CLASS * spec.centres, DIMENSION)) if proxies else batch
    gradient = jax.random.normal(keys[2], (size, len(other)))
    product = lambda contracted: jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, (contracted, ((), ())), precision=jax.lax.Precision.HIGHEST)
    )
    of_pairs, of_rows, of_columns = product(((1,), (1,))), product(((1,), (0,))), product(((0,), (0,)))
    times = 2 if options.introspective and not proxies else 1

    def step():
        for _ in range(times):
            jax.block_until_ready(of_pairs(batch, other))
            jax.block_until_ready(of_rows(gradient, other))
            if proxies:
                jax.block_until_ready(of_columns(gradient, batch))

    return step, lambda: 0.0


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


MAKERS = {"ours": our_step, "theirs": their_step, "products": products_step}


def check_gpu(library):
    """Ends the process with the reason if its library has no GPU."""
    if library == "theirs":
        import torch

        found = torch.cuda.is_available()
    else:
        import jax

        found = jax.default_backend() == "gpu"
    if not found:
        sys.exit(f"--gpu: {'PyTorch' if library == 'theirs' else 'jax'} finds no GPU")


def work(library, options):
    """One process: evaluates a loss and size whenever a line names them, and reports as a line of JSON."""
    if options.gpu:
        check_gpu(library)
    else:  # a GPU's driver maps more address space than there is memory
        resource.setrlimit(resource.RLIMIT_AS, (int(options.limit_gib * 2**30),) * 2)
    if options.cores:  # before the libraries count them for their thread pools
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    missing = {"ours": (), "theirs": OURS_ALONE, "products": NO_MATRIX}[library]
    cases = [(name, size) for name in options.losses if name not in missing for size in options.sizes]
    # Compiling is the longest part of the work on a GPU, and threads compile side by side.
    with ThreadPoolExecutor(os.cpu_count() if library == "ours" and options.gpu else 1) as pool:
        made = {case: pool.submit(MAKERS[library], *case, options) for case in cases}
    for line in sys.stdin:
        question = json.loads(line)
        if question == ["ready"]:
            print("{}", flush=True)
            continue
        name, size, times = question
        try:
            step, memory = made[name, size].result()
            if not options.gpu:
                time.sleep(0.3)  # the other library's threads spin for up to 0.2 s after their last piece of work
            seconds = []
            for _ in range(times):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            answer = {"seconds": min(seconds), "mib": memory()}
        except Exception as error:
            if not options.gpu:
                raise
            answer = {"failure": (str(error).strip().splitlines() or [type(error).__name__])[0]}
            if library == "theirs":
                import torch

                torch.cuda.empty_cache()  # what it keeps of the GPU is the other library's room
        print(json.dumps(answer), flush=True)


class Process:
    """A process of ``work``."""

    def __init__(self, library, names, sizes, options):
        command = [sys.executable, __file__, "--worker", library, "--losses", *names, "--sizes", *map(str, sizes)]
        command += ["--limit-gib", str(options.limit_gib), "--cores", str(options.cores)]
        command += ["--introspective"] * options.introspective + ["--gpu"] * options.gpu
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU is shared by the libraries
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def ask(self, *question):
        """The answer as a dictionary; with its ``failure`` where there is none."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            return {"failure": (self.errors.read().strip().splitlines() or ["killed"])[-1]}

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


class Worker:
    """A loss and size of one library; answers None once it has failed, with the reason in ``failure``."""

    def __init__(self, process, name, size):
        self.process, self.case = process, (name, size)
        self.failure, self.seconds, self.mib = "", [], 0.0

    def evaluate(self, times=1, record=True):
        if self.failure:
            return
        answer = self.process.ask(*self.case, times)
        if error := answer.get("failure"):
            out_of_memory = any(s in error for s in ("memory", "alloc", "MemoryError", "killed", "RESOURCE_EXHAUSTED"))
            self.failure = "out of memory" if out_of_memory else error
            return
        self.mib = answer["mib"]
        if record:
            self.seconds.append(answer["seconds"])


class Missing:
    """In place of a worker, for a loss that the other library lacks."""

    failure, seconds, mib = "none", (), 0.0

    def evaluate(self, times=1, record=True):
        pass


def compare(name, size, options, processes):
    own = processes or {library: Process(library, [name], [size], options) for library in MAKERS}
    ours = Worker(own["ours"], name, size)
    theirs = Missing() if name in OURS_ALONE else Worker(own["theirs"], name, size)
    products = Missing() if name in NO_MATRIX else Worker(own["products"], name, size)
    workers = (ours, theirs, products)
    for worker in workers:
        worker.evaluate(record=False)  # compiles, and fills caches on both sides
    rounds = options.rounds or {256: 8, 1024: 5}.get(size, 4)
    for _ in range(rounds):
        for worker in workers:
            # Fewer where one evaluation takes seconds.
            worker.evaluate(times=10 if size <= 1024 else 3 if min(worker.seconds, default=0.0) < 1 else 1)
    if not processes:
        for process in own.values():
            process.close()
    cells, digits = [name, str(size)], 2 if options.gpu else 1
    cells += [w.failure or f"{1e3 * min(w.seconds):.{digits}f}" for w in (ours, theirs)]
    failed = ours.failure or theirs.failure
    cells.append("-" if failed else f"{min(theirs.seconds) / min(ours.seconds):.1f}")
    cells.append("-" if products.failure else f"{1e3 * min(products.seconds):.{digits}f}")
    cells.append("-" if failed or products.failure else f"{min(theirs.seconds) / min(products.seconds):.1f}")
    cells += ["-" if w.failure else f"{w.mib:.0f}" for w in (ours, theirs)]
    cells.append("-" if failed else f"{theirs.mib / max(ours.mib, 1):.1f}")
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--sizes", nargs="+", type=int, default=(256, 1024, 4096), help="batch sizes, 4 per class")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each; 0: 8, 5 or 4 by size")
    parser.add_argument("--limit-gib", type=float, default=16, help="address space of one process")
    parser.add_argument("--cores", type=int, default=0, help="cores of each process; 0: all. 1 is steady under load")
    parser.add_argument(
        "--compiled", action="store_true", help="memory of the compiled program of ours; nothing is run"
    )
    parser.add_argument("--gpu", action="store_true", help="all libraries on a GPU")
    parser.add_argument("--introspective", action="store_true", help="ours reads the introspective metric")
    parser.add_argument("--worker", choices=("ours", "theirs", "products"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return
    if not options.gpu:
        huge_pages.start_again()
    if options.compiled:
        print("| loss | N | MiB |\n|---|---|---|")
        for name in options.losses:
            for size in options.sizes:
                compiled(name, size, options.introspective)
        return
    processes = {}
    if options.gpu:
        processes = {library: Process(library, options.losses, options.sizes, options) for library in MAKERS}
        for process in processes.values():
            if failure := process.ask("ready").get("failure"):
                sys.exit(failure)
    print("| loss | N | ms | PML | faster | products | at most | MiB | PML | less |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.losses:
        for size in options.sizes:
            compare(name, size, options, processes)
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
