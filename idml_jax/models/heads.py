"""Heads on the pooled feature, and initial proxies."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from idml_jax.ism import l2_normalize
from idml_jax.losses.softmax import introspective_logits
from idml_jax.models.layers import kaiming_normal

UNCERTAINTY_HEADS = ("mlp", "linear", "none", "scalar")
# Initialiser of PyTorch's linear layers: uniform in +-1 / sqrt(fan in).
_torch_linear = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Heads(nn.Module):
    """Semantic and uncertainty embedding of a pooled feature; always float32, also with a bfloat16 trunk.

    The default uncertainty head sees the l2-NORMALISED feature through a hidden layer. A head on the raw feature
    mostly follows the feature's norm, which is smaller for ambiguous images: on Omniglot it learned nothing or reduced
    recall. The uncertainty embedding is not normalised, since its length is the information.

    Attributes:
      embedding_dim: d, width of the semantic embedding.
      uncertainty_dim: k, width of the uncertainty embedding.
      uncertainty_head: ``mlp`` (normalised feature, one hidden ReLU layer), ``linear`` (raw feature, one layer: the
        paper's), ``none`` (no uncertainty: u = 0) or ``scalar`` (as mlp, but one number: ``softplus(g) e`` with the
        same unit vector e for all images, so the uncertainty of a pair is the sum of both lengths and never cancels;
        only lengths of such vectors and of their sums are read, so a learned e would get no gradient).
      uncertainty_hidden: width of the hidden layer.
      uncertainty_scale: factor on the initial weights of the last uncertainty layer.
      normalize: l2-normalise the semantic embedding.
    """

    embedding_dim: int = 512
    uncertainty_dim: int = 512
    uncertainty_head: str = "mlp"
    uncertainty_hidden: int = 128
    uncertainty_scale: float = 1.0
    normalize: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, "n f"]) -> dict[str, Float[Array, "n ..."]]:
        """``semantic`` [n, d], ``uncertainty`` [n, k] and ``semantic_norm`` [n], the length before normalising."""
        features = features.astype(jnp.float32)
        dense = lambda width, name, init=kaiming_normal: nn.Dense(
            width, kernel_init=init, precision=jax.lax.Precision.HIGHEST, name=name
        )
        semantic = dense(self.embedding_dim, "semantic")(features)
        # The squares are clipped before the root: the gradient of a norm at 0 is NaN.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(semantic), axis=-1), 1e-24))

        def scaled(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
            return self.uncertainty_scale * kaiming_normal(key, shape, dtype)

        if self.uncertainty_head == "mlp":
            hidden = nn.relu(dense(self.uncertainty_hidden, "uncertainty_hidden")(l2_normalize(features)))
            uncertainty = dense(self.uncertainty_dim, "uncertainty", scaled)(hidden)
        elif self.uncertainty_head == "linear":
            uncertainty = dense(self.uncertainty_dim, "uncertainty", scaled)(features)
        elif self.uncertainty_head == "scalar":
            hidden = nn.relu(dense(self.uncertainty_hidden, "uncertainty_hidden")(l2_normalize(features)))
            length = jax.nn.softplus(dense(1, "uncertainty_length", scaled)(hidden))
            uncertainty = jnp.tile(length / jnp.sqrt(float(self.uncertainty_dim)), (1, self.uncertainty_dim))
        elif self.uncertainty_head == "none":
            uncertainty = jnp.zeros((features.shape[0], self.uncertainty_dim), jnp.float32)
        else:
            raise ValueError(
                f"unknown uncertainty head {self.uncertainty_head!r}; known: {', '.join(UNCERTAINTY_HEADS)}"
            )
        return {
            "semantic": l2_normalize(semantic) if self.normalize else semantic,
            "uncertainty": uncertainty,
            "semantic_norm": norm,
        }


class ClassifierHead(nn.Module):
    """A classifier whose logits are weakened in training by an uncertainty ``u = relu(linear(x))``; float32.

    It also returns the outputs of ``Heads``, with the normalised feature as the semantic embedding.

    Attributes:
      num_classes: number of classes.
      uncertainty_dim: k, width of the uncertainty embedding.
      uncertainty_head: ``linear`` (the paper's), ``mlp`` (of the normalised feature, through a hidden ReLU layer) or
        ``none`` (u = 0: a plain classifier).
      uncertainty_hidden: width of the hidden layer.
      uncertainty_scale: factor on the initial weights of the last uncertainty layer.
      temperature: tau of the introspective metric.
    """

    num_classes: int
    uncertainty_dim: int = 512
    uncertainty_head: str = "linear"
    uncertainty_hidden: int = 128
    uncertainty_scale: float = 1.0
    temperature: float = 5.0

    @nn.compact
    def __call__(self, features: Float[Array, "n f"]) -> dict[str, Float[Array, "n ..."]]:
        """``logits``, ``weakened`` [n, classes], ``uncertainty`` [n, k], ``semantic`` [n, f], ``semantic_norm`` [n]."""
        known = [name for name in UNCERTAINTY_HEADS if name != "scalar"]
        if self.uncertainty_head not in known:
            raise ValueError(f"unknown uncertainty head {self.uncertainty_head!r}; known: {', '.join(known)}")
        features = features.astype(jnp.float32)
        classifier = _Linear(self.num_classes, _torch_linear, name="classifier")
        dense = lambda width, name, init=_torch_linear: nn.Dense(
            width, kernel_init=init, precision=jax.lax.Precision.HIGHEST, name=name
        )

        def scaled(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
            return self.uncertainty_scale * _torch_linear(key, shape, dtype)

        uncertainty = None
        if self.uncertainty_head != "none":
            x = features
            if self.uncertainty_head == "mlp":
                x = nn.relu(dense(self.uncertainty_hidden, "uncertainty_hidden", kaiming_normal)(l2_normalize(x)))
            uncertainty = nn.relu(dense(self.uncertainty_dim, "uncertainty", scaled)(x))
        kernel, bias = classifier(features.shape[1])
        logits = introspective_logits(features, uncertainty, kernel.T, bias, self.temperature)
        if uncertainty is None:
            uncertainty = jnp.zeros((features.shape[0], self.uncertainty_dim), jnp.float32)
        return {
            "logits": logits.plain,
            "weakened": logits.weakened,
            "uncertainty": uncertainty,
            "semantic": l2_normalize(features),
            "semantic_norm": jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(features), axis=-1), 1e-24)),
        }


class _Linear(nn.Module):
    """Weights of a linear layer, which are also the prototypes of its classes."""

    width: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "f classes"], Float[Array, "classes"]]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.width), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)


def init_proxies(key: PRNGKeyArray, num_classes: int, dim: int, rows: int | None = None) -> Float[Array, "rows dim"]:
    """Proxies drawn kaiming-normal with fan-out, as ProxyAnchor's: normal with variance 2 / classes.

    Args:
      key: PRNG key.
      num_classes: number of training classes.
      dim: width of the semantic embedding.
      rows: number of rows of the table, at least ``num_classes``; additional rows are zero. Default: ``num_classes``.

    Returns:
      ``[rows, dim]`` float32, one proxy per class; losses compare their directions.
    """
    rows = num_classes if rows is None else rows
    # A random number depends only on its position, so additional rows do not change the proxies.
    proxies = jax.random.normal(key, (rows, dim), jnp.float32) * jnp.sqrt(2.0 / num_classes)
    return proxies if rows == num_classes else jnp.where(jnp.arange(rows)[:, None] < num_classes, proxies, 0.0)
