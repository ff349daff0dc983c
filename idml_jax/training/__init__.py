"""Training: from settings to a trained embedding."""
