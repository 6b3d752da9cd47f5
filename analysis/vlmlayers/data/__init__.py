"""Readers of image files and the built-in datasets."""
