"""From the number of a sample to its bytes."""

from collections.abc import Mapping, Sequence

from datamodules.webdataset.ledger import SampleId
from datamodules.webdataset.manifest import Manifest
from datamodules.webdataset.records import BadSample, Cause, RawSample
from datamodules.webdataset.storage import Storage, TransportError
from datamodules.webdataset.urls import hide_secrets


class Reader:
    """Samples of all sources, by number.

    Args:
        manifests: Of the sources.
        storage: Where shards are read from.
        known: Bad samples that are not read again.
        max_sample_bytes: Larger samples are bad; the index tells, so nothing of them is read.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        storage: Storage,
        *,
        known: Mapping[SampleId, Cause] | None = None,
        max_sample_bytes: int,
    ) -> None:
        self.manifests, self.storage, self.known = manifests, storage, known or {}
        self.max_sample_bytes = max_sample_bytes

    def read(self, source: int, shard: int, sample: int) -> RawSample:
        """Return a sample.

        Raises:
            BadSample: It is known as bad, too large, out of reach, or not what was indexed.
        """
        if (cause := self.known.get((source, shard, sample))) is not None:
            raise BadSample(cause, "listed as bad by an earlier run")
        manifest = self.manifests[source]
        index = manifest.index(shard)
        start, stop = index.span(sample)
        if stop - start > self.max_sample_bytes:
            raise BadSample(
                "size", f"{stop - start} bytes in the shard, at most {self.max_sample_bytes} may be (max_sample_bytes)"
            )
        try:
            block = self.storage.read(
                manifest.url(shard),
                start,
                stop,
                size=manifest.num_bytes_of(shard),
                checksum=manifest.checksum(shard),
            )
        except TransportError as error:
            raise BadSample("transport", str(error)) from error
        return index.cut(sample, block)

    def name(self, source: int, shard: int, sample: int) -> str:
        """Return the URL of the shard, without its secrets, and the key of the sample."""
        manifest = self.manifests[source]
        return f"{hide_secrets(manifest.url(shard))}/{manifest.index(shard).key(sample)}"
