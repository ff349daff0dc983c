"""The published settings."""
