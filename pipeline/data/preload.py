"""What a worker that writes shards needs. The fork server imports it once, for all of them."""

import webdataset.writer  # noqa: F401

import pipeline.data.builtin
import pipeline.data.writer  # noqa: F401
