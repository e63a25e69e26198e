"""Moves spans of bytes from one process's pools into another's, and says for certain whether it did."""
