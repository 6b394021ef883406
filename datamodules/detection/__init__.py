"""Detection and instance segmentation: annotated images in, batches of images and objects out."""
