"""The ResNet trunk against a PyTorch one with the same seeded random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
nn = torch.nn


class Block(nn.Module):
    """torchvision's bottleneck, written out."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            layer = []
            for i in range(blocks):
                layer.append(Block(channels, width, 2 if stage and not i else 1))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def random_torch_net():
    torch.manual_seed(0)
    net = ResNet50()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Small scales on the shortcut's partner keep activations of a random net in range.
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def to_flax(net):
    """Parameters and statistics of the torch net under our names."""
    params, stats = {}, {}

    def put(tree, path, value):
        *parents, leaf = path
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[leaf] = jnp.asarray(value)

    for name, tensor in net.state_dict().items():
        value = tensor.numpy()
        parts = name.split(".")
        if parts[-1] == "num_batches_tracked":
            continue
        if parts[0].startswith("layer"):
            block = f"{parts[0]}_{parts[1]}"
            inner = parts[2] if parts[2] != "downsample" else ("downsample_conv", "downsample_bn")[int(parts[3])]
            path = [block, inner]
        else:
            path = [parts[0]]
        if "conv" in path[-1]:
            put(params, [*path, "kernel"], value.transpose(2, 3, 1, 0))
        else:
            leaf = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}[parts[-1]]
            put(stats if leaf in ("mean", "var") else params, [*path, leaf], value)
    return params, stats


@pytest.mark.parametrize("size", [224, 227])
def test_pooled_features_agree(size):
    net = random_torch_net()
    params, stats = to_flax(net)
    x = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        maps = net(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        expected = (maps.mean((2, 3)) + maps.amax((2, 3))).numpy()
    model = models.create_model("resnet50")
    variables = {"params": {"trunk": params}, "batch_stats": {"trunk": stats}}
    apply = jax.jit(lambda v, x: model.apply(v, x, method=lambda m, x: m.features(x)))
    got = apply(variables, jnp.asarray(x))
    assert got.shape == (2, 2048)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_training_statistics_and_gradients_agree():
    net = random_torch_net().train()
    params, stats = to_flax(net)
    x = np.random.default_rng(2).normal(size=(4, 64, 64, 3)).astype(np.float32)
    weights = np.random.default_rng(3).normal(size=(4, 2048)).astype(np.float32)
    maps = net(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    ((maps.mean((2, 3)) + maps.amax((2, 3))) * torch.from_numpy(weights)).sum().backward()
    model = models.create_model("resnet50")

    @jax.jit
    def run(params):
        def loss(params):
            variables = {"params": {"trunk": params}, "batch_stats": {"trunk": stats}}
            features, new = model.apply(
                variables, jnp.asarray(x), method=lambda m, x: m.features(x, True), mutable=["batch_stats"]
            )
            return jnp.sum(features * weights), new["batch_stats"]["trunk"]

        return jax.grad(loss, has_aux=True)(params)

    grads, new_stats = run(params)
    _, expected_stats = to_flax(net)
    for path, expected in jax.tree_util.tree_leaves_with_path(expected_stats):
        got = new_stats
        for entry in path:
            got = got[entry.key]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=str(path))
    # How far float32 itself is from the truth, in PyTorch, is the measure of what may differ here.
    wide = random_torch_net().train().double()
    maps = wide(torch.from_numpy(x.transpose(0, 3, 1, 2)).double())
    ((maps.mean((2, 3)) + maps.amax((2, 3))) * torch.from_numpy(weights).double()).sum().backward()
    pairs = (
        (("layer4_2", "conv3"), lambda n: n.layer4[2].conv3),
        (("layer2_0", "downsample_conv"), lambda n: n.layer2[0].downsample[0]),
        (("conv1",), lambda n: n.conv1),
    )
    for path, of in pairs:
        got = grads
        for name in path:
            got = got[name]
        got = np.asarray(got["kernel"]).transpose(3, 2, 0, 1)
        exact, single = of(wide).weight.grad.numpy(), of(net).weight.grad.numpy()
        noise = np.linalg.norm(single - exact)
        assert noise < 0.1 * np.linalg.norm(exact)
        assert np.linalg.norm(got - exact) < 5 * noise, path
