"""Costs of a step as read from the compiler: what is read from its text, and what the text of our steps says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from idml_jax.ism import Embedding, Metric
from idml_jax.losses import LOSSES
from idml_jax.runtime import sharding
from idml_jax.training.tasks.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import aot  # noqa: E402
import chips  # noqa: E402
import compiled  # noqa: E402

TEXT = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (p: f32[1024,512]) -> f32[128,512] {
  %all-reduce.7 = f32[1024,512]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %dynamic-slice.2 = f32[128,512]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.7, %i, %zero)
}

%chain_of_a_collective (p: f32[4,2]) -> f32[32,2] {
  ROOT %all-gather.1 = f32[32,2]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%chain_of_a_collective.1 (p: f32[4,2]) -> f32[32,2] {
  ROOT %all-gather.2 = f32[32,2]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%turn (t: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %all-reduce.8 = bf16[4]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %tuple = (s32[], bf16[4]) tuple(%i, %all-reduce.8)
}

%more (t: (s32[], bf16[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (images: u8[16,4,4,3]) -> f32[] {
  %ar = (f32[8,4]{1,0:T(8,128)}, f32[], /*index=2*/f32[3]) all-reduce(%a, %b, %c), replica_groups={}, to_apply=%sum
  %start = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%d), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[32,8]{1,0} all-gather-done(%start)
  %send = (u8[1,4,4,3]{3,2,1,0}, u8[1,4,4,3]{3,2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%e)
  %f.1 = f32[128,512]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %f.2 = f32[32,2]{1,0} fusion(%g), kind=kCustom, calls=%chain_of_a_collective
  %f.3 = f32[32,2]{1,0} fusion(%g), kind=kCustom, calls=%chain_of_a_collective.1
  %w = (s32[], bf16[4]) while(%t), condition=%more, body=%turn, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = f32[] constant(0), metadata={op_name="an all-reduce(x) in a name"}
}
"""


def test_collectives_are_read_from_the_text():
    found = {(c.kind, c.shape): c for c in compiled.collectives(TEXT, 8)}
    assert {key: tuple(c[2:]) for key, c in found.items()} == {
        ("all-reduce", "f32[8,4] f32[] f32[3]"): (144, 8, 1),  # names no group: all devices
        ("all-gather", "f32[32,8]"): (1024, 8, 1),
        ("collective-permute", "u8[1,4,4,3]"): (48, 8, 1),
        ("reduce-scatter", "f32[128,512]"): (128 * 512 * 4, 8, 1),
        ("all-gather", "f32[32,2]"): (256, 8, 1),  # in two fusions, but one collective
        ("all-reduce", "bf16[4]"): (8, 2, 5),  # in a loop of five turns, of pairs of devices
    }
    assert found["all-gather", "f32[32,8]"].received == 1024 * 7 / 8
    assert found["all-reduce", "bf16[4]"].received == 5 * 2 * 8 * 1 / 2
    assert found["reduce-scatter", "f32[128,512]"].received == 7 * 128 * 512 * 4
    every = compiled.collectives(TEXT, 8)
    assert compiled.largest_matrix(every) == 128 * 512
    assert compiled.totals(every)["all-reduce"] == (6, 2 * 7 / 8 * 144 + 40)


def test_kernels_of_a_gpu_read_their_operands_and_write_their_results():
    text = """
%fused (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %inside = f32[100]{0} multiply(%p, %p)
}

%body (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]{0}) parameter(0)
  %x.1 = f32[10]{0} get-tuple-element(%t), index=1
  %twice = f32[10]{0} fusion(%x.1), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[10]{0}) tuple(%i, %twice)
}

%condition (t: (s32[], f32[10])) -> pred[] {
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%graph (q: f32[25]) -> f32[25] {
  %q = f32[25]{0} parameter(0)
  ROOT %kernel_of_a_graph = f32[25]{0} negate(%q)
}

%reads_a_slice (all: f32[1000,100], at: s32[]) -> f32[1,100] {
  %all = f32[1000,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %slice = f32[1,100]{1,0} dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={1,100}
  ROOT %negated = f32[1,100]{1,0} negate(%slice)
}

%replaces_a_slice (old: f32[1000,100], new: f32[1,100], at: s32[]) -> f32[1000,100] {
  %old = f32[1000,100]{1,0} parameter(0)
  %new = f32[1,100]{1,0} parameter(1)
  %place = s32[] parameter(2)
  ROOT %put = f32[1000,100]{1,0} dynamic-update-slice(%old, %new, %place, %zero)
}

ENTRY %main (images: u8[400]) -> f32[100] {
  %images = u8[400]{0} parameter(0)
  %kernel = bf16[50]{0} parameter(1)
  %conv = (f32[100]{0}, u8[1000000]{0}) custom-call(%images, %kernel), custom_call_target="__cudnn$convForward"
  %map = f32[100]{0} get-tuple-element(%conv), index=0
  %flat = f32[10,10]{1,0} bitcast(%map)
  %two = (f32[100]{0}, f32[]) fusion(%flat, %kernel), kind=kInput, calls=%fused, metadata={op_name="a(%map), b"}
  %w = (s32[], f32[10]) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %large = f32[1000,100]{1,0} parameter(2)
  %where = s32[] parameter(3)
  %row = f32[1,100]{1,0} fusion(%large, %where), kind=kLoop, calls=%reads_a_slice
  %same = f32[1000,100]{1,0} fusion(%large, %row, %where), kind=kLoop, calls=%replaces_a_slice
  %bare = f32[1,100]{1,0} dynamic-slice(%large, %where, %where), dynamic_slice_sizes={1,100}
  %quarter = f32[25]{0} parameter(4)
  %run = f32[25]{0} call(%quarter), to_apply=%graph
  ROOT %copy = f32[100]{0} copy(%map)
}
"""
    convolution, both, loop, copy = 400 + 100 + 400, 400 + 100 + 404, 5 * (40 + 40), 400 + 400
    read, replaced, bare, graph = 400 + 4 + 400, 400 + 400 + 4, 400 + 400, 100 + 100
    assert compiled.moved(text) == convolution + both + loop + copy + read + replaced + bare + graph


