"""What `export` may be told, before anything is loaded."""

import pytest

from pipeline.config.export import ExportConfig
from pipeline.core.cli import compose
from pipeline.core.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["max_bytes=1000", "max_loss=0.1"], "max_bytes and max_loss were given, and each alone decides"),
        (["max_bytes=1000", "base=x.sqz"], "max_bytes and base were given"),
        (["formats=[tflite]"], "formats"),
        (["tracking=csv"], "tracking.loggers is for a training"),
        (["formats=[]"], "must name at least one of"),
        (["max_bytes=0"], "max_bytes=0 must be positive"),
        (["max_loss=-1"], "max_loss=-1.0 must be positive"),
        (["calibration.num_images=0"], "calibration.num_images=0"),
        (["data.root=null"], "needs pictures for its ranges: set data.root"),
        (["data.root=null", "formats=[package]"], "set data.root, or max_bytes"),
        (["data.root=null", "formats=[package]", "max_loss=0.1"], "max_loss needs pictures"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        compose("export", ExportConfig, ["checkpoint=x", "data.root=y", *overrides])
    assert words in str(raised.value) and raised.value.exit_code == 2


def test_without_pictures_a_size_is_enough() -> None:
    compose("export", ExportConfig, ["checkpoint=x", "data.root=null", "formats=[package,onnx]", "max_bytes=400000"])
