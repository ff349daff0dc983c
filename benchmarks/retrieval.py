"""Evaluation speed: ours against faiss + pytorch-metric-learning and scikit-learn, and against the bare product.

    python benchmarks/retrieval.py --shape quick                 # 20,000 x 512, 2,000 classes
    python benchmarks/retrieval.py --shape cub                   # 5,924 x 512, 100 classes
    python benchmarks/retrieval.py --shape sop                   # 60,502 x 512, 11,316 classes
    python benchmarks/retrieval.py --shape 20000x512x20          # any other: rows x width x classes

Needs faiss-cpu, pytorch-metric-learning, torch and scikit-learn in addition to the package; contestants whose library
is missing are left out. All contestants run in turn within each round, so that load on the machine affects all of them;
the table gives the minimum wall time and CPU time over all rounds, and their ratios. The data are points around random
class centres in 48 dimensions, rotated into all dimensions, with noise, then normalised: R@1 is about 0.8 to 1, like a
trained embedding.
"""

import argparse
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from idml_jax.metrics.clustering import kmeans, nmi
from idml_jax.metrics.retrieval import retrieval_metrics

SHAPES = {"quick": (20_000, 512, 2_000), "cub": (5_924, 512, 100), "sop": (60_502, 512, 11_316)}
KS = (1, 10, 100, 1000)