def test_collectives_in_the_words_of_jax_0_11():
    text = """
ENTRY %main (images: u8[16,4,4,3]) -> f32[] {
  %all-reduce-start.2 = ((f32[3]{0}), f32[3]{0}) all-reduce-start(%a), replica_groups=mesh['data'=8] {'data'}
  %all-reduce-done.2 = f32[3]{0} all-reduce-done(%all-reduce-start.2)
  %two = ((f32[3]{0}, f32[7]), f32[3]{0}, f32[7]) all-reduce-start(%a), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %both = (f32[5]{0}, f32[5]{0}) all-reduce(%a, %b), replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}
"""
    assert {(c.shape, c.bytes, c.group) for c in compiled.collectives(text, 16)} == {
        ("f32[3]", 12, 8), ("f32[3] f32[7]", 40, 4), ("f32[5] f32[5]", 40, 8),
    }  # fmt: skip


def test_bounds_name_what_binds():
    chip = chips.Chip("a chip", peak=100, memory=16, bandwidth=1000, link=200, source="")
    limit = chips.bounds(chip, operations=1e12, read=5e9, received=4e9)
    assert limit == (0.01, 0.005, 0.02) and limit.binds == "links" and limit.seconds == 0.02


@pytest.mark.parametrize("room,first,expected", [(1000, 128, 328), (1000, 1024, 320), (100, 64, 24), (20, 64, 0)])
def test_the_largest_batch_is_found_with_few_compilations(room, first, expected):
    tried = []

    def attempt(batch):
        tried.append(batch)
        if 3 * batch + 10 > room:
            raise compiled.DoesNotFit
        return batch

    batch, program = aot.largest_batch(attempt, first, multiple=8)
    assert batch == (program or 0) and len(tried) <= 6 and all(b % 8 == 0 for b in tried)
    assert 0.9 * expected <= batch <= expected


@pytest.mark.parametrize(
    "message,expected",
    [
        (
            "RESOURCE_EXHAUSTED: the total memory (196.83G) exceeds available HBM (15.75G).",
            "it needs 196.83GiB of 15.75GiB",
        ),
        ("RESOURCE_EXHAUSTED: Used 23.5G of 15.7G hbm. Exceeded hbm by 7.8G", "it needs 23.5GiB of 15.7GiB"),
        ("RESOURCE_EXHAUSTED: no\nmore", "RESOURCE_EXHAUSTED: no"),
    ],
)
def test_a_refusal_says_how_much_is_missing(message, expected):
    assert compiled.wanted(message) == expected


@pytest.mark.parametrize(
    "target,message",
    [
        ("v9:2x4", "'v9:2x4' is not a chip"),
        ("v5e", "is not a chip"),
        ("v5e:0x4", "is not a chip"),
        ("v5e:2x2x2", "TPU v5es are arranged by 2 numbers of at most 16: v5e:2x4"),
        ("v5e:32x32", "TPU v5es are arranged by 2 numbers of at most 16: v5e:2x4"),
        ("v4:2x2", "TPU v4s are arranged by 3 numbers of at most 16: v4:2x2x1"),
        ("h100:2x4", "for GPUs write their number, as in h100:8"),
    ],
)
def test_an_unknown_target_is_refused(target, message):
    with pytest.raises(SystemExit, match=message):
        chips.devices_of(target)


