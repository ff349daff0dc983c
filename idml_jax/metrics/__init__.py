"""Metrics on plain arrays (numpy or jax): they know nothing of models or data."""
