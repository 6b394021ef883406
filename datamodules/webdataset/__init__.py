"""WebDataset shards at scale: plain tar files, indexed, in an order that seed, epoch and step decide."""
