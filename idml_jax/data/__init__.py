"""Images from disk to batches: numpy, Grain, tfds and OpenCV; nothing here touches a JAX device."""
