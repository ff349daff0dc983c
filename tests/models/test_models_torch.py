"""Compares the trunks with PyTorch ones that have the same seeded random weights, converted as from a weights file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models, pretrained
from idml_jax.errors import UserError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
from torch_networks import (  # noqa: E402
    Published,
    PyramidNet11,
    ViT,
    random_resnet50,
    random_weights,
    tensors_of,
)


def pictures(n, size, seed=1):
    x = np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2))


def variables_of(net, model, x, parts="trunk"):
    """The model's variables with the PyTorch net's weights."""
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    loaded, _ = pretrained.load(tensors_of(net), like, parts)
    if parts == "trunk":  # heads, which nobody reads
        loaded["params"]["heads"] = jax.tree.map(lambda a: jnp.zeros(a.shape), like["params"]["heads"])
    return jax.tree.map(jnp.asarray, loaded)


def assert_close(got, expected, relative=1e-4):
    np.testing.assert_allclose(got, expected, rtol=relative, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("size", [224, pytest.param(227, marks=pytest.mark.slow)])
def test_features_after_every_stage_and_pooled_agree(size):
    net = random_resnet50()
    x, same = pictures(2, size)
    with torch.no_grad():
        stages = net.stages(same)
        pooled = (stages[-1].mean((2, 3)) + stages[-1].amax((2, 3))).numpy()
    model = models.create_model("resnet50")
    ends = {"layer1_2": 1, "layer2_3": 2, "layer3_5": 3, "layer4_2": 4}

    @jax.jit
    def apply(variables, x):
        return model.apply(
            variables,
            x,
            method=lambda m, x: m.features(x),
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name in ends,
        )

    got, kept = apply(variables_of(net, model, x), x)
    for name, stage in ends.items():
        maps = kept["intermediates"]["trunk"][name]["__call__"][0]
        assert_close(np.asarray(maps).transpose(0, 3, 1, 2), stages[stage].numpy())
    assert got.shape == (2, 2048)
    assert_close(got, pooled)


def test_training_statistics_and_gradients_agree():
    net = random_resnet50().train()
    x, same = pictures(4, 64, seed=2)
    model = models.create_model("resnet50")
    start = variables_of(net, model, x)
    weights = np.random.default_rng(3).normal(size=(4, 2048)).astype(np.float32)
    maps = net(same)
    ((maps.mean((2, 3)) + maps.amax((2, 3))) * torch.from_numpy(weights)).sum().backward()

    @jax.jit
    def run(params):
        def loss(params):
            features, new = model.apply(
                {**start, "params": params}, x, method=lambda m, x: m.features(x, True), mutable=["batch_stats"]
            )
            return jnp.sum(features * weights), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = run(start["params"])
    expected_stats = variables_of(net, model, x)["batch_stats"]
    jax.tree.map(lambda got, expected: assert_close(got, expected, 1e-3), stats, expected_stats)
    moved = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), start["batch_stats"], expected_stats)
    assert all(jax.tree.leaves(moved))
    # How far float32 itself is from the truth, in PyTorch, is the measure of what may differ here.
    wide = random_resnet50().train().double()
    maps = wide(same.double())
    ((maps.mean((2, 3)) + maps.amax((2, 3))) * torch.from_numpy(weights).double()).sum().backward()
    pairs = (
        (("layer4_2", "conv3"), lambda n: n.layer4[2].conv3),
        (("layer2_0", "downsample_conv"), lambda n: n.layer2[0].downsample[0]),
        (("conv1",), lambda n: n.conv1),
    )
    for path, of in pairs:
        got = grads["trunk"]
        for name in path:
            got = got[name]
        got = np.asarray(got["kernel"]).transpose(3, 2, 0, 1)
        exact, single = of(wide).weight.grad.numpy(), of(net).weight.grad.numpy()
        noise = np.linalg.norm(single - exact)
        assert noise < 0.1 * np.linalg.norm(exact)
        assert np.linalg.norm(got - exact) < 5 * noise, path


@pytest.mark.parametrize("size", [32, pytest.param(26, marks=pytest.mark.slow)])
def test_pyramidnet_agrees(size):
    torch.manual_seed(3)
    net = random_weights(PyramidNet11())
    x, same = pictures(2, size)
    model = models.create_model("pyramidnet_tiny")
    got = model.apply(variables_of(net, model, x), x, method=lambda m, x: m.trunk(x))
    with torch.no_grad():
        assert_close(np.asarray(got).transpose(0, 3, 1, 2), net(same).numpy())


def test_vit_s16_agrees_and_takes_other_sizes():
    torch.manual_seed(4)
    net = ViT().eval()
    x, same = pictures(2, 224)
    with torch.no_grad():
        tokens = net(same).numpy()
    for pooling, expected in (("token", tokens[:, 0]), ("avg", tokens[:, 1:].mean(1))):
        model = models.create_model("vit_s16", pooling=pooling)
        variables = variables_of(net, model, x)
        features = jax.jit(lambda v, x, m=model: m.apply(v, x, method=lambda m, x: m.features(x)))
        assert_close(features(variables, x), expected)
    other = variables_of(net, model, x[:, :160, :160])["params"]["trunk"]["pos_embed"]
    own = variables["params"]["trunk"]["pos_embed"]
    assert other.shape == (1, 101, 384)
    np.testing.assert_array_equal(other[:, 0], own[:, 0])
    assert abs(float(jnp.mean(other[:, 1:]) - jnp.mean(own[:, 1:]))) < 0.02


def test_published_checkpoint_gives_the_published_embeddings(tmp_path):
    """As the published code saves it, from several GPUs: {'model_state_dict': {'module.model.conv1.weight': ...}}."""
    net = Published(dim=16).eval()
    path = tmp_path / "cub_resnet50_best.pth"
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    x, same = pictures(2, 64)
    model = models.create_model("resnet50", embedding_dim=16, uncertainty_dim=16, uncertainty_head="linear")
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    variables, told = pretrained.load(path, like, "all")
    assert "left out: fc.bias, fc.weight" in told
    out = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        semantic, uncertainty = net(same)
    assert_close(out["semantic"], semantic.numpy(), 2e-4)
    assert_close(out["uncertainty"], uncertainty.numpy(), 2e-4)
    # Its linear head does not fit ours, and the message says what would.
    ours = models.create_model("resnet50", embedding_dim=16, uncertainty_dim=16)
    with pytest.raises(UserError, match="config.model.uncertainty_head=linear"):
        pretrained.load(path, jax.eval_shape(ours.init, jax.random.key(0), x), "all")
    # And back: what is written loads into the network that it came from, strictly but for the classifier.
    pretrained.convert(path, tmp_path / "ours")
    pretrained.convert(tmp_path / "ours", tmp_path / "back.safetensors", prefix="model.")
    from safetensors.torch import load_file

    fresh = Published(dim=16)
    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "back.safetensors"), strict=False)
    assert set(missing) == {"model.fc.weight", "model.fc.bias"} and not unexpected
    with torch.no_grad():
        again = fresh.eval()(same)
    torch.testing.assert_close(again[0], semantic)
    torch.testing.assert_close(again[1], uncertainty)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a weights file has run')",))


def test_files_that_hold_more_than_tensors_are_refused(tmp_path):
    for name, content, message in (
        ("code.pth", {"state_dict": Payload()}, "holds more than tensors and is refused"),
        ("numbers.pth", {"epoch": 3}, "holds no state_dict, alone or under model_state_dict"),
        ("empty.pth", {}, "holds no weights"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message):
            pretrained.read(tmp_path / name)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "numbers.pth").read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        pretrained.read(tmp_path / "cut.pth")
