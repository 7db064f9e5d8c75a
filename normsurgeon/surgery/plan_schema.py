"""What a plan must look like in a file: the types and ranges of its keys, and what must agree with what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator, model_validator

from normsurgeon._util.schema import Count, ModulePath, Name, Positive, Schema, Shape, Words
from normsurgeon.errors import UsageError
from normsurgeon.graph.sites import NormSite
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.surgery.deciding import Decision, Request, Status, Whitening

MAX_SITES = 100_000


class DecisionSchema(Schema):
    """One entry of ``sites``."""

    name: ModulePath
    status: Status
    class_name: Name = Field(alias="from")
    target: Name | None = Field(alias="to")
    groups: Count | None
    eps: Positive | None
    whitening: Whitening | None
    balanced: bool
    reason: Words | None
    site: NormSite

    @model_validator(mode="after")
    def _agrees(self) -> DecisionSchema:
        site = self.site
        if self.name != site.name:
            raise ValueError("must have the name of its site")
        if self.status == "converted":
            if self.target not in TARGET_NAMES:
                raise ValueError(f"to must be one of {', '.join(TARGET_NAMES)}")
            if not site.channels or self.whitening is None:
                raise ValueError("a converted site must have channels and a whitening")
            groups = {"gn": self.groups, "in": site.channels}.get(self.target)
            if self.groups != groups or (self.target == "gn" and not groups):
                raise ValueError(f"groups must be those of {self.target}")
            if groups and site.channels % groups:
                raise ValueError(f"groups must divide the {site.channels} channels")
            if self.decision.folds and (site.producer is None or site.functional):
                raise ValueError("a site that is folded must have a producer")
        return self

    @property
    def decision(self) -> Decision:
        """What the entry says."""
        return Decision(
            site=self.site,
            status=self.status,
            target=self.target,
            groups=self.groups,
            eps=self.eps,
            whitening=self.whitening,
            balanced=self.balanced,
            reason=self.reason,
        )


class PlanSchema(Schema):
    """A whole plan. ``target`` and ``counts`` repeat what the rest says."""

    format: Literal[1]
    model: Words
    target: Name | None
    request: Request
    traced_by: Name
    input_shape: Shape | None
    notes: tuple[Words, ...]
    counts: dict[Status, Count]
    sites: tuple[DecisionSchema, ...] = Field(max_length=MAX_SITES)

    @field_validator("request", mode="wrap")
    @classmethod
    def _possible(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Request:
        try:
            request: Request = read(value)
        except UsageError as error:  # of a user's request it is; here it is the file's
            raise ValueError(str(error)) from error
        return request

    @field_validator("sites")
    @classmethod
    def _each_once(cls, sites: tuple[DecisionSchema, ...]) -> tuple[DecisionSchema, ...]:
        if len({site.name for site in sites}) != len(sites):
            raise ValueError("must name each site once")
        return sites
