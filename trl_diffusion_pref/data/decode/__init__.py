"""Cells of a data set decoded to images, videos and audio."""
