"""Shards on a web server or in a bucket, read through a cache on this machine."""
