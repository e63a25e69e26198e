"""Moves spans of bytes between the pools of two processes, and says for certain whether it did."""
