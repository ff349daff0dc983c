"""Values of options of the commands, which the command line shows without loading what uses them."""

from idml_jax.metrics.choices import NEAR, SCORES

__all__ = ["EXAMPLES", "FORMATS", "MEMORY", "MOST", "NEAR", "PLATFORMS", "SCORES", "SPLITS"]

SPLITS = ("train", "test", "validation", "gallery")  # of a run's own data
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")  # of an exported program
FORMATS = ("stablehlo", "onnx")  # of an exported program
EXAMPLES = "reciprocal:k1=20,k2=6,weight=0.3, expand:k=10,alpha=3, augment:k=10, or augment+expand"  # of re-ranking
MEMORY = 4096  # MiB of vectors up to which a gallery is searched in memory
MOST = 200  # findings of a kind that an audit lists
