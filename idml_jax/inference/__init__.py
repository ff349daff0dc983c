"""Using a trained run: embedding, searching, exporting."""
