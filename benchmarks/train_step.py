"""Speed and memory of a whole train step: a ResNet with both heads, ProxyAnchor on ISM, Mixup, AdamW, clipping.

    python benchmarks/train_step.py                                  # protocol: 224 px, batch 120; for a GPU or TPU
    python benchmarks/train_step.py --batch 16 --steps 2             # a CPU
    python benchmarks/train_step.py --rows jax-bf16 torch-bf16       # some rows alone

Every row runs the same work on one device in a separate process, so that its memory is measured separately:

    jax               this package's step: float32, originals and mixed images in one pass, donated state
    jax-bf16          the same with a bfloat16 trunk
    jax-remat         jax, activations inside a block recomputed
    jax-accumulate    jax, the batch in --parts parts, loss over the whole batch
    torch-published   the published training loop: float32, one pass for the originals and one for the mixed
    torch             a plain PyTorch step: float32, channels_last, one pass
    torch-bf16        torch under bfloat16 autocast, compiled on a GPU

BatchNorm is frozen, as in the protocol. An image counts once, although the trunk sees it and its mixture. MFU is
three times the arithmetic of the forward pass divided by the time, as a share of the device's bfloat16 peak, if known.
Memory is the device's peak; on a CPU the process's peak resident set minus its size before weights and data, including
compilation. PyTorch rows need the extra 'parity', and torchvision for vit_b16. Times are medians over --steps steps
after one.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("jax", "jax-bf16", "jax-remat", "jax-accumulate", "torch-published", "torch", "torch-bf16")
CLASSES, DIM, TAU = 100, 512, 5.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Dense bfloat16 (T4, V100: float16) peak of one device in TFLOP/s, from the data sheets, by a part of its name.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "A10": 125, "RTX 4090": 165, "V100": 125, "T4": 65,
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459,
    "TPU v6 lite": 918,
}  # fmt: skip


def peak_of(device):
    """Peak TFLOP/s of a device by its name, or None."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def resident():
    """Peak resident set of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(step, wait, steps):
    """Seconds of the first step and the median of the next ones."""
    start = time.perf_counter()
    wait(step())
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        wait(step())
        seconds.append(time.perf_counter() - start)
    return first, sorted(seconds)[len(seconds) // 2]


def jax_row(options):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from idml_jax.ism import Metric
    from idml_jax.models import EmbeddingModel, create_model
    from idml_jax.training import steps
    from idml_jax.training.optim import GroupOptimizer, Schedule
    from idml_jax.training.state import create_state
    from idml_jax.training.tasks.objective import Objective

    jax.devices()
    before = resident()
    kind = options.row.removeprefix("jax").strip("-")
    model = create_model(
        options.model, frozen_statistics=True, dtype="bfloat16" if kind == "bf16" else "float32", remat=kind == "remat"
    )
    objective = Objective("proxy_anchor", (), Metric("relative", TAU), CLASSES, DIM, DIM)
    optimizer = GroupOptimizer(
        "adamw", Schedule("constant", 1e-5, 1000), (("proxies", 100.0),), 1e-4, clip_value=10.0, frozen_norm=True
    )
    setup = steps.StepSetup(
        model,
        objective,
        optimizer,
        MEAN,
        STD,
        mixup_alpha=1.0,
        accumulate=options.parts if kind == "accumulate" else 1,
    )
    shape = (options.size, options.size, 3)
    state = jax.jit(create_state, static_argnums=(1, 2, 3, 4))(jax.random.key(0), model, objective, optimizer, shape)
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        {
            "image": rng.integers(0, 256, (options.batch, *shape), np.uint8),
            "label": rng.integers(0, CLASSES, options.batch).astype(np.int32),
        }
    )
    forward = lambda v, x: model.apply(v, x, method=EmbeddingModel.features)
    flops = None
    with contextlib.suppress(RuntimeError):  # no CPU under JAX_PLATFORMS=cuda
        # A GPU's client knows no costs, so the pass is traced for the CPU.
        cpu = SingleDeviceSharding(jax.devices("cpu")[0])
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu)
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=cpu)
        lowered = jax.jit(forward).lower(jax.tree.map(put, state.variables), image)
        flops = (lowered.cost_analysis() or {}).get("flops")

    def step():
        nonlocal state
        state, metrics = steps.jit_train_step(state, batch, setup=setup)
        return metrics

    first, seconds = timed(step, jax.block_until_ready, options.steps)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = stats.get("peak_bytes_in_use", resident() - before)
    return {"first": first, "seconds": seconds, "memory": memory, "flops": flops, "device": device.device_kind}


def torch_row(options):
    import torch
    from torch.nn import functional as F

    sys.path.insert(0, str(ROOT / "tests"))
    from torch_networks import ResNet50

    if options.model == "resnet50":
        trunk, width = ResNet50(), 2048
    elif options.model == "vit_b16":
        from torchvision.models import vit_b_16

        trunk, width = vit_b_16(image_size=options.size), 768
        trunk.heads = torch.nn.Identity()
    else:
        raise SystemExit("the PyTorch rows are for --model resnet50 or vit_b16")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(options.threads)
    before = resident()
    published, half = options.row == "torch-published", options.row == "torch-bf16"
    layout = torch.contiguous_format if published else torch.channels_last

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = trunk
            self.semantic = torch.nn.Linear(width, DIM)
            self.hidden, self.uncertainty = torch.nn.Linear(width, 128), torch.nn.Linear(128, DIM)

        def forward(self, x):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                x = self.trunk(x)
            x = x.float()
            if x.ndim == 4:  # the maps of a ResNet
                x = x.mean((2, 3)) + x.amax((2, 3))
            return F.normalize(self.semantic(x)), self.uncertainty(torch.relu(self.hidden(F.normalize(x))))

    torch.manual_seed(0)
    net = Net().to(device).to(memory_format=layout)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    run = torch.compile(net) if cuda and half else net
    proxies = torch.nn.Parameter(torch.randn(CLASSES, DIM, device=device) * (2 / CLASSES) ** 0.5)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": trained}, {"params": [proxies], "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=1e-4)
    raw = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=device)
    raw = raw.contiguous(memory_format=layout)
    labels = torch.randint(0, CLASSES, (options.batch,), device=device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def criterion(out, labels):
        s, u = out
        cosine = s @ F.normalize(proxies).T
        alpha = (2 - 2 * cosine).clamp_min(1e-8).sqrt()
        similarity = 1 - (1 - cosine) * torch.exp(-u.norm(dim=1, keepdim=True) / alpha / TAU)
        same = F.one_hot(labels, CLASSES).bool()
        low = torch.finfo(torch.float32).min
        positive = torch.where(same, -32 * (similarity - 0.1), low)
        negative = torch.where(same, low, 32 * (similarity + 0.1))
        present = same.any(0)
        one = positive.new_zeros(1, CLASSES)
        pull = torch.logsumexp(torch.cat([one, positive]), 0)[present].mean()
        return pull + torch.logsumexp(torch.cat([one, negative]), 0).mean()

    def step():
        images = (raw.float() / 255 - mean) / std
        lam = float(torch.distributions.Beta(1.0, 1.0).sample())
        partner = torch.randperm(len(images), device=device)
        mixed = lam * images + (1 - lam) * images[partner]
        if published:
            out, out_mixed = run(images), run(mixed)
        else:
            semantic, uncertainty = run(torch.cat([images, mixed]))
            out, out_mixed = zip(semantic.chunk(2), uncertainty.chunk(2), strict=True)
        loss = criterion(out, labels)
        loss = loss + lam * criterion(out_mixed, labels) + (1 - lam) * criterion(out_mixed, labels[partner])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_([*trained, proxies], 10)
        optimizer.step()

    first, seconds = timed(step, lambda _: torch.cuda.synchronize() if cuda else None, options.steps)
    memory = torch.cuda.max_memory_allocated() if cuda else resident() - before
    name = torch.cuda.get_device_name() if cuda else "cpu"
    return {"first": first, "seconds": seconds, "memory": memory, "flops": None, "device": name}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=120)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--parts", type=int, default=4, help="of jax-accumulate")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch on a CPU")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        sys.path.insert(0, str(ROOT))
        print(json.dumps((jax_row if options.row.startswith("jax") else torch_row)(options)))
        return
    print(f"{options.model}, {options.size} px, batch {options.batch}, {options.steps} steps")
    print(f"{'':16} {'first s':>8} {'step s':>8} {'images/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'memory MB':>10}  device")
    flops, rates = None, {}
    for row in options.rows:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row], capture_output=True, text=True)
        if done.returncode:
            print(f"{row:16} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        flops = found["flops"] or flops
        rates[row] = options.batch / found["seconds"]
        speed = 3 * 2 * flops * rates[row] / 1e12 if flops else None
        peak = peak_of(found["device"])
        print(
            f"{row:16} {found['first']:8.1f} {found['seconds']:8.3f} {rates[row]:9.2f} "
            f"{speed if speed is None else round(speed, 3)!s:>8} {f'{speed / peak:.1%}' if speed and peak else '-':>6} "
            f"{found['memory'] / 2**20:10.0f}  {found['device']}",
            flush=True,
        )
    for ours in (row for row in rates if row.startswith("jax")):
        ratios = [f"{rates[ours] / rates[row]:.2f} times {row}" for row in rates if row.startswith("torch")]
        if ratios:
            print(f"{ours}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
