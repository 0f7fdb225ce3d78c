"""`validation.json`: what a model said of the pictures of its last validation, and where it was wrong."""

from typing import TypedDict


class ConfusionJson(TypedDict):
    """Pictures of one class of which another one, or their own, was said."""

    label: int
    """Index of their class."""
    predicted: int
    """Index of the class that was said, the one with the highest probability."""
    num_pictures: int
    """How many there were."""
    num_of_label: int
    """Pictures of their class in all."""


class WorstPictureJson(TypedDict):
    """One of the pictures with the highest loss."""

    sample_id: int
    """Its number in the split."""
    key: str
    """Its name in its shard."""
    shard: str
    """File name of its shard."""
    label: int
    """Index of its class."""
    predicted: int
    """Index of the class that was said."""
    loss: float | None
    """Cross-entropy, nats; null: not finite."""
    jpeg_base64: str
    """A JPEG of what the model was shown, made small, in base64."""


class ValidationJson(TypedDict):
    """The whole file. Written anew by each validation."""

    schema: int
    """1."""
    step: int
    """Optimiser steps committed before it."""
    num_samples: int
    """Pictures that were scored."""
    num_correct: int
    """Pictures of which the right class was said."""
    num_classes: int
    """Classes that can be said."""
    class_names: dict[str, str]
    """Name of each class that is named below, by its index as text; empty where the shards name none."""
    is_complete: bool
    """Whether `confusions` holds every pair that occurs, a class with itself included: for up to 40 classes."""
    confusions: list[ConfusionJson]
    """All pairs; of more classes the wrong ones that occur most often, at most 40. The most frequent first."""
    worst: list[WorstPictureJson]
    """The pictures with the highest loss, at most 12, the worst first."""
