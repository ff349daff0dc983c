"""From settings to a trained embedding."""
