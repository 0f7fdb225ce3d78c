"""What a worker that writes or verifies shards needs. The fork server imports it once, for all of them."""

import webdataset.writer  # noqa: F401

import pipeline.data.builtin
import pipeline.data.verifying
import pipeline.data.writer  # noqa: F401
