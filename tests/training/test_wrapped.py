"""Weights inside of checkpoints: the sub-tree of the network, what lies beside it, and the cures of mismatches."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import numpy as safetensors
from test_pretrained import assert_same, random_variables, write

from idml_jax import pretrained
from idml_jax.errors import UserError
from idml_jax.models import naming
from idml_jax.training import auto, weights
from idml_jax.training.config import default_config
from idml_jax.training.weights import about
from idml_jax.training.weights.convert import native_of
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


def ones(*shape):
    return np.ones(shape, np.float32)


HEAD = {"head.mlp.0.weight": ones(4, 16), "head.last_layer.weight_g": ones(4, 1)}
PROJECTION = {"module.projection_head.0.weight": ones(4, 16), "module.prototypes.weight": ones(4, 4)}
QUEUE = {"module.queue": ones(2, 3), "module.queue_ptr": ones(1)}
# What training scripts store: the dictionaries of a file by their place, and words about what is taken and left out.
WRAPPED = {
    "plain": (lambda t: {"": t}, ()),
    "state_dict of a module": (lambda t: {"state_dict": under("module.", t)}, ()),
    "DINO": (
        lambda t: {
            "student": under("module.backbone.", other(t)) | under("module.", HEAD),
            "teacher": under("backbone.", t) | HEAD,
            "dino_loss": {"center": ones(1, 4)},
        },
        ("teacher backbone.* is taken, student module.backbone.* would fit too", "head.mlp.0.weight (2 in total)"),
    ),
    "MoCo": (
        lambda t: {
            "state_dict": under("module.encoder_k.", other(t))
            | under("module.encoder_q.", t | {"fc.0.weight": ones(4, 16)})
            | QUEUE
        },
        ("module.encoder_q.* is taken, state_dict module.encoder_k.* would fit too", "fc.0.weight"),
    ),
    "SwAV": (
        lambda t: {"": under("module.", t) | PROJECTION},
        ("left out: projection_head.0.weight, prototypes.weight (2 in total)",),
    ),
    "OML": (lambda t: {"state_dict": under("extractor.model.", t) | {"criterion.w": ones(3)}}, ("criterion.w",)),
    "Lightning": (
        lambda t: {"state_dict": under("net.backbone.", t) | {"net.neck.weight": ones(3)}},
        ("the network is state_dict net.backbone.*", "net.neck.weight (1 in total)"),
    ),
    "student and teacher in one dictionary": (
        lambda t: {"model": under("student.backbone.", other(t)) | under("teacher.backbone.", t)},
        ("the network is model teacher.backbone.*", "model teacher.backbone.* is taken, model student.backbone.*"),
    ),
    "teacher by an underscore": (
        lambda t: {"state_dict": under("student_backbone.", other(t)) | under("teacher_backbone.", t)},
        ("state_dict teacher_backbone.* is taken",),
    ),
    "averages of a module": (
        lambda t: {"state_dict": under("module.", other(t)), "state_dict_ema": under("module.", t)},
        ("state_dict_ema module.* is taken",),
    ),
    "averages under ema": (
        lambda t: {"model": other(t), "ema": under("ema_model.module.", t)},
        ("ema ema_model.module.* is taken",),
    ),
    "averages beside": (
        lambda t: {"state_dict": other(t), "state_dict_ema": t},
        ("state_dict_ema is taken, state_dict would fit too",),
    ),
}


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
    with pytest.raises(UserError, match=r"begin with a\.b\.\* \(\d+\) in 'model'; x\.y\.\* \(1\) in 'extra'\)"):
        weights.load(tensors._replace(values=named and under("a.b.its_", named)), variables)


class TestCures:
    def test_another_network_is_named(self, tiny):
        _, named = tiny
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

    def test_a_projection_is_kept_where_there_is_one(self, tmp_path):
        _, variables = random_variables("vit_tiny_clip", pooling="projection")
        source = write(tmp_path / "a.safetensors", variables)
        told = pretrained.fetch(source, tmp_path / "b.safetensors")
        assert "vit_tiny_clip written" in told
        projected = pretrained.load(tmp_path / "b.safetensors", variables)[0]
        assert_same(projected["params"]["trunk"], variables["params"]["trunk"])
        _, without = random_variables("vit_tiny_clip", pooling="token")
        assert "left out: head.weight (1 in total)" in pretrained.load(source, without)[1]
        own = Tensors(naming.flatten(projected), (), torch=False)
        assert_same(
            weights.load(own, without)[0]["params"]["trunk"], weights.load(source, without)[0]["params"]["trunk"]
        )
        source = write(tmp_path / "c.safetensors", without)
        with pytest.raises(UserError, match=r"head.weight is missing there .*config.model.pooling=token does without"):
            weights.load(source, variables, network="vit_tiny_clip")

    def test_another_normalisation_is_warned_of(self):
        config = default_config()
        native = Native("vit_b16", "vit", 224, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "token", "config.json")
        told = auto.check_statistics(config, native)
        assert "config.data.mean is (0.485, 0.456, 0.406) and theirs (0.5, 0.5, 0.5)" in told and "\n" not in told
        config.data.mean = config.data.std = (0.5, 0.5, 0.5)
        assert auto.check_statistics(config, native) == auto.check_statistics(default_config(), Native()) == ""
        config.data.mean = config.data.std = (0.5,)
        assert auto.check_statistics(config, native) == ""


@pytest.mark.torch
def test_a_checkpoint_of_lightning(tiny, tmp_path):
    """Plain words beside the tensors are read over; objects of other classes are refused in one line."""
    torch = pytest.importorskip("torch")
    variables, named = tiny
    state = {name: torch.from_numpy(value.copy()) for name, value in under("extractor.model.", named).items()}
    state["extractor.model.bn1.num_batches_tracked"] = torch.tensor(3)
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "state_dict": state, "optimizer_states": [moments], "hyper_parameters": {"lr": 0.1}}
    torch.save(content, tmp_path / "last.ckpt")
    loaded, told = pretrained.load(tmp_path / "last.ckpt", variables)
    assert_same(loaded["params"]["trunk"], variables["params"]["trunk"])
    assert "the network is state_dict extractor.model.*" in told and "left out" not in told
    torch.save({**content, "hyper_parameters": argparse.Namespace(lr=0.1)}, tmp_path / "refused.ckpt")
    with pytest.raises(
        UserError, match="holds more than tensors and is refused .*; save the state_dict alone"
    ) as caught:
        pretrained.read(tmp_path / "refused.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_networks_programs_and_quantised_weights_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    layer = torch.nn.Linear(2, 2)
    float8, whole = torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.zeros(2, 2).to(torch.int8)
    writers = {
        "network.pth": (
            lambda p: torch.save(layer, p),
            r"it holds objects of torch\.nn.*torch\.save\(model\.state_dict",
        ),
        "program.pt": (
            lambda p: torch.jit.save(torch.jit.script(layer), p),
            "a program of TorchScript.*torch.jit.load",
        ),
        "f8.pth": (
            lambda p: torch.save({"conv1.weight": float8}, p),
            "conv1.weight holds numbers of type float8_e4m3fn",
        ),
        "i8.pth": (lambda p: torch.save({"conv1.weight": whole}, p), "conv1.weight holds numbers of type int8"),
        "f8.safetensors": (
            lambda p: save_file({"a": float8}, p),
            "a holds numbers of type F8_E4M3.*give the weights in",
        ),
        "i8.safetensors": (lambda p: save_file({"fc1.weight": whole}, p), "fc1.weight holds numbers of type I8"),
    }
    for name, (save, message) in writers.items():
        save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: .*{message}") as caught:
            pretrained.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    # Counters and indices are whole numbers in all weights.
    save_file({"a.weight": torch.ones(2, 2), "position_ids": torch.arange(3)}, tmp_path / "good.safetensors")
    assert pretrained.read(tmp_path / "good.safetensors").values["position_ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_fetch_keeps_the_channels_of_the_weights(channels, tmp_path):
    _, variables = random_variables("convnet_tiny", channels=channels)
    weights, out = write(tmp_path / "w.safetensors", variables), tmp_path / "out.safetensors"
    assert "convnet_tiny written to" in pretrained.fetch(weights, out)
    named, fetched = safetensors.load_file(weights), safetensors.load_file(out)
    assert fetched.keys() == named.keys()
    assert all((fetched[name] == value).all() for name, value in named.items())


def test_names_of_transformers_below_a_wrapper(tmp_path):
    """As ``ViTForImageClassification`` in a wrapper: queries, keys and values apart, and a text tower beside it."""
    _, variables = random_variables("vit_tiny")
    named = {
        naming.torch_name(p): naming.to_torch(p, v) for p, v in naming.flatten(variables).items() if "/trunk/" in p
    }
    theirs = {
        "text_model.embeddings.weight": ones(2, 2),
        "classifier.weight": ones(5, 24),
        "pooler.dense.bias": ones(24),
    }
    words = (
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"), ("blocks.", "encoder.layer."), ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    for name, value in named.items():
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        for old, new in words:
            name = name.replace(old, new)
        parts = {name: value}
        if ".attn.qkv." in name:
            split = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            parts = {name.replace("attn.qkv", f"attention.attention.{part}"): piece for part, piece in split}
        theirs |= parts
    source = tmp_path / "model.safetensors"
    safetensors.save_file({n: np.ascontiguousarray(v) for n, v in under("net.vit.", theirs).items()}, source)
    loaded, told = pretrained.load(source, variables, network="vit_tiny")
    assert_same(loaded["params"]["trunk"], variables["params"]["trunk"])
    assert "text_model.embeddings.weight" in told and "(3 in total)" in told
    assert pretrained.read(source).network == "" and "vit_tiny" in weights.show(source)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DINOV2 = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 14, "image_size": 518}
CLIP = {"model_type": "clip", "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32}}
SIZES = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
STATISTICS = {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]}


@pytest.mark.parametrize(
    "config,images,expected",
    [
        (
            {"architecture": "resnet50", "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.95, **IMAGENET}},
            {},
            Native("resnet50", "resnet50 of timm", 224, 235, **IMAGENET),
        ),
        (
            {
                "architecture": "vit_small_patch14_dinov2",
                "global_pool": "token",
                "pretrained_cfg": {"tag": "lvd142m", "input_size": [3, 518, 518], "crop_pct": 1.0, **IMAGENET},
            },
            {},
            Native("vit_s14_dinov2", "vit_small_patch14_dinov2 of timm", 518, 518, **IMAGENET, pooling="token"),
        ),
        (
            DINOV2,
            {**SIZES, **STATISTICS},
            Native(
                "vit_s14_dinov2", "dinov2 of transformers (hidden_size 384, num_hidden_layers 12, patch_size 14)",
                224, 256, **IMAGENET, pooling="token",
            ),
        ),
        (
            CLIP,
            {"size": 224, "crop_size": 224, **STATISTICS},
            Native(
                "clip_vit_b32", "clip of transformers (hidden_size 768, num_hidden_layers 12, patch_size 32)",
                224, 224, **IMAGENET, pooling="token",
            ),
        ),
        (
            {"model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, **STATISTICS},
            Native("convnext_base", "convnext of transformers", 224, 256, **IMAGENET, pooling="avg"),
        ),
        ({"architecture": "resnet50", "input_size": 160}, {}, Native("resnet50", "resnet50 of timm", 160, 160)),
        ({"architecture": "resnet50", "input_size": [3, 224, 320]}, {}, Native("resnet50", "resnet50 of timm")),
        ({"model_type": "swin"}, {"size": "large", "image_mean": "no"}, Native("", "swin of transformers")),
        ({"architecture": "resnest50d"}, {}, Native("", "resnest50d of timm")),
        ({"something": "else"}, {}, Native()),
    ],
)  # fmt: skip
def test_settings_beside_the_weights(tmp_path, config, images, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    native = about.native_of(tmp_path, {}, tmp_path / "model.safetensors")
    assert replace(native, told_by="") == expected
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read as JSON"):
        about.native_of(tmp_path, {}, tmp_path / "model.safetensors")


@pytest.mark.parametrize("architecture", ["resnetaa50", "resnetblur50", "efficientnet_lite0"])
def test_what_computes_something_else_with_the_same_tensors_is_refused(tmp_path, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    with pytest.raises(UserError, match=f"{architecture} of timm"):
        about.native_of(tmp_path, {}, tmp_path / "model.safetensors")


def test_a_published_size_becomes_whole_patches():
    own = Native("siglip_so400m14", "siglip of timm", 384, 384, told_by="config.json")
    found = native_of(Tensors({}, (), torch=True, network="siglip_so400m14", native=own, name="x"))
    assert (found.image_size, found.resize) == (378, 384)


def test_a_file_is_read_with_the_settings_beside_it(tmp_path):
    _, variables = random_variables("vit_tiny", size=16)
    source = write(tmp_path / "model.safetensors", variables)
    settings = {"architecture": "vit_toy_patch8_16", "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert weights.read(source).native == weights.read(tmp_path).native != Native()
    write(tmp_path / "other.safetensors", variables)  # not the one that the settings are of
    assert weights.read(tmp_path / "other.safetensors").native == Native()


@pytest.mark.parametrize(
    "content,message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not weights"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_lies_in_the_place_of_weights_is_named(tmp_path, content, message, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        weights.read(path)


class TestAuto:
    """``model.name=auto`` on a plain file, which only its tensors identify."""

    def config(self, source, **changes):
        config = default_config()
        config.update_from_flattened_dict({"model.name": "auto", "model.init_from": str(source), **changes})
        return config

    def test_names_and_shapes_are_enough(self, tmp_path):
        _, variables = random_variables("vit_tiny", size=40)
        source = write(tmp_path / "a.safetensors", variables)
        found = auto.resolved(self.config(source), tmp_path / "run")
        assert (found.model.name, found.data.image_size) == ("vit_tiny", 40)
        # What differs from its default has been chosen; without a file that says more, the rest stays.
        found = auto.resolved(self.config(source, **{"data.image_size": 24}), tmp_path / "run")
        assert found.data.image_size == 24 and found.data.mean == default_config().data.mean

    def test_statistics_of_grey_images_are_the_average(self, tmp_path):
        _, variables = random_variables("resnet_tiny")
        metadata = {"network": "resnet_tiny", "mean": "[0.2, 0.3, 0.4]", "std": "[0.1, 0.2, 0.3]", "image_size": "32"}
        named = safetensors.load_file(write(tmp_path / "a.safetensors", variables))
        safetensors.save_file(named, tmp_path / "b.safetensors", metadata)
        config = self.config(tmp_path / "b.safetensors", **{"data.channels": 1})
        found = auto.resolved(config, tmp_path / "run", chosen={"data.std"})
        assert found.data.mean == pytest.approx((0.3,)) and found.data.std == config.data.std
        assert found.data.image_size == found.data.resize == 32 and config.model.name == "auto"

    def test_what_cannot_be_known_is_said(self, tmp_path):
        safetensors.save_file({"a.weight": ones(2, 3, 1, 1)}, tmp_path / "a.safetensors")
        with pytest.raises(
            UserError, match=r"none of this .* networks .*1 tensors, first a.weight \(2, 3, 1, 1\).*resnet50"
        ):
            auto.resolved(self.config(tmp_path / "a.safetensors"), tmp_path / "run")
        message = r"no pretrained weights are named.*config.model.init_from=efficientnet_lite0 .*config=folder:scratch"
        with pytest.raises(UserError, match=message):
            auto.resolved(self.config(""), tmp_path / "run")

    def test_the_origin_in_the_settings_must_be_true(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(safetensors.save({"a": ones(2)}))
        config, located = self.config(tmp_path / "a.safetensors"), weights.locate(tmp_path / "a.safetensors")
        auto.record_origin(config, located)
        origin = config.model.init_origin
        assert (origin.file, origin.commit) == ("a.safetensors", "") and len(origin.sha256) == 64
        auto.record_origin(config, located)
        (tmp_path / "a.safetensors").write_bytes(safetensors.save({"a": ones(3)}))
        with pytest.raises(UserError, match="config.model.init_origin.sha256 = .*, but these weights have"):
            auto.record_origin(config, located)
