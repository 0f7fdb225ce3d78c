"""What a model's shapes tell about it, without a run."""

import functools
from dataclasses import dataclass

from pipeline.core.errors import ConfigError
from pipeline.models import zoo
from pipeline.models.cost import Footprint, footprint, layer_kinds
from pipeline.models.external import is_external


@dataclass(frozen=True)
class ModelFacts:
    """Counted on the meta device."""

    num_parameters: int
    parameter_bytes: int
    """Bytes of the trainable parameters: what the ledger is checked against."""
    kinds: dict[str, str]
    """Kind of each layer that owns parameters, by its name in the ledger."""
    footprint: Footprint | None
    why_no_footprint: str = ""


@functools.cache  # a model that is compared with several compressions is built once
def model_facts(
    spec: str, num_classes: int, image_size: int | None, batch_size: int | None, *, allow_code: bool = False
) -> ModelFacts:
    """Return the facts of a model.

    Args:
        spec: The model, as `zoo.parse_spec` reads it.
        num_classes: Outputs of the classifier.
        image_size: Side of the crop in pixels; None: not known.
        batch_size: Pictures at once on a rank; None: not known.
        allow_code: Whether somebody else's factory may run.

    Raises:
        ConfigError: unknown model, or impossible metaparameters; as `zoo.build`.
    """
    name, metaparameters = zoo.parse_spec(spec)
    model = zoo.build_shapes(name, num_classes, allow_code=allow_code, **metaparameters)
    taken, why = None, "The run does not tell its crop and its batch."
    if image_size and batch_size:
        try:
            taken = footprint(model, image_size, batch_size)
        except ConfigError as error:
            why = str(error)
        except Exception as error:  # whatever somebody else's forward does without memory
            if not is_external(name):
                raise
            why = f"{name} does not run without memory ({type(error).__name__}): its footprint is not known."
    parameters = list(model.parameters())
    return ModelFacts(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        kinds=layer_kinds(model),
        footprint=taken,
        why_no_footprint="" if taken else why,
    )
