"""Names of the data sets that ``idml_jax.prepare`` knows: the keys of ``prepare.LAYOUTS``, without loading it."""

NAMES = ("cub", "cars", "sop", "inshop", "market", "inaturalist", "cifar10", "cifar100", "imagenet", "folder")