def test_options_become_settings():
    words = ["v5e:2x4", "--loss", "fast_ap", "--plain", "--remat", "--accumulate", "2", "--set", "model.pooling=max"]
    config = aot.settings_of(aot.arguments(words))
    assert config.loss.name == "fast_ap" and not config.ism.enabled and config.model.remat
    assert config.optim.accumulate == 2 and config.model.pooling == "max" and config.model.dtype == "bfloat16"
    by_name = aot.settings_of(aot.arguments(["v5e:2x4", "--config", "glyphs:quick"]))
    assert by_name.model.name == "convnet4"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "model.nmae=1"], "no such setting.*did you mean config.model.name"),
        (["--config", "nowhere.py"], "--config nowhere.py: no such settings; known: cars196"),
        (["--set", "optim.cached_features=True"], "optim.cached_features = True depends on the images of a run"),
        (["--set", "loss.levels=/"], "loss.levels = '/' depends on the images of a run"),
        (["--set", "optim.accumulate=0"], "settings that no run could have: config.optim.accumulate"),
        (["--step", "retrieval", "--set", "model.embedding_dim=-3"], "config.model.embedding_dim"),
        (["--step", "retrieval", "--trunk", "nope"], "nope"),
        (["--json", "/nowhere/x.jsonl"], "--json /nowhere/x.jsonl: is a folder, or cannot be written"),
        (["--keep", "/"], "--keep /: is a folder, or cannot be written"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(words, message, monkeypatch):
    """Before anything is compiled."""
    monkeypatch.setattr(aot, "ENVIRONMENT", {})
    monkeypatch.setattr(chips, "devices_of", lambda target: (chips.CHIPS["v5e"], jax.devices()))
    monkeypatch.setattr(aot, "lowered", None)
    with pytest.raises(SystemExit, match=message):
        aot.main(aot.arguments(["v5e:2x4", *words]))


def test_a_classifier_is_measured_by_its_own_metric():
    config = aot.settings_of(aot.arguments(["v5e:2x4", "--task", "classification"]))
    assert (config.task, config.eval.best_metric) == ("classification", "top1")


def test_the_trunk_s_arithmetic_is_that_of_what_learns():
    """In times of its forward pass, for an image without Mixup."""
    mesh = sharding.data_mesh(jax.devices()[:1])
    words = [
        "v5e:2x4",
        "--trunk",
        "resnet_tiny",
        "--pixels",
        "32",
        "--dtype",
        "float32",
        "--set",
        "mixup.enabled=False",
    ]

    def times(*more):
        config = aot.settings_of(aot.arguments([*words, *more]))
        return aot.useful_operations(config, 10, "train", mesh) / aot.useful_operations(config, 10, "embed", mesh)

    assert times() == 3 and times("optim.trunk=none") == 1 and times("mixup.enabled=True") == 6
    assert 1 < times("optim.trunk=last:1") < times("optim.trunk=last:2") < 3


@pytest.mark.parametrize(
    "loss",
    [pytest.param(n, marks=() if n in ("contrastive", "multi_similarity") else pytest.mark.slow) for n in LOSSES],
)
def test_devices_exchange_embeddings_and_no_matrix(loss):
    """In the compiled loss and its gradient, on eight devices: no [n, n], and few [n, d]."""
    if LOSSES[loss].references != "batch":
        pytest.skip("compares with proxies")
    n, d, k = 128, 3, 2
    mesh = sharding.data_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    what = Objective(loss, (), Metric(), 4, d, k, rows=mesh)
    batch = Embedding(*(jax.ShapeDtypeStruct((n, width), jnp.float32, sharding=rows) for width in (d, k)))
    labels = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows)
    step = jax.jit(jax.value_and_grad(lambda e, labels: what({}, e, labels, key=jax.random.key(0))))
    every = compiled.collectives(step.lower(batch, labels).compile().as_text(), mesh.size)
    assert 0 < compiled.largest_matrix(every) <= n * (d + k) < n * n // mesh.size
    assert sum(c.count for c in every if "," in c.shape) <= 2  # s and u there, their gradient back


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def of_tpu(tmp_path, target, *words):
    """The numbers of the train step of a tiny network, as the TPU's compiler says."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), target, "--trunk", "resnet_tiny", "--pixels", "32"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words, "--json", str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["contrastive", "multi_similarity", "fast_ap"])
def test_a_tpu_gathers_once_per_matrix(tmp_path, loss):
    row = of_tpu(tmp_path, "v5e:2x4", "--loss", loss, "--partners", "near")
    counts = {kind: count for kind, (count, _) in row["collectives"].items()}
    # Two matrices, of the originals and of the mixed images; labels, original and of the partners, are gathered too.
    assert counts["all-gather"] <= 6 and counts["reduce-scatter"] <= 3 and "all-to-all" not in counts
    assert 0 < row["memory"] < 16e9 and row["operations"] > 0 and row["images_per_second"] > 0


@needs_libtpu
@pytest.mark.slow
def test_a_pod_holds_a_batch_of_32768(tmp_path):
    row = of_tpu(tmp_path, "v5e:16x16", "--loss", "contrastive", "--partners", "near")
    assert row["batch"] == 32_768 and row["devices"] == 256
    assert row["memory"] < 2 * 2**30
