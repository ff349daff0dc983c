"""x"""
from idml_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.batch_size = 128
    config.epochs = 15
    config.data.root = "data/omniglot_small"
    config.data.image_size = 28
    config.data.resize = 28
    config.data.channels = 1
    config.data.mean = (0.92,)
    config.data.std = (0.26,)
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = False
    config.data.rotation = 10.0
    config.model.name = "convnet4"
    config.model.embedding_dim = 64
    config.model.uncertainty_dim = 64
    config.model.batchnorm = "live"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_epochs = 0
    config.optim.schedule = "cosine"
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
