"""Weights inside of checkpoints: the sub-tree of the network, what lies beside it, and the cures of mismatches."""

import numpy as np
import pytest
from test_pretrained import assert_same, random_variables, write

from idml_jax import pretrained
from idml_jax.errors import UserError
from idml_jax.models import naming
from idml_jax.training import auto, weights
from idml_jax.training.config import default_config
from idml_jax.training.weights.tensors import Native, Tensors


@pytest.fixture(scope="module")
def tiny():
    """Variables of a small ResNet, and its trunk's tensors under timm's names."""
    _, variables = random_variables("resnet_tiny")
    flat = {p: v for p, v in naming.flatten(variables).items() if p.split("/")[1] == "trunk"}
    return variables, {naming.torch_name(p): naming.to_torch(p, v) for p, v in flat.items()}


def under(prefix, named):
    return {prefix + name: value for name, value in named.items()}


def other(named, by=1.0):
    return {name: value + np.float32(by) for name, value in named.items()}


HEAD = {"head.mlp.0.weight": np.ones((4, 16), np.float32), "head.last_layer.weight_g": np.ones((4, 1), np.float32)}
# What training scripts store: the dictionaries of a file by their place, and words about what is taken and left out.
WRAPPED = {
    "plain": (lambda t: {"": t}, ()),
    "state_dict of a module": (lambda t: {"state_dict": under("module.", t)}, ()),
    "DINO": (
        lambda t: {
            "student": under("module.backbone.", other(t)) | under("module.", HEAD),
            "teacher": under("backbone.", t) | HEAD,
            "dino_loss": {"center": np.ones((1, 4), np.float32)},
        },
        ("teacher backbone.* is taken, student module.backbone.* would fit too", "head.mlp.0.weight (2 in total)"),
    ),
    "MoCo": (
        lambda t: {
            "state_dict": under("module.encoder_k.", other(t))
            | under("module.encoder_q.", t | {"fc.0.weight": np.ones((4, 16), np.float32)})
            | {"module.queue": np.ones((2, 3), np.float32), "module.queue_ptr": np.zeros(1, np.float32)}
        },
        ("module.encoder_q.* is taken, state_dict module.encoder_k.* would fit too", "fc.0.weight"),
    ),
    "SwAV": (
        lambda t: {
            "": under("module.", t)
            | {"module.projection_head.0.weight": np.ones((4, 16), np.float32), "module.prototypes.weight": HEAD["head.mlp.0.weight"]}
        },
        ("left out: projection_head.0.weight, prototypes.weight (2 in total)",),
    ),
    "OML": (lambda t: {"state_dict": under("extractor.model.", t) | {"criterion.w": np.ones(3, np.float32)}}, ("criterion.w",)),
    "Lightning": (lambda t: {"state_dict": under("net.backbone.", t) | {"net.neck.weight": np.ones(3, np.float32)}}, ("net.neck.weight (1 in total)",)),
    "averages beside": (lambda t: {"state_dict": other(t), "state_dict_ema": t}, ("state_dict_ema is taken, state_dict would fit too",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_the_network_is_found_in(case, tiny):
    variables, named = tiny
    make, words = WRAPPED[case]
    tensors = Tensors({}, (), torch=True, containers=make(named), name="x.pth")
    loaded, told = weights.load(tensors, variables)
    assert_same(loaded["params"]["trunk"], variables["params"]["trunk"])
    for word in words:
        assert word in told, told


def test_published_heads_are_found_below_the_same_prefix(tmp_path):
    _, variables = random_variables("resnet_tiny", uncertainty_head="linear")
    source = write(tmp_path / "a.safetensors", variables, lambda t: under("module.model.", t), ("trunk", "heads"))
    assert_same(pretrained.load(source, variables, "all")[0], variables)


@pytest.mark.parametrize("extra", ["layer3.0.conv1.weight", "fc_norm.weight", "reg_token", "model.conv1.weight"])
def test_what_may_change_the_function_is_never_left_out(extra, tiny):
    variables, named = tiny
    tensors = Tensors({}, (), torch=True, containers={"": {**named, extra: np.ones(3, np.float32)}})
    with pytest.raises(UserError, match=f"{extra} is only there"):
        weights.load(tensors, variables)


def test_what_does_not_fit_says_what_is_there(tiny):
    variables, named = tiny
    tensors = Tensors({}, (), True, containers={"model": under("a.b.its_", named), "extra": {"x.y": np.ones(2)}})
    with pytest.raises(
        UserError, match=r"in 'model' a\.b\.\* \(\d+\); in 'extra' x\.y\.\* \(1\); known networks: .*resnet50"
    ):
        weights.load(tensors._replace(values=named and under("a.b.its_", named)), variables)


class TestCures:
    def test_another_network_is_named(self, tiny):
        variables, named = tiny
        _, bigger = random_variables("pyramidnet_tiny")
        tensors = Tensors(named, (), torch=True, containers={"": named})
        with pytest.raises(
            UserError, match=r"tensors are those of resnet_tiny: config.model.name=resnet_tiny is a net"
        ):
            weights.load(tensors, bigger)

    def test_colour_weights_for_grey_images(self, tiny):
        variables, named = tiny
        _, grey = random_variables("resnet_tiny", channels=1)
        tensors = Tensors(named, (), torch=True, containers={"": named})
        with pytest.raises(UserError, match=r"see images of 3 channels: config.data.channels=3 .*input_layer=sum"):
            weights.load(tensors, grey)
        loaded, _ = weights.load(tensors, grey, input_layer="sum")
        kernel, colour = (v["params"]["trunk"]["conv1"]["kernel"] for v in (loaded, variables))
        np.testing.assert_allclose(kernel, np.sum(colour, axis=2, keepdims=True), rtol=1e-6)
        back, _ = weights.load(Tensors(naming.flatten(loaded), (), torch=False), variables, input_layer="sum")
        np.testing.assert_allclose(
            np.sum(back["params"]["trunk"]["conv1"]["kernel"], axis=2, keepdims=True), kernel, rtol=1e-6
        )

    def test_another_normalisation_is_warned_of(self):
        config = default_config()
        native = Native("vit_b16", "vit", 224, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "token", "config.json")
        told = auto.check_statistics(config, native)
        assert "config.data.mean is (0.485, 0.456, 0.406) and theirs (0.5, 0.5, 0.5)" in told and "\n" not in told
        config.data.mean = config.data.std = (0.5, 0.5, 0.5)
        assert auto.check_statistics(config, native) == auto.check_statistics(default_config(), Native()) == ""
        config.data.mean = config.data.std = (0.5,)
        assert auto.check_statistics(config, native) == ""
