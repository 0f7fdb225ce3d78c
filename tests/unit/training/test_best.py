"""The best validation: of the highest top-1, and of equal ones of the lowest loss."""

from pipeline.training.best import Validated


def test_of_equal_top1_the_lower_loss_is_better() -> None:
    first = Validated.of_results({"top1": 1.0, "loss": 0.324, "top5": 1.0}, 20)
    assert first.beats(None)
    assert Validated(1.0, 0.003).beats(first) and not first.beats(Validated(1.0, 0.003))
    assert not first.beats(first)
    assert not Validated(0.9, 0.001).beats(first) and Validated(1.0, 0.5).beats(Validated(0.9, 0.001))


def test_the_best_of_the_attempts_before_is_known() -> None:
    assert Validated.of_section(None) is None and Validated.of_section({"best_score": None}) is None
    best = Validated.of_section({"best_score": 0.5, "best_loss": 1.25, "best_step": 1200})
    assert best is not None and best == Validated(0.5, 1.25, 1200) and best.known_loss == 1.25
    assert best.in_words == "50.0% at step 1,200"


def test_a_checkpoint_of_an_earlier_version_does_not_tell_the_loss() -> None:
    """One of equal top-1 is then no better, as it was."""
    best = Validated.of_section({"best_score": 0.5})
    assert best is not None and best.known_loss is None and best.in_words == "50.0%"
    assert not Validated(0.5, 0.0).beats(best) and Validated(0.51, 9.0).beats(best)
