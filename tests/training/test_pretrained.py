"""Pretrained weights: formats, round trips, mismatches, and a run that starts from another."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors
from test_train import ROOT, small_config

from idml_jax import models, pretrained
from idml_jax.errors import UserError
from idml_jax.models import naming
from idml_jax.training import train


def random_variables(name, size=32, seed=0, channels=3, **options):
    """A model and variables none of which is 0 or 1, as numpy arrays."""
    model = models.create_model(name, embedding_dim=6, uncertainty_dim=5, uncertainty_hidden=7, **options)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), dict(like))


def write(path, variables, change=lambda named: named, parts=("trunk",)):
    """A .safetensors file in PyTorch's naming."""
    flat = naming.flatten(variables)
    named = {naming.torch_name(p): naming.to_torch(p, v) for p, v in flat.items() if p.split("/")[1] in parts}
    safetensors.save_file(change(named), path)
    return path


def assert_same(one, other):
    assert naming.flatten(one).keys() == naming.flatten(other).keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_names_are_torchvisions_and_timms():
    model = models.create_model("resnet18")
    shapes = naming.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    trunk = {naming.torch_name(p): naming.shape_in_torch(p, x.shape) for p, x in shapes.items() if "/trunk/" in p}
    bn = ("weight", "bias", "running_mean", "running_var")
    expected = {"conv1.weight", *(f"bn1.{x}" for x in bn)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            for layer in (1, 2):
                expected |= {f"layer{stage}.{block}.conv{layer}.weight"}
                expected |= {f"layer{stage}.{block}.bn{layer}.{x}" for x in bn}
        if stage > 1:
            expected |= {f"layer{stage}.0.downsample.0.weight", *(f"layer{stage}.0.downsample.1.{x}" for x in bn)}
    assert set(trunk) == expected
    assert trunk["conv1.weight"] == (64, 3, 7, 7) and trunk["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    vit = models.create_model("vit_s16")
    shapes = naming.flatten(jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    named = {naming.torch_name(p): naming.shape_in_torch(p, x.shape) for p, x in shapes.items() if "/trunk/" in p}
    assert named["blocks.11.attn.qkv.weight"] == (1152, 384) and named["pos_embed"] == (1, 197, 384)
    assert named["patch_embed.proj.weight"] == (384, 3, 16, 16) and named["blocks.0.mlp.fc1.bias"] == (1536,)
    assert {"norm.weight", "norm.bias", "cls_token", "blocks.3.norm2.bias", "patch_embed.proj.bias"} <= set(named)
    assert len(named) == 4 + 12 * 12 + 2


@pytest.mark.parametrize("name", ["resnet_tiny", "pyramidnet_tiny", "vit_tiny", "convnet4"])
@pytest.mark.parametrize("head", ["mlp", "none"])
def test_a_round_trip_changes_nothing(tmp_path, name, head):
    _, variables = random_variables(name, uncertainty_head=head)
    source = write(tmp_path / "a.safetensors", variables, parts=("trunk", "heads"))
    pretrained.convert(source, tmp_path / "ours", model=name, size=32)
    pretrained.convert(tmp_path / "ours", tmp_path / "b.safetensors")
    first, second = safetensors.load_file(source), safetensors.load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys() and len(first) > 5
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], second[tensor])
    for where in (source, tmp_path / "ours", tmp_path / "b.safetensors"):
        loaded, told = pretrained.load(where, variables, "all")
        assert_same(loaded, {k: v for k, v in variables.items() if v})
        assert str(where) in told


def test_parts_and_prefixes(tmp_path):
    _, variables = random_variables("resnet_tiny")
    classifier = {"fc.weight": np.ones((10, 16), np.float32), "fc.bias": np.ones(10, np.float32)}
    counter = {"bn1.num_batches_tracked": np.asarray(3, np.int64)}
    source = write(
        tmp_path / "a.safetensors",
        variables,
        parts=("trunk", "heads"),
        change=lambda named: {f"module.model.{k}": v for k, v in {**named, **classifier, **counter}.items()},
    )
    loaded, told = pretrained.load(source, variables, "trunk")
    assert set(loaded["params"]) == {"trunk"} and "embedding.weight" in told and "fc.weight" in told
    loaded, _ = pretrained.load(source, variables, "semantic")
    assert set(loaded["params"]["heads"]) == {"semantic"}
    loaded, told = pretrained.load(source, variables, "all")
    assert_same(loaded, variables)
    fresh = jax.tree.map(np.zeros_like, variables)
    merged = pretrained.merge(fresh, pretrained.load(source, variables, "trunk")[0])
    assert_same(merged["params"]["trunk"], variables["params"]["trunk"])
    assert_same(merged["params"]["heads"], fresh["params"]["heads"])
    with pytest.raises(ValueError, match="known: trunk, semantic, all"):
        pretrained.load(source, variables, "some")


def test_half_precision_is_read(tmp_path):
    _, variables = random_variables("resnet_tiny")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        source = tmp_path / f"{np.dtype(dtype).name}.safetensors"
        write(source, variables, change=lambda named, dtype=dtype: {k: v.astype(dtype) for k, v in named.items()})
        kernel = pretrained.load(source, variables)[0]["params"]["trunk"]["conv1"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_allclose(kernel, variables["params"]["trunk"]["conv1"]["kernel"], rtol=1e-2)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("layer2.0.downsample.0.weight"), "layer2.0.downsample.0.weight is missing there"),
        (lambda t: t.update({"layer2.0.conv3.weight": np.ones(3)}), "layer2.0.conv3.weight is only there"),
        (
            lambda t: t.update({"conv1.weight": np.ones((8, 1, 3, 3))}),
            r"conv1.weight is \(8, 1, 3, 3\) there, \(8, 3, 3, 3\) here",
        ),
        (lambda t: t["bn1.bias"].fill(np.nan), "bn1.bias is not finite"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("layer2")],
            "layer2.0.bn1.running_mean is missing there;.* and 11 more",
        ),
        (lambda t: t.update({"model.conv1.weight": np.ones(1)}), "model.conv1.weight is only there"),
    ],
)
def test_mismatches_are_named(tmp_path, change, message):
    _, variables = random_variables("resnet_tiny")

    def changed(named):
        change(named)
        return {k: np.asarray(v, np.float32) for k, v in named.items()}

    source = write(tmp_path / "a.safetensors", variables, changed)
    with pytest.raises(UserError, match=message) as caught:
        pretrained.load(source, variables)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)


