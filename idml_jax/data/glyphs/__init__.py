"""The built-in data set: drawn characters whose ambiguity is known."""
