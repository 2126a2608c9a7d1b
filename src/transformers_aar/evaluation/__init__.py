"""Measures and pictures of sounds."""
