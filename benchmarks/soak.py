"""Soak test: trains a tiny network for a long time to check that memory and step time do not grow.

    python benchmarks/soak.py                    # 20,000 steps on the glyphs, some minutes
    python benchmarks/soak.py --steps 2000

It is an ordinary run (``train.train_and_evaluate``: evaluations, checkpoints, log rows), sampled at its log rows:
resident memory of the process, bytes and number of live arrays on the devices, wall and CPU time per step since the
previous row. A run first fills its caches, so the second quarter of the rows is compared with the last one. Exit code 1
if the median resident memory grew by more than ``--tolerance``, or the bytes or the number of the arrays grew at all;
75 if it was stopped by a signal, after the same table. Times are reported but not checked, since they depend on other
load on the machine.
"""

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import jax

from idml_jax.runtime.interrupt import EXIT_CODE, Stopped
from idml_jax.training import train
from idml_jax.training.config import default_config


def tiny_config(steps, batch_size):
    """The glyphs at 16 pixels in the smallest network, for thousands of steps a minute."""
    config = default_config()
    config.max_steps, config.batch_size, config.epochs = steps, batch_size, steps  # max_steps ends it
    config.data.name, config.data.variant = "glyphs", "default"
    config.data.image_size = config.data.resize = 16
    config.data.channels, config.data.mean, config.data.std = 1, (0.5,), (0.3,)
    config.data.crop_scale, config.data.flip = (0.8, 1.0), False
    config.model.name, config.model.batchnorm = "resnet_tiny", "live"
    config.model.embedding_dim = config.model.uncertainty_dim = config.model.uncertainty_hidden = 16
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_epochs = 1e-3, "cosine", 0
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = config.checkpoint.every_epochs = 10
    config.eval.cluster, config.eval.ambiguity_images = False, 0
    config.log.every_steps = max(steps // 200, 1)
    return config


def resident_bytes():
    """Current resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(logging.Handler):
    """Records a row of measurements whenever the run logs its steps."""

    def __init__(self):
        super().__init__()
        self.rows, self._last = [], None

    def emit(self, record):
        if not record.msg.startswith("epoch %d/%d  step"):
            return
        step, now = record.args[2], (time.monotonic(), time.process_time())
        gc.collect()
        arrays = jax.live_arrays()
        row = {
            "step": step,
            "rss": resident_bytes(),
            "device": sum(x.nbytes for x in arrays),
            "arrays": len(arrays),
            "ms": float("nan"),
            "cpu_ms": float("nan"),
        }
        if self._last is not None and step > self._last[0]:
            taken = step - self._last[0]
            row["ms"], row["cpu_ms"] = (1000 * (b - a) / taken for a, b in zip(self._last[1], now, strict=True))
        self.rows.append(row)
        self._last = step, (time.monotonic(), time.process_time())


def quarters(rows, key):
    """Medians of the second and of the last quarter."""
    quarter = len(rows) // 4
    return median(r[key] for r in rows[quarter : 2 * quarter]), median(r[key] for r in rows[-quarter:])


def judge(rows, tolerance):
    """A description of everything that grew; empty if nothing did."""
    grown = []
    before, after = quarters(rows, "rss")
    if after - before > tolerance:
        grown.append(f"resident memory grew by {(after - before) / 1e6:.1f} MB, more than {tolerance / 1e6:.0f}")
    for key, name in (("device", "bytes of live arrays"), ("arrays", "number of live arrays")):
        before, after = quarters(rows, key)
        if after > before:
            grown.append(f"the {name} grew from {before:,.0f} to {after:,.0f}")
    return grown


def show(rows, lines=20):
    """A table of some of the rows, and the two quarters that are compared."""
    print(f"{'step':>8} {'RSS MB':>8} {'device MB':>10} {'arrays':>7} {'ms/step':>8} {'CPU ms':>7}")
    picked = sorted({round(i * (len(rows) - 1) / max(lines - 1, 1)) for i in range(lines)})
    for row in (rows[i] for i in picked):
        print(
            f"{row['step']:8d} {row['rss'] / 1e6:8.1f} {row['device'] / 1e6:10.3f} {row['arrays']:7d} "
            f"{row['ms']:8.2f} {row['cpu_ms']:7.2f}"
        )
    for key, name, unit in (
        ("rss", "RSS, MB", 1e6),
        ("device", "device, MB", 1e6),
        ("ms", "ms/step", 1),
        ("cpu_ms", "CPU ms/step", 1),
    ):
        before, after = quarters(rows, key)
        print(f"{name:12s} second quarter {before / unit:.3f}, last {after / unit:.3f}: x {after / before:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=20e6, help="bytes of resident memory, default 20 MB")
    parser.add_argument("--workdir", help="new folder for the run; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.steps < 100:
        parser.error("--steps: at least 100")
    watch, logger = Watch(), logging.getLogger("idml_jax")
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with tempfile.TemporaryDirectory() as temporary:
        try:
            config = tiny_config(arguments.steps, arguments.batch_size)
            result = train.train_and_evaluate(config, arguments.workdir or temporary)
            told = f"{len(result['history'])} evaluations and checkpoints; {result['seconds']:.0f} s in all"
        except Stopped as stopped:
            result, told = None, str(stopped)
    rows = watch.rows[1:]
    if len(rows) < 8:
        sys.exit(f"error: {told}; {len(rows)} rows are too few to judge")
    show(rows)
    print(told)
    grown = judge(rows, arguments.tolerance)
    for line in grown:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if grown else 0 if result else EXIT_CODE)


if __name__ == "__main__":
    main()
