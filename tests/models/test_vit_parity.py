"""Vision transformers against timm's and transformers' own, small and with the same random weights."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idml_jax import models, pretrained
from idml_jax.models import naming, positions
from idml_jax.models.catalogue import CATALOGUE, for_timm, for_transformers
from idml_jax.models.transformers_names import canonical
from idml_jax.models.vit import TRUNKS

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
from torch_libraries import import_beside_torch  # noqa: E402

WIDTH, HEADS, DEPTH, GRID, OTHER = 24, 3, 1, (4, 4), (3, 6)
KEYS = ("vit_b32", "vit_s14_dinov2", "vit_s14_dinov2_reg", "vit_s16_dinov3", "clip_vit_b16", "siglip_vit_b16")


def trunk_of(key, antialias=None):
    patch = CATALOGUE[key].transformers.patch
    trunk = models.MODELS[key](depth=DEPTH, width=WIDTH, heads=HEADS, hidden=2 * WIDTH, image_size=GRID[0] * patch)
    if antialias is not None:
        trunk = trunk.clone(family=type(trunk.family)(**{**vars(trunk.family), "antialias": antialias}))
    return trunk.clone(output="token") if key.startswith("siglip") else trunk


@lru_cache
def program(trunk):
    """Gradients, all tokens after the last LayerNorm, and the output; weighted sums of the latter two are the loss."""

    def loss(params, images, weights):
        out, kept = trunk.apply(
            {"params": params},
            images,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.path == ("norm",),
        )
        tokens = kept["intermediates"]["norm"]["__call__"][0]
        total = jnp.sum(tokens * weights)
        return total + (jnp.sum(out * weights[:, 0]) if trunk.output == "token" else 0.0), (tokens, out)

    return jax.jit(jax.grad(loss, has_aux=True))


def randomise(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator) + (1.0 if "norm" in name else 0.0))
    return net.eval()


def images_of(key, grid):
    patch = CATALOGUE[key].transformers.patch
    rng = np.random.default_rng(1)
    tokens = grid[0] * grid[1] + trunk_of(key).family.prefix
    images = rng.normal(size=(2, grid[0] * patch, grid[1] * patch, 3)).astype(np.float32)
    return images, rng.normal(size=(2, tokens, WIDTH)).astype(np.float32)


def ours(trunk, tensors, images, weights):
    like = naming.flatten(jax.eval_shape(trunk.init, jax.random.key(0), images)["params"], "params/trunk/")
    names = {path: naming.torch_name(path) for path in like}
    assert set(names.values()) == set(tensors)
    flat = {path: naming.from_torch(path, tensors[name]) for path, name in names.items()}
    assert {path: value.shape for path, value in flat.items()} == {path: x.shape for path, x in like.items()}
    params = naming.unflatten({path.removeprefix("params/trunk/"): value for path, value in flat.items()})
    grads, (tokens, out) = program(trunk)(params, images, weights)
    grads = naming.flatten(grads, "params/trunk/")
    return (
        np.asarray(tokens),
        np.asarray(out),
        {names[path]: naming.to_torch(path, np.asarray(g)) for path, g in grads.items()},
    )


def assert_close(got, expected, name=""):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def assert_alike(mine, tokens, out, grads):
    assert_close(mine[0], tokens.detach().numpy(), "tokens")
    if out is not None:
        assert_close(mine[1], out.detach().numpy(), "output")
    assert set(mine[2]) == set(grads)
    largest = max(np.abs(g).max() for g in grads.values())
    for name, grad in grads.items():
        # A gradient that is zero but for rounding is measured by the others.
        np.testing.assert_allclose(mine[2][name], grad, rtol=1e-3, atol=1e-5 * largest, err_msg=name)
        assert np.linalg.norm(mine[2][name] - grad) < 1e-4 * max(np.linalg.norm(grad), 1e-2 * largest), name


def backward(net, tokens, out, weights):
    """Gradients by name of the loss of ``program``."""
    weights = torch.from_numpy(weights)
    loss = (tokens * weights).sum()
    if out is not None:
        loss = loss + (out * weights[:, 0]).sum()
    net.zero_grad()
    loss.backward()
    return {name: p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}


def cases(*quick):
    """Every network at its own image size, and at another; the latter is slow but for those named (compiling)."""
    other = [
        pytest.param(key, OTHER, id=f"{key}-other", marks=() if key in quick else pytest.mark.slow) for key in KEYS
    ]
    return [pytest.param(key, GRID, id=key) for key in KEYS] + other


@pytest.mark.parametrize("key,grid", cases("vit_s14_dinov2_reg", "vit_s16_dinov3"))
def test_the_same_function_as_timms(key, grid):
    timm = import_beside_torch("timm")
    name = CATALOGUE[key].timm[-1].split(".")[0] if "dinov3" in key else CATALOGUE[key].timm[0]
    patch = CATALOGUE[key].transformers.patch
    settings = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH, "mlp_ratio": 2, "num_classes": 0}
    if key.startswith("siglip"):
        settings["act_layer"] = "gelu_tanh"  # as SigLIP was trained; timm has the exact GELU for some of its names
    net = timm.create_model(name, img_size=GRID[0] * patch, dynamic_img_size=True, **settings)
    net = randomise(net)
    tensors = {n: v.numpy() for n, v in net.state_dict().items()}
    trunk = trunk_of(key, antialias=None if grid == GRID else True)
    images, weights = images_of(key, grid)
    tokens = net.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    out = net.forward_head(tokens, pre_logits=True) if key.startswith("siglip") else None
    grads = backward(net, tokens, out, weights)
    assert_alike(ours(trunk, tensors, images, weights), tokens, out, grads)


def transformers_net(key):
    """The network, and a function from images to all tokens after the last LayerNorm and the pooled output."""
    transformers = import_beside_torch("transformers")
    there = CATALOGUE[key].transformers
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH,
        "patch_size": there.patch, "image_size": GRID[0] * there.patch,
    }  # fmt: skip
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    if key == "vit_b32":
        net = transformers.ViTModel(transformers.ViTConfig(**sizes, layer_norm_eps=1e-6))
        return net, lambda x: (net(x, interpolate_pos_encoding=True).last_hidden_state, None)
    if "dinov2" in key:
        sizes["mlp_ratio"] = 2
        kind = "Dinov2WithRegisters" if there.registers else "Dinov2"
        net = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
        return net, lambda x: (net(x).last_hidden_state, None)
    if "dinov3" in key:
        net = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, num_register_tokens=4))
        return net, lambda x: (net(x).last_hidden_state, None)
    kind = "CLIP" if key.startswith("clip") else "Siglip"
    config = getattr(transformers, f"{kind}Config")(vision_config=sizes, text_config=text)
    net = getattr(transformers, f"{kind}Model")(config)
    tower = net.vision_model

    def apply(x):
        out = tower(x, interpolate_pos_encoding=True)
        if kind == "Siglip":
            return out.last_hidden_state, out.pooler_output
        return tower.post_layernorm(out.last_hidden_state), None

    return net, apply


@pytest.mark.parametrize("key,grid", cases("vit_s14_dinov2", "vit_s14_dinov2_reg", "vit_s16_dinov3"))
def test_the_same_function_as_transformers(key, grid, tmp_path):
    net, apply = transformers_net(key)
    net = randomise(net)
    found = canonical({n: v.numpy() for n, v in net.state_dict().items()})
    # A file has other names than the network in memory, as of version 5.
    net.save_pretrained(tmp_path)
    same = canonical(load_file(tmp_path / "model.safetensors")).values
    assert same.keys() == found.values.keys() and all((same[n] == v).all() for n, v in found.values.items())
    tensors = {n: v for n, v in found.values.items() if not n.startswith("head.")}
    images, weights = images_of(key, grid)
    # Only Dinov2WithRegisters antialiases there.
    trunk = trunk_of(key, antialias=None if grid == GRID or "dino" in key else False)
    tokens, out = apply(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    grads = backward(net, tokens, out, weights)
    if "reg" in key:  # the class token's position is added to the token, and so would be its gradient
        next(g for n, g in grads.items() if n.endswith("position_embeddings"))[:, 0] = 0.0
    assert_alike(ours(trunk, tensors, images, weights), tokens, out, canonical(grads).values)
    assert for_transformers(net.config.to_dict()) is None  # none is that small
    names = {name.split(".")[0] for name in found.left_out}
    towers = {"text_model", "logit_scale"}
    expected = {
        "vit_b32": {"pooler"}, "vit_s14_dinov2": {"embeddings"}, "vit_s14_dinov2_reg": {"embeddings"},
        "vit_s16_dinov3": {"embeddings"}, "clip_vit_b16": towers | {"text_projection"},
        "siglip_vit_b16": towers | {"logit_bias"},
    }[key]  # fmt: skip
    assert names - {"vision_model"} == expected
    if "clip" in key and "siglip" not in key:
        assert (found.values["head.weight"] == net.visual_projection.weight.detach().numpy()).all()


@pytest.mark.parametrize("pooling", ["avg", "projection"])
def test_a_file_of_timms_loads_for_another_image_size(tmp_path, pooling):
    timm = import_beside_torch("timm")
    settings = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "img_size": 32, "num_classes": 8}
    net = randomise(timm.create_model("vit_base_patch16_clip_quickgelu_224", **settings))
    save_file({n: v.numpy() for n, v in net.state_dict().items()}, tmp_path / "model.safetensors")
    model = models.create_model("vit_tiny_clip", pooling=pooling)
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32))
    loaded, told = pretrained.load(tmp_path / "model.safetensors", like, network="vit_tiny_clip")
    left = ("head.bias",) if pooling == "projection" else ("head.bias", "head.weight")
    assert told.endswith(f"left out: {', '.join(left)} ({len(left)} in total)")
    trunk = loaded["params"]["trunk"]
    expected = timm.layers.resample_abs_pos_embed(net.pos_embed, [6, 6]).detach().numpy()
    np.testing.assert_allclose(trunk["pos_embed"], expected, atol=1e-6)
    if pooling == "projection":
        np.testing.assert_array_equal(trunk["head"]["kernel"].T, net.head.weight.detach().numpy())


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resized_as_by_pytorch(antialias):
    for old, new in (((16, 16), (7, 7)), ((4, 4), (9, 5)), ((3, 5), (4, 4)), ((1, 1), (3, 2)), ((37, 37), (16, 16))):
        table = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 3)).astype(np.float32)
        grid = torch.from_numpy(table[:, 1:]).reshape(1, *old, 3).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=antialias)
        got = positions.resize(table, old, new, antialias)
        np.testing.assert_array_equal(got[:, 0], table[:, 0])
        np.testing.assert_allclose(got[0, 1:], expected.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k == "vit_s16_dinov3" else pytest.mark.slow) for k in CATALOGUE if k in TRUNKS]
)
def test_the_catalogue_names_architectures_with_these_parameters(key):
    timm = import_beside_torch("timm")
    entry, trunk = CATALOGUE[key], models.MODELS[key]()
    images = jax.ShapeDtypeStruct((1, entry.image_size, entry.image_size, 3), jnp.float32)
    shapes = naming.flatten(jax.eval_shape(trunk.init, jax.random.key(0), images)["params"], "params/trunk/")
    mine = {naming.torch_name(p): naming.shape_in_torch(p, x.shape) for p, x in shapes.items()}
    for name in entry.timm:
        architecture, _, tag = name.partition(".")
        assert for_timm(architecture, tag) == key
        assert timm.is_model(architecture), name
    architecture = next(n for n in entry.timm if "dinov3" not in n or "qkvb" in n)
    with torch.device("meta"):
        net = timm.create_model(architecture, num_classes=0, img_size=entry.image_size)
    assert {n: tuple(v.shape) for n, v in net.named_parameters()} == mine
    assert net.blocks[0].attn.num_heads == trunk.heads
    assert net.norm.eps == trunk.family.epsilon
    assert (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]) == (entry.mean, entry.std)