def make_data(rows, width, classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    rng.shuffle(labels)
    latent = rng.normal(size=(classes, 48))[labels] + rng.normal(size=(rows, 48))
    x = (latent @ rng.normal(size=(48, width)) + 0.3 * rng.normal(size=(rows, width))).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def bare_product(x, tile=2048):
    """Computes the complete matrix of inner products tile by tile and discards it."""
    blocks = jnp.asarray(np.pad(x, ((0, -len(x) % tile), (0, 0)))).reshape(-1, tile, x.shape[1])

    @jax.jit
    def run(blocks):
        def row(a):
            step = lambda kept, b: (kept + jnp.matmul(a, b.T, precision="highest")[0, 0], None)
            return jax.lax.scan(step, 0.0, blocks)[0]

        return jax.lax.map(row, blocks)

    return lambda: run(blocks).block_until_ready()


def faiss_and_calculator(x, labels, search=None, device="cpu"):
    """AccuracyCalculator over faiss (or another search), extended by R@K as its documentation describes."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def recall(k):
        def calculate(self, knn_labels, query_labels, **_):
            return (knn_labels[:, :k] == query_labels[:, None]).any(1).float().mean().item()

        return calculate

    methods = {f"calculate_recall_at_{k}": recall(k) for k in KS}
    methods["requires_knn"] = lambda self: [*AccuracyCalculator.requires_knn(self), *(f"recall_at_{k}" for k in KS)]
    include = (*(f"recall_at_{k}" for k in KS), "r_precision", "mean_average_precision_at_r")
    k = min(max(KS), len(x) - 1)
    options = {"include": include, "k": k, "knn_func": search, "device": torch.device(device)}
    calculator = type("Calculator", (AccuracyCalculator,), methods)(**options)
    x, labels = torch.from_numpy(x), torch.from_numpy(labels)
    # On a GPU the copy counts, as it does in ours.
    return lambda: calculator.get_accuracy(x.to(device), labels.to(device))


def torch_and_calculator(x, labels):
    """AccuracyCalculator as above, with its own search on the GPU in place of faiss."""
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    if not torch.cuda.is_available():
        raise ImportError("no GPU that PyTorch sees")
    return faiss_and_calculator(x, labels, CustomKNN(CosineSimilarity(), batch_size=4096), "cuda")


def torch_product(x, tile=2048):
    """The complete matrix of inner products by PyTorch on the GPU, tile by tile."""
    import torch

    if not torch.cuda.is_available():
        raise ImportError("no GPU that PyTorch sees")
    on_device = torch.from_numpy(x).cuda()

    def run():
        for first in range(0, len(x), tile):
            on_device[first : first + tile] @ on_device.T
        torch.cuda.synchronize()

    return run


def faiss_search(x, k):
    import faiss

    def run():
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(x)
        return index.search(x, min(k + 1, len(x)))

    return run


def compare(contestants, rounds):
    """Minimum wall and CPU seconds of each, and its last result, after one unmeasured round for compilation."""
    best, results = {}, {}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = run()
            took = np.array([time.perf_counter() - wall, time.process_time() - cpu])
            if turn or rounds == 0:
                best[name] = np.minimum(best.get(name, np.inf), took)
    return best, results


def table(best, ours):
    print(f"{'':48s} {'wall s':>9s} {'ratio':>7s} {'CPU s':>9s} {'ratio':>7s}   (ratio: to ours)")
    for name, (wall, cpu) in best.items():
        print(f"{name:48s} {wall:9.2f} {wall / best[ours][0]:7.2f} {cpu:9.2f} {cpu / best[ours][1]:7.2f}", flush=True)


def retrieval(x, labels, rounds, without):
    contestants = {
        "ours: R@1/10/100/1000, RP, MAP@R, MRR": lambda: retrieval_metrics(x, labels, ks=KS),
        "bare product": bare_product(x),
    }
    most = int(np.bincount(labels).max())
    for name, make in {
        "faiss k=1000 + AccuracyCalculator": lambda: faiss_and_calculator(x, labels),
        "PyTorch on the GPU k=1000 + AccuracyCalculator": lambda: torch_and_calculator(x, labels),
        "bare product, PyTorch on the GPU": lambda: torch_product(x),
        "faiss k=1000, search alone": lambda: faiss_search(x, 1000),
        f"faiss k={most} (the largest class), search alone": lambda: faiss_search(x, most),
    }.items():
        try:
            contestants[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    contestants = {name: run for name, run in contestants.items() if not any(word in name for word in without)}
    best, results = compare(contestants, rounds)
    table(best, next(iter(contestants)))
    for name, result in results.items():
        if isinstance(result, dict):
            print(name, {key: round(float(value), 5) for key, value in result.items()})


def clustering(x, labels, rounds, iterations, without):
    k = int(labels.max()) + 1

    def ours():
        found = kmeans(x, k, 0, iterations=iterations)
        return found.labels, found.inertia

    def with_faiss():
        import faiss

        # No subsampling, and as many iterations as asked for.
        options = {"niter": iterations, "seed": 0, "min_points_per_centroid": 1, "max_points_per_centroid": len(x)}
        found = faiss.Kmeans(x.shape[1], k, **options)
        found.train(x)
        distances, index = found.index.search(x, 1)
        return index[:, 0], float(distances.sum())

    def with_sklearn(init):
        def run():
            from sklearn.cluster import KMeans

            found = KMeans(k, init=init, n_init=1, max_iter=iterations, tol=0, random_state=0).fit(x)
            return found.labels_, float(found.inertia_)

        return run

    contestants = {"ours: ++ start": ours, "faiss: random start": with_faiss}
    contestants["scikit-learn: random start"] = with_sklearn("random")
    contestants["scikit-learn: ++ start"] = with_sklearn("k-means++")
    contestants = {name: run for name, run in contestants.items() if not any(word in name for word in without)}
    best, results = compare(contestants, rounds)
    print(f"k-means, k = {k}, at most {iterations} iterations")
    table(best, next(iter(contestants)))
    for name, (clusters, inertia) in results.items():
        print(f"{name:44s} inertia {inertia:12.2f}  NMI {nmi(labels, clusters):.4f}")


def peak():
    """Peak memory of this process in MiB (on Linux ru_maxrss would include the parent's)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="quick", help="quick, cub, sop or ROWSxWIDTHxCLASSES")
    parser.add_argument("--parts", default="retrieval,kmeans,memory", help="which of them, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds after one that warms up; 0: only that")
    parser.add_argument("--iterations", type=int, default=25, help="of k-means")
    parser.add_argument("--without", default="", help="leave out contestants with one of these words, with commas")
    options = parser.parse_args()
    if options.shape not in SHAPES and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", options.shape):
        parser.error(f"--shape {options.shape}: images x width x classes, as 1000x64x50, or {', '.join(SHAPES)}")
    shape = SHAPES.get(options.shape) or tuple(int(part) for part in options.shape.split("x"))
    without = [word for word in options.without.split(",") if word]
    parts = options.parts.split(",")
    x, labels = make_data(*shape)
    if parts == ["peak"]:  # the child that `memory` starts: ours alone
        before = peak()
        retrieval_metrics(x, labels, ks=KS)
        middle = peak()
        kmeans(x, shape[2], 0, iterations=2)
        print(f"peak MiB: data made {before} | retrieval {middle} | and k-means {peak()}")
        return
    print(f"{shape[0]} x {shape[1]}, {shape[2]} classes; {jax.devices()}", flush=True)
    if "retrieval" in parts:
        retrieval(x, labels, options.rounds, without)
    if "kmeans" in parts:
        clustering(x, labels, options.rounds, options.iterations, without)
    if "memory" in parts:
        subprocess.run([sys.executable, __file__, "--shape", options.shape, "--parts", "peak"], check=True)


if __name__ == "__main__":
    main()
