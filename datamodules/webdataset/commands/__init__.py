"""The command `internimage shards`: make shards, index them, verify them, say what is in them."""

from datamodules.webdataset.commands.parser import main

__all__ = ["main"]
