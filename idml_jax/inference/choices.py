"""Values of options of the commands, where the command line knows them without loading what uses them."""

SPLITS = ("train", "test", "validation", "gallery")  # of a run's own data
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")  # of an exported program
FORMATS = ("stablehlo", "onnx")  # of an exported program
EXAMPLES = "reciprocal:k1=20,k2=6,weight=0.3, expand:k=10,alpha=3, augment:k=10, or augment+expand"  # of re-ranking
MEMORY = 4096  # MiB of vectors up to which a gallery is searched in memory
SCORES = ("odds", "log_odds", "self_confidence", "normalized_margin", "disagreement")  # of wrong labels, see audit
NEAR, MOST = 0.6, 200  # distance of copies as a share of the usual one; findings of a kind that are listed