def test_another_network_is_refused(tmp_path):
    _, variables = random_variables("resnet_tiny")
    _, other = random_variables("pyramidnet_tiny")
    pretrained.convert(write(tmp_path / "a.safetensors", variables), tmp_path / "ours", model="resnet_tiny")
    for source in (tmp_path / "a.safetensors", tmp_path / "ours"):
        with pytest.raises(UserError, match="does not fit the network"):
            pretrained.load(source, other)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.pkl").write_bytes(b"x")
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file at all")
    (tmp_path / "a.pth").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    for name, message in (
        ("none.safetensors", "no such weights file"),
        ("a.pkl", "weights come as .safetensors, as .pth"),
        ("a.safetensors", "cannot be read as safetensors"),
        ("a.pth", "PyTorch, which is not installed"),
        ("folder", "neither weights of this package nor the folder of a run"),
        ("ours", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.read(tmp_path / name)


def test_the_command_converts_and_refuses_in_one_line(tmp_path):
    _, variables = random_variables("resnet_tiny")
    source = write(tmp_path / "a.safetensors", variables)
    command = lambda *words: subprocess.run(
        [sys.executable, "-m", "idml_jax.pretrained", "convert", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    done = command(source, tmp_path / "ours", "--model=resnet_tiny")
    assert done.returncode == 0 and "tensors from" in done.stdout, done.stderr
    assert_same(pretrained.load(tmp_path / "ours", variables)[0]["params"]["trunk"], variables["params"]["trunk"])
    done = command(source, tmp_path / "more" / "ours")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--model=resnet50" in done.stderr
    assert not (tmp_path / "more" / "ours").exists()
    with pytest.raises(UserError, match="already exists"):
        pretrained.convert(source, tmp_path / "ours", model="resnet_tiny")
    with pytest.raises(UserError, match="known: .*resnet50"):
        pretrained.convert(source, tmp_path / "new", model="resnet51")
    with pytest.raises(UserError, match="already is in this package's format"):
        pretrained.convert(tmp_path / "ours", tmp_path / "new")


def test_a_run_starts_from_another(image_folder, tmp_path, caplog):
    """Starting from all weights of a run, the first metrics equal that run's best; without them they do not."""
    changes = {"epochs": 1, "optim.warmup_epochs": 0, "eval.cluster": False, "eval.ambiguity_images": 0}
    # Evaluated, and so started from, by moving averages that lag behind.
    first = train.train_and_evaluate(small_config(image_folder, **changes, **{"optim.ema": 0.9}), tmp_path / "first")
    start = {**changes, "model.init_from": str(tmp_path / "first"), "model.init_parts": "all"}
    with caplog.at_level(logging.INFO, logger="idml_jax"):
        second = train.train_and_evaluate(small_config(image_folder, **start), tmp_path / "second")
    assert "starting from" in caplog.text and str(tmp_path / "first") in caplog.text
    best = {k: v for k, v in first["best"].items() if k in second["untrained"]}
    assert second["untrained"] == pytest.approx(best) and len(best) > 5
    assert second["untrained"] != pytest.approx({k: first["untrained"][k] for k in best})
    # The same run from a file, and the file is not needed to go on.
    pretrained.convert(tmp_path / "first", tmp_path / "w.safetensors")
    start["model.init_from"] = str(tmp_path / "w.safetensors")
    third = train.train_and_evaluate(small_config(image_folder, **start), tmp_path / "third")
    assert third["final"] == pytest.approx(second["final"])
    (tmp_path / "w.safetensors").unlink()
    (tmp_path / "third" / "result.json").unlink()
    again = train.train_and_evaluate(small_config(image_folder, **start), tmp_path / "third")
    assert again["final"] == pytest.approx(third["final"])
    assert train.evaluate_checkpoint(tmp_path / "third")["R@1"] == pytest.approx(third["best"]["R@1"])
    with pytest.raises(UserError, match="w.safetensors: no such weights file"):
        train.train_and_evaluate(small_config(image_folder, **start), tmp_path / "fourth")
    assert not (tmp_path / "fourth").exists()


def test_weights_of_another_network_of_the_same_shapes_are_refused(tmp_path):
    """ResNets v1 and v1.5 have the same tensors and compute something else; the file or the run names its network."""
    _, variables = random_variables("resnet_tiny")
    named = {naming.torch_name(p): naming.to_torch(p, v) for p, v in naming.flatten(variables).items()}
    named = {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}
    source = tmp_path / "v1.safetensors"
    safetensors.save_file(named, source, metadata={"network": "resnet50_v1"})
    assert pretrained.read(source).network == "resnet50_v1"
    message = r"v1.safetensors holds weights of resnet50_v1, and the network is resnet50; config.model.name=resnet50_v1"
    with pytest.raises(UserError, match=message):
        pretrained.load(source, variables, network="resnet50")
    # Without a name on either side, or a name that is no network of this package, the shapes decide.
    pretrained.load(source, variables)
    safetensors.save_file(named, source, metadata={"network": "somebody's"})
    pretrained.load(source, variables, network="resnet50")


def test_wrapped_weights_say_how_their_names_begin(tmp_path):
    _, variables = random_variables("resnet_tiny")
    wrap = lambda named: (
        {f"encoder_q.trunk.its_{k}": v for k, v in named.items()} | {"queue": np.ones((2, 3), np.float32)}
    )
    source = write(tmp_path / "wrapped.safetensors", variables, wrap)
    with pytest.raises(UserError, match=r"the names there begin with encoder_q\.trunk\.\* \(\d+\), queue\.\* \(1\)"):
        pretrained.load(source, variables)


@pytest.mark.torch
def test_sparse_and_quantised_tensors_are_read_as_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    _, variables = random_variables("resnet_tiny")
    named = {
        naming.torch_name(path): torch.tensor(naming.to_torch(path, np.asarray(value, np.float32)).copy())
        for path, value in naming.flatten(variables).items()
        if path.startswith(("params/trunk", "batch_stats"))
    }
    named["conv1.weight"] = named["conv1.weight"].to_sparse()
    torch.save(named, tmp_path / "sparse.pth")
    loaded = pretrained.load(tmp_path / "sparse.pth", variables)[0]
    np.testing.assert_array_equal(
        loaded["params"]["trunk"]["conv1"]["kernel"], variables["params"]["trunk"]["conv1"]["kernel"]
    )
    small = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"a": small}, tmp_path / "quantised.pth")
    np.testing.assert_allclose(pretrained.read(tmp_path / "quantised.pth").values["a"], 1.0, atol=0.1)
