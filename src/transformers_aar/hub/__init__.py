"""Conversion of the reference's checkpoints, model cards, and publishing on the Hugging Face Hub."""
