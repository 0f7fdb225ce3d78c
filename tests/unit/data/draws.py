"""Random numbers of one training view."""

from pipeline.data.pixels import Draw, train_draws


def draw_of(seed: int = 0, epoch: int = 0, sample_id: int = 0) -> Draw:
    """Those of this sample in this epoch."""
    (draw,) = train_draws(seed, [(epoch, sample_id)])
    return draw
