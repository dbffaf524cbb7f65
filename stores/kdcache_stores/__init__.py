"""Stores of teacher logits: format, writer, reader, encodings, verification. NumPy, no torch."""
