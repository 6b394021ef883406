"""Semantic segmentation: images and masks in, batches of images and class maps out."""
