"""Vision transformers: what they give, the sizes they take, memory and precision, names of other libraries."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models
from idml_jax.models import naming, vit
from idml_jax.models.catalogue import CATALOGUE, for_timm, for_transformers
from idml_jax.models.transformers_names import canonical

TINY = [name for name in vit.TRUNKS if name.startswith("vit_tiny")]
# Compiling a gradient takes seconds.
QUICK = [pytest.param(name, marks=() if name == "vit_tiny_dinov3" else pytest.mark.slow) for name in TINY]


def images_of(height=16, width=16, n=3):
    return np.random.default_rng(0).normal(size=(n, height, width, 3)).astype(np.float32)


def random_variables(trunk, images):
    """Every parameter drawn at random: the usual start has zeros and tiny factors, which hide faults."""
    like = jax.eval_shape(trunk.init, jax.random.key(0), images)
    rng = np.random.default_rng(1)
    draw = lambda path, x: 0.2 * rng.normal(size=x.shape).astype(np.float32) + np.float32("norm" in str(path))
    return jax.tree_util.tree_map_with_path(draw, like)


@pytest.mark.parametrize(
    "name", ["vit_tiny_dinov2_reg", "vit_tiny_siglip", pytest.param("vit_tiny_clip", marks=pytest.mark.slow)]
)
def test_every_pooling_is_of_the_same_tokens(name):
    images = images_of(16, 24)
    trunk = models.MODELS[name](depth=1)
    # The projection has parameters only where it is asked for.
    variables = random_variables(trunk.clone(output=trunk.vectors[-1]), images)

    @jax.jit
    def tokens_and_outputs(variables, images):
        kept = trunk.apply(variables, images, mutable=["intermediates"], capture_intermediates=True)[1]["intermediates"]
        outputs = {kind: trunk.clone(output=kind).apply(variables, images) for kind in ("map", *trunk.vectors)}
        return kept["norm"]["__call__"][0], outputs, kept.get("attn_pool", {}).get("__call__")

    tokens, out, pooled = tokens_and_outputs(variables, images)
    prefix = trunk.family.prefix
    assert tokens.shape == (3, prefix + 6, 24) and prefix == {"siglip": 0, "clip": 1}.get(name.split("_")[2], 5)
    chex.assert_trees_all_close(out["map"].reshape(3, 6, 24), tokens[:, prefix:])
    chex.assert_trees_all_close(out["token"], pooled[0] if pooled else tokens[:, 0])
    own = tokens[:, prefix:] if pooled else jnp.concatenate([tokens[:, :1], tokens[:, prefix:]], axis=1)
    chex.assert_trees_all_close(out["mean_tokens"], own.mean(1), rtol=1e-5, atol=1e-6)
    if "projection" in out:
        head = variables["params"]["head"]["kernel"]
        chex.assert_trees_all_close(out["projection"], tokens[:, 0] @ head, rtol=1e-4, atol=1e-5)


def test_a_pooling_that_a_trunk_does_not_give_is_refused():
    with pytest.raises(ValueError, match="pooling 'mean_tokens' needs tokens, which resnet_tiny does not have"):
        models.create_model("resnet_tiny", pooling="mean_tokens")
    with pytest.raises(ValueError, match="'projection' needs a space shared with texts, which vit_b16 does not have"):
        models.create_model("vit_b16", pooling="projection")
    for name in CATALOGUE:
        if name in vit.TRUNKS:
            assert ("projection" in models.MODELS[name]().vectors) is ("clip_" in name)
            for pooling in ("avg", "max", "avg_max", "token", "mean_tokens"):
                assert models.create_model(name, pooling=pooling).pooling == pooling


@pytest.mark.parametrize("name", TINY)
def test_image_sizes_that_fit_are_named(name):
    model = models.create_model(name)
    with pytest.raises(ValueError, match=r"^16 x 16 or 24 x 24 pixels would fit: .* patches of 8 .*; got 20 x 20$"):
        model.check_images(20, 20)
    with pytest.raises(ValueError, match=r"^8 x 32 pixels would fit: .*; got 7 x 32$"):
        model.check_images(7, 32)
    model.check_images(8, 32)


def test_native_sizes_fit():
    for name, entry in CATALOGUE.items():
        models.create_model(name).check_images(entry.image_size, entry.image_size)


@pytest.mark.parametrize("name", QUICK)
def test_bfloat16_and_rematerialised_blocks(name):
    images = images_of()
    results = {}
    trunk = models.MODELS[name](depth=1, output="token")
    variables = random_variables(trunk, images)
    for kind in (trunk, trunk.clone(dtype=jnp.bfloat16, remat=True)):
        loss = lambda params, kind=kind: jnp.sum(jnp.sin(kind.apply({"params": params}, images).astype(jnp.float32)))
        results[kind.remat] = jax.jit(jax.grad(loss))(variables["params"])
        if kind.remat:
            assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
            assert jax.eval_shape(lambda v, kind=kind: kind.apply(v, images), variables).dtype == jnp.bfloat16
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(results[False]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(results[True]))
    chex.assert_trees_all_close(results[True], results[False], rtol=0.1, atol=0.03 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_same_step_in_parts(name):
    """``optim.accumulate``: the trunk sees the batch in parts, in a compiled loop."""
    model = models.create_model(name, embedding_dim=4, uncertainty_dim=3, pooling="token").looped
    images = images_of(n=4)
    variables = random_variables(model, images)

    def loss(params, parts):
        rows = jnp.reshape(images, (parts, -1, *images.shape[1:]))
        features = jax.lax.map(lambda part: model.apply({"params": params}, part, True, method="features"), rows)
        return jnp.sum(jnp.sin(features))

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], parts)["trunk"] for parts in (1, 2)]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)


def test_positions_of_one_size_serve_images_of_another():
    trunk = models.MODELS["vit_tiny_siglip"](depth=1)
    variables = random_variables(trunk, images_of(16, 16))
    table = variables["params"]["pos_embed"]
    with pytest.raises(ValueError, match="the positions are 4, these images need 6: load the weights for images of"):
        trunk.apply(variables, images_of(16, 24))
    resized = vit.positions.resize(table, (2, 2), (2, 3), antialias=True)
    by_hand = {"params": {**variables["params"], "pos_embed": resized}}
    images = images_of(16, 24)
    apply = jax.jit(lambda trunk, v: trunk.apply(v, images), static_argnums=0)
    chex.assert_trees_all_close(
        apply(trunk.clone(image_size=16), variables), apply(trunk, by_hand), rtol=1e-5, atol=1e-5
    )
    # At load time the number of positions tells the grid, if both are square.
    assert vit.fit_positions(table, (1, 9, 24), "vit_tiny_siglip").shape == (1, 9, 24)
    assert vit.fit_positions(table, (1, 10, 24)) is table and vit.fit_positions(table, (1, 4, 24)) is table
    same = np.ones((1, 5, 24), np.float32)
    np.testing.assert_allclose(vit.fit_positions(same, (1, 17, 24), "vit_tiny_dinov2"), 1.0, rtol=1e-6)


def test_names_of_timms_and_metas_files():
    def named(name):
        trunk = models.MODELS[name]()
        variables = naming.flatten(random_variables(trunk, images_of())["params"], "params/trunk/")
        return {naming.torch_name(path): naming.to_torch(path, value) for path, value in variables.items()}

    # timm leaves out the biases of DINOv3, which are zero.
    file = {n: v for n, v in named("vit_tiny_dinov3").items() if not n.endswith(("q_bias", "v_bias"))}
    found = canonical(file)
    assert set(found.values) == set(named("vit_tiny_dinov3")) and not found.left_out
    assert found.added == tuple(f"blocks.{i}.attn.{b}_bias" for i in (0, 1) for b in "qv")
    assert not any(found.values[name].any() for name in found.added)
    # Meta's DINOv2 has another name for the registers, and a position of the class token.
    ours = named("vit_tiny_dinov2_reg")
    first = np.full((1, 1, 24), 0.25, np.float32)
    file = {n.replace("reg_token", "register_tokens"): v for n, v in ours.items()} | {"mask_token": first[0]}
    file |= {"cls_token": ours["cls_token"] - first, "pos_embed": np.concatenate([first, ours["pos_embed"]], axis=1)}
    found = canonical(file)
    assert found.left_out == ("mask_token",) and not found.added
    chex.assert_trees_all_close(found.values, ours, rtol=1e-6)
    # What is timm's, or of another family, passes.
    other = {"conv1.weight": np.ones((4, 3, 3, 3)), "layer1.0.bn1.weight": np.ones(4)}
    assert canonical(other).values == other and canonical(ours).values.keys() == ours.keys()


def test_the_catalogue_finds_the_network_of_a_config():
    assert set(CATALOGUE) <= set(models.MODELS)
    assert for_timm("vit_base_patch16_clip_224", "openai") == "clip_vit_b16"
    assert for_timm("vit_base_patch16_clip_224", "laion2b") == "openclip_vit_b16"
    assert for_timm("vit_base_patch16_clip_quickgelu_224", "openai") == "clip_vit_b16"
    assert for_timm("vit_small_patch16_dinov3", "lvd1689m") == "vit_s16_dinov3"
    assert for_timm("vit_small_patch16_dinov4") is None
    # Published files leave out what is the default of transformers.
    assert for_transformers({"model_type": "siglip", "vision_config": {"model_type": "x"}}) == "siglip_vit_b16"
    assert for_transformers({"model_type": "clip", "vision_config": {}}) == "clip_vit_b32"
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    assert for_transformers({"model_type": "clip_vision_model", **large}) == "clip_vit_l14"
    assert for_transformers({"model_type": "dinov2", **large}) == "vit_l14_dinov2"
    assert for_transformers({"model_type": "dinov2_with_registers", **large}) == "vit_l14_dinov2_reg"
    assert for_transformers({"model_type": "dinov3_vit", "num_register_tokens": 4}) == "vit_s16_dinov3"
    assert for_transformers({"model_type": "bert"}) is None and for_transformers({}) is None
