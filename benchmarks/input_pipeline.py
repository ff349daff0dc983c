"""Input speed: bytes to batches of random 224 px crops, mirrored at random; against tf.data and a torch DataLoader.

    python benchmarks/input_pipeline.py                        # 500 x 375 and 227 x 227 pixels, 2 threads
    python benchmarks/input_pipeline.py --images=FOLDER        # your JPEG files as they are
    python benchmarks/input_pipeline.py --only=idml,tf --rounds=5

Needs tensorflow, torch, Pillow, psutil and scikit-learn (windows of its two sample photographs are encoded at quality
90) in addition to the package; contestants whose library is missing are left out. All contestants read the same encoded
images from memory and yield uint8 batches of 100. Each runs in a separate process, in turn within each round, so that
load on the machine affects all of them; the first batches are not counted. The table gives the best round: images per
second of wall time, CPU milliseconds per image (worker processes included), peak memory of the process (and its workers
at the end), its growth after the imports, and the CPU time relative to this package.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BATCH, SIZE = 100, 224
SETS = {"500x375": (375, 500), "227x227": (227, 227)}


def photographs(name, count=200):
    """Encoded windows of real photographs."""
    if name not in SETS:
        files = sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        return [p.read_bytes() for p in files[:: max(1, len(files) // 1000)]][:1000]
    from PIL import Image
    from sklearn.datasets import load_sample_images

    (height, width), rng, encoded = SETS[name], np.random.default_rng(0), []
    photos = load_sample_images().images
    for i in range(count):
        photo = photos[i % 2]
        top, left = rng.integers(0, photo.shape[0] - height + 1), rng.integers(0, photo.shape[1] - width + 1)
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + height, left : left + width]).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


class Memory:
    """Encoded images as a source."""

    def __init__(self, encoded):
        self.encoded = encoded
        self.labels = np.zeros(len(encoded), np.int32)

    def __len__(self):
        return len(self.encoded)

    def read(self, index):
        return self.encoded[index]

    def name(self, index):
        return str(index)


class Endless:
    """Records in order, over and over."""

    batch_size = BATCH
    steps_per_epoch = 1

    def __init__(self, records):
        self.records = records

    def batch(self, step):
        return (step * BATCH + np.arange(BATCH)) % self.records


def idml(encoded, threads, resample="fast", parts=True):
    from idml_jax.data import pipeline
    from idml_jax.data.images import transforms, turbo

    if not parts:
        turbo.library = lambda: None
    elif turbo.library() is None:
        raise ImportError("libturbojpeg 3")
    crop = transforms.RandomResizedCrop(SIZE, resample=resample)
    reading = pipeline.Reading(crop, threads=threads, prefetch=4)
    batches = pipeline.train_batches(Memory(encoded), Endless(len(encoded)), reading, seed=0, start=0, stop=10**6)
    return (batch["image"] for batch in batches)


def tf_data(encoded, threads, antialias):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    def load(data):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), antialias=antialias)
        return tf.cast(tf.round(tf.image.random_flip_left_right(image)), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(tf.constant(encoded)).repeat().map(load, num_parallel_calls=threads)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    return data.batch(BATCH).prefetch(2).with_options(options).as_numpy_iterator()


def torch_pillow(encoded, threads):
    import torch
    from PIL import Image

    from idml_jax.data.images.transforms import RandomResizedCrop

    crop = RandomResizedCrop(SIZE)

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 10**7

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            image = Image.open(io.BytesIO(encoded[index % len(encoded)])).convert("RGB")
            top, left, height, width = crop.box(image.height, image.width, rng)
            image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image))

    return (batch.numpy() for batch in torch.utils.data.DataLoader(Pictures(), BATCH, num_workers=threads))


CONTESTANTS = {
    "idml_jax": lambda encoded, threads: idml(encoded, threads, parts=False),
    "idml_jax + libturbojpeg": idml,
    "idml_jax, resample=exact": lambda encoded, threads: idml(encoded, threads, "exact", parts=False),
    "tf.data, antialias": lambda encoded, threads: tf_data(encoded, threads, True),
    "tf.data, no antialias (aliases)": lambda encoded, threads: tf_data(encoded, threads, False),
    "torch DataLoader + Pillow": torch_pillow,
}


def cpu_seconds():
    import psutil

    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(name, kind, threads, images):
    """Measures one contestant; runs in a separate process."""
    import resource

    import psutil
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain reads them
    encoded = photographs(kind)
    batches = iter(CONTESTANTS[name](encoded, threads))
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        batch = next(batches)
    assert batch.shape == (BATCH, SIZE, SIZE, 3) and batch.dtype == np.uint8 and 20 < batch.mean() < 235
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(images // BATCH):
        next(batches)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    count = images // BATCH * BATCH
    workers = sum(p.memory_info().rss for p in psutil.Process().children(recursive=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"per_second": count / wall, "cpu_ms": 1000 * cpu / count, "peak_mb": (peak + workers) / 2**20}
    print(json.dumps({**row, "grown_mb": (peak - before) / 2**20}), flush=True)
    for worker in psutil.Process().children(recursive=True):
        worker.kill()
    os._exit(0)  # endless loaders end with the process


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", default="")
    parser.add_argument("--set", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=2000, help="images per contestant and round")
    parser.add_argument("--only", default="", help="parts of names, comma-separated")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure, args.threads, args.count)
    wanted = [n for n in CONTESTANTS if not args.only or any(part in n for part in args.only.split(","))]
    for kind in [args.images] if args.images else [args.set] if args.set else SETS:
        best, notes = {}, {}
        for _ in range(args.rounds):
            for name in wanted:
                command = [sys.executable, __file__, "--measure", name, kind, f"--threads={args.threads}"]
                command.append(f"--count={args.count}")
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                except subprocess.TimeoutExpired:
                    notes[name] = "more than 300 s"
                    continue
                if done.returncode:
                    notes[name] = (done.stderr.strip().splitlines() or ["failed"])[-1]
                    continue
                row, old = json.loads(done.stdout.splitlines()[-1]), best.get(name)
                smaller = ("cpu_ms", "peak_mb", "grown_mb")
                best[name] = {k: (min if k in smaller else max)(old[k], row[k]) for k in row} if old else row
        sizes = [len(data) for data in photographs(kind)]
        print(f"\n{kind}: {len(sizes)} JPEG files of {np.mean(sizes) / 1024:.0f} KiB, {args.threads} threads")
        print(f"{'':33s}{'img/s':>8s}{'CPU ms/img':>12s}{'peak MiB':>10s}{'grown MiB':>11s}{'CPU / ours':>12s}")
        ours = best.get("idml_jax", {}).get("cpu_ms", float("nan"))
        for name, row in best.items():
            print(
                f"{name:33s}{row['per_second']:8.0f}{row['cpu_ms']:12.3f}{row['peak_mb']:10.0f}{row['grown_mb']:11.0f}"
                f"{row['cpu_ms'] / ours:12.2f}"
            )
        for name, note in notes.items():
            print(f"{name:33s}left out: {note}")


if __name__ == "__main__":
    main()
