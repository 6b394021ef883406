"""`python -m datamodules.webdataset`: the command `internimage shards`."""

import sys

from datamodules.webdataset.commands import main

if __name__ == "__main__":
    sys.exit(main())
