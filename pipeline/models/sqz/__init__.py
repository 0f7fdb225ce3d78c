"""The over-the-air package: a file of a model's weights in about a twelfth of their bytes, and differences between two.

`decoder.py` is all that a device needs; docs/package.md says every byte, so that it can be written in another language.
"""
