"""A trained run in use: embedding, searching, exporting."""
