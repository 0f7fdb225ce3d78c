"""What a worker that writes or verifies shards needs. The fork server imports it once, for all of them."""

import webdataset.writer  # noqa: F401

import pipeline.data.prepare.builtin
import pipeline.data.prepare.verifier
import pipeline.data.prepare.writer  # noqa: F401
