"""Values of options of the commands, where the command line knows them without loading what uses them."""

SPLITS = ("train", "test", "validation", "gallery")  # of a run's own data
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")  # of an exported program
EXAMPLES = "reciprocal:k1=20,k2=6,weight=0.3, expand:k=10,alpha=3, augment:k=10, or augment+expand"  # of re-ranking
