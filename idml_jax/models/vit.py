"""Vision transformers (Dosovitskiy et al., ICLR 2021), laid out and named as in timm.

One network with options: a ``Family`` says what tells DINOv2, DINOv3, CLIP and SigLIP from the plain network, and
``TRUNKS`` gives the sizes.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models import positions
from idml_jax.models.vit_parts import AttentionPool, Block, Family, PatchEmbed, truncated

PLAIN = Family()
# timm antialiases here too, which Meta's code and transformers do not.
DINOV2 = Family(layer_scale=1e-5, antialias=False)
DINOV2_REGISTERS = Family(layer_scale=1e-5, registers=4, learned="patches")
DINOV3 = Family(epsilon=1e-5, layer_scale=1e-5, registers=4, learned="none", rotary=100.0, key_bias=False)
CLIP = Family(activation="quick_gelu", epsilon=1e-5, patch_bias=False, first_norm=True)
OPENCLIP = Family(epsilon=1e-5, patch_bias=False, first_norm=True)
SIGLIP = Family(activation="gelu_tanh", class_token=False, learned="patches", attention_pool=True)


class VisionTransformer(nn.Module):
    """A vision transformer without its classifier. It has no BatchNorm.

    Attributes:
      depth: blocks.
      width: width of a token.
      heads: number of attention heads.
      patch: side of a patch in pixels.
      hidden: width inside a block's network; 0: four times that of a token.
      family: what else tells the network from others.
      image_size: side of the images that the learned positions belong to, in pixels; they are resized to those of
        other images. 0: the images at hand have this size.
      output: ``map`` (of the patches), or one of ``vectors``.
      projection: width of the space that images share with texts (CLIP); 0: there is none.
      frozen_statistics: without effect; there are no statistics.
      remat: keep only the input of every block for the gradient and compute the rest again.
      dtype: of layers and activations; parameters and softmax stay float32.
    """

    depth: int
    width: int
    heads: int
    patch: int = 16
    hidden: int = 0
    family: Family = PLAIN
    image_size: int = 0
    output: str = "map"
    projection: int = 0
    frozen_statistics: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    has_statistics = False
    signed_maps = True

    @property
    def vectors(self) -> tuple[str, ...]:
        """What the network can give as one vector per image, besides pooling its map.

        ``token`` is the class token or, in SigLIP, what attention reads from the patches; ``mean_tokens`` is the mean
        of class token and patches (registers do not count); ``projection`` is CLIP's vector in the space of its texts.
        """
        own_vector = self.family.class_token or self.family.attention_pool
        return (*["token"] * own_vector, "mean_tokens", *["projection"] * bool(self.projection))

    def check_images(self, height: int, width: int) -> None:
        """Raises ``ValueError`` if an image of this size is not a whole number of patches."""
        if height % self.patch or width % self.patch or not height or not width:
            near = " or ".join(f"{h} x {w}" for h, w in self._sizes_near(height, width))
            raise ValueError(
                f"{near} pixels would fit: a vision transformer with patches of {self.patch} pixels needs images of a "
                f"multiple of it; got {height} x {width}"
            )

    def _sizes_near(self, height: int, width: int) -> list[tuple[int, int]]:
        below, above = (tuple(up(side / self.patch) * self.patch for side in (height, width)) for up in (int, _ceil))
        return [(h, w) for h, w in dict.fromkeys((below, above)) if h and w]

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ..."]:
        """The last tokens, normalised: the map of the patches ``[n, h2, w2, width]``, or a vector ``[n, width]``.

        Raises:
          ValueError: if an image is not a whole number of patches, or the positions are of another size.
        """
        height, width = images.shape[1:3]
        self.check_images(height, width)
        family, dtype = self.family, self.dtype
        grid = (height // self.patch, width // self.patch)
        x = PatchEmbed(self.width, self.patch, family.patch_bias, dtype, name="patch_embed")(images.astype(dtype))
        x = self._with_first_tokens(x, grid)
        if family.first_norm:
            x = family.norm(dtype, "norm_pre")(x)
        block = nn.remat(Block) if self.remat else Block
        hidden = self.hidden or 4 * self.width
        for index in range(self.depth):
            x = block(self.heads, hidden, family, grid, dtype, name=f"blocks_{index}")(x)
        x = family.norm(dtype, "norm")(x)
        if family.attention_pool:
            # Also where it is not asked for, so that the parameters do not depend on that.
            pooled = AttentionPool(self.heads, hidden, family, dtype, name="attn_pool")(x)
        if self.output == "token":
            return pooled if family.attention_pool else x[:, 0]
        if self.output == "projection":
            return nn.Dense(self.projection, use_bias=False, dtype=dtype, kernel_init=truncated, name="head")(x[:, 0])
        patches = x[:, family.prefix :]
        if self.output == "mean_tokens":
            tokens = jnp.concatenate([x[:, : int(family.class_token)], patches], axis=1)
            return jnp.mean(tokens.astype(jnp.float32), axis=1)
        return patches.reshape(x.shape[0], *grid, self.width)

    def _with_first_tokens(self, patches: Float[Array, "n p d"], grid: positions.Grid) -> Float[Array, "n t d"]:
        """Class token, registers and patches, with their learned positions."""
        family, n = self.family, patches.shape[0]  # symbolic in an exported program
        widen = lambda token: jnp.broadcast_to(token, (n, *token.shape[1:])).astype(self.dtype)
        first, x = [], patches
        if family.class_token:
            first.append(self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width), jnp.float32))
        if family.learned == "all":
            x = jnp.concatenate([*map(widen, first), x], axis=1)
            first = []
        if family.learned != "none":
            own = (self.image_size // self.patch,) * 2 if self.image_size else grid
            shape = (1, x.shape[1] - patches.shape[1] + own[0] * own[1], self.width)
            self._check_positions(shape)
            table = self.param("pos_embed", truncated, shape, jnp.float32)
            x = x + positions.resize(table, own, grid, family.antialias).astype(self.dtype)
        if family.registers:
            shape = (1, family.registers, self.width)
            first.append(self.param("reg_token", nn.initializers.normal(1e-6), shape, jnp.float32))
        return jnp.concatenate([*map(widen, first), x], axis=1)

    def _check_positions(self, shape: tuple[int, ...]) -> None:
        stored = self.get_variable("params", "pos_embed") if self.has_variable("params", "pos_embed") else None
        if stored is not None and stored.shape != shape:
            raise ValueError(
                f"the positions are {stored.shape[1]}, these images need {shape[1]}: load the weights for images of "
                "this size, or give the trunk the image_size that the positions belong to"
            )


def fit_positions(
    table: Float[np.ndarray, "1 t d"], shape: tuple[int, ...], network: str = ""
) -> Float[np.ndarray, "1 t2 d"]:
    """Position embeddings of a weights file for the shape that a network wants, both of square images.

    Args:
      table: as stored.
      shape: as wanted.
      network: key of ``TRUNKS``, which says how its positions are resized.

    Returns:
      The table of this shape; the table as it is if that cannot be done.
    """
    if table.ndim != 3 or table.shape == shape or table.shape[2] != shape[2]:
        return table
    grids = positions.square_grids(table.shape[1], shape[1])
    antialias = TRUNKS[network]().family.antialias if network in TRUNKS else True
    return positions.resize(table, *grids, antialias) if grids else table


def _ceil(x: float) -> int:
    return int(np.ceil(x))


ViTT16 = partial(VisionTransformer, depth=12, width=192, heads=3)
ViTS16 = partial(VisionTransformer, depth=12, width=384, heads=6)
ViTB16 = partial(VisionTransformer, depth=12, width=768, heads=12)
ViTL16 = partial(VisionTransformer, depth=24, width=1024, heads=16)
ViTB32 = partial(ViTB16, patch=32)
ViTSO14 = partial(VisionTransformer, depth=27, width=1152, heads=16, patch=14, hidden=4304)
# For tests.
_ViTTiny = partial(VisionTransformer, depth=2, width=24, heads=3, patch=8)

TRUNKS = {
    "vit_t16": ViTT16,
    "vit_s16": ViTS16,
    "vit_b16": ViTB16,
    "vit_l16": ViTL16,
    "vit_b32": ViTB32,
    "vit_s14_dinov2": partial(ViTS16, patch=14, family=DINOV2),
    "vit_b14_dinov2": partial(ViTB16, patch=14, family=DINOV2),
    "vit_l14_dinov2": partial(ViTL16, patch=14, family=DINOV2),
    "vit_s14_dinov2_reg": partial(ViTS16, patch=14, family=DINOV2_REGISTERS),
    "vit_b14_dinov2_reg": partial(ViTB16, patch=14, family=DINOV2_REGISTERS),
    "vit_l14_dinov2_reg": partial(ViTL16, patch=14, family=DINOV2_REGISTERS),
    "vit_s16_dinov3": partial(ViTS16, family=DINOV3),
    "vit_b16_dinov3": partial(ViTB16, family=DINOV3),
    "vit_l16_dinov3": partial(ViTL16, family=DINOV3),
    "clip_vit_b32": partial(ViTB32, family=CLIP, projection=512),
    "clip_vit_b16": partial(ViTB16, family=CLIP, projection=512),
    "clip_vit_l14": partial(ViTL16, patch=14, family=CLIP, projection=768),
    "openclip_vit_b32": partial(ViTB32, family=OPENCLIP, projection=512),
    "openclip_vit_b16": partial(ViTB16, family=OPENCLIP, projection=512),
    "openclip_vit_l14": partial(ViTL16, patch=14, family=OPENCLIP, projection=768),
    "siglip_vit_b16": partial(ViTB16, family=SIGLIP),
    "siglip_vit_l16": partial(ViTL16, family=SIGLIP),
    "siglip_so400m14": partial(ViTSO14, family=SIGLIP),
    "vit_tiny": _ViTTiny,
    "vit_tiny_dinov2": partial(_ViTTiny, family=DINOV2),
    "vit_tiny_dinov2_reg": partial(_ViTTiny, family=DINOV2_REGISTERS),
    "vit_tiny_dinov3": partial(_ViTTiny, family=DINOV3),
    "vit_tiny_clip": partial(_ViTTiny, family=CLIP, projection=8),
    "vit_tiny_siglip": partial(_ViTTiny, family=SIGLIP),
}
