"""What a checkpoint's header must look like, and which arguments of an architecture a file may choose."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from timm.data.transforms import str_to_interp_mode

from normsurgeon._util.schema import STRICT, ModulePath, Name, NotNegative, Positive, Schema, Words
from normsurgeon.models.registry import Kind
from normsurgeon.surgery.plan_schema import PlanSchema

Side = Annotated[int, Field(ge=1, le=4096)]
ModelSide = Annotated[int, Field(ge=1, le=512)]
"""Of the images that a model is built for. Some take long to make for large ones, on the meta device, too, before a
file's tensors can be compared: maxvit_base_tf_512 takes 1 s of computing at 512, and 6 s at 2048."""
Share = Annotated[float, Field(ge=0, le=1)]


def _event(values: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values.get("event", ""), str):
        raise ValueError("event must be a text")
    return values


def _interpolation(name: str) -> str:
    try:
        str_to_interp_mode(name)
    except KeyError as error:
        raise ValueError("must be an interpolation, as bicubic") from error
    return name


class SourceSchema(Schema):
    """Where the model came from. Who loads the file may say otherwise, so its arguments are only plain here."""

    kind: Kind
    name: Words
    kwargs: dict[Name, Any]


class DataSchema(Schema):
    """The pre-processing, as far as it is used; older files hold more."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})

    input_size: tuple[Side, Side, Side] = (3, 224, 224)
    mean: tuple[float, ...] = Field((), min_length=1, max_length=4096)
    std: tuple[Positive, ...] = Field((), min_length=1, max_length=4096)
    interpolation: Annotated[Name, AfterValidator(_interpolation)] = ""
    crop_pct: Annotated[float, Field(gt=0, le=10)] = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    architecture: Name = ""
    first_conv: Words | tuple[Words, ...] = ""
    classifier: Words | tuple[Words, ...] = ""
    label_names: tuple[Words, ...] = ()


class HeaderSchema(Schema):
    """A whole header."""

    format: Literal[1]
    version: Name
    source: SourceSchema | None
    plan: PlanSchema | None
    earlier_plans: tuple[PlanSchema, ...] = Field(max_length=100)
    history: tuple[Annotated[dict[str, Any], AfterValidator(_event)], ...]
    data: DataSchema | None
    eps: dict[ModulePath, NotNegative] = Field(default_factory=dict)


class ArgumentsSchema(Schema):
    """The arguments of a timm or torchvision architecture that a file may give.

    None of them names a file, an address or code. How large they make a network is compared with the file's tensors.
    """

    num_classes: Annotated[int, Field(ge=0, le=10**8)] = 1000
    in_chans: Annotated[int, Field(ge=1, le=10**8)] = 3
    img_size: ModelSide | tuple[ModelSide, ModelSide] = 224
    global_pool: Annotated[str, Field(pattern="^[a-z0-9]{0,16}$")] | bool = ""
    output_stride: Annotated[int, Field(ge=1, le=64)] = 32
    features_only: bool = False
    out_indices: tuple[Annotated[int, Field(ge=-64, le=64)], ...] = ()
    drop_rate: Share = 0.0
    drop_path_rate: Share = 0.0
    drop_block_rate: Share | None = None
    # torchvision's
    aux_logits: bool = False
    aux_loss: bool | None = None
    transform_input: bool = False
    init_weights: bool | None = None
    dropout: Share = 0.0
