"""normsurgeon: convert a network's BatchNorm layers to other norms, and keep its function.

    >>> import normsurgeon as ns
    >>> sorted(ns.TARGETS)
    ['affine', 'fold', 'gn', 'in', 'ln', 'ln2d', 'rms', 'rms2d']

Importing this package is cheap: torch and timm come in with the first function that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normsurgeon.errors import NormSurgeonError
from normsurgeon.version import __version__

if TYPE_CHECKING:
    from normsurgeon.analysis.analyze import analyze as analyze
    from normsurgeon.analysis.report import Report as Report
    from normsurgeon.data.transforms import DataConfig as DataConfig
    from normsurgeon.finetuning.config import FinetuneConfig as FinetuneConfig
    from normsurgeon.finetuning.curves import Curves as Curves
    from normsurgeon.finetuning.finetune import finetune as finetune
    from normsurgeon.finetuning.record import FinetuneRecord as FinetuneRecord
    from normsurgeon.graph.inspect import inspect as inspect
    from normsurgeon.graph.sites import NormSite as NormSite
    from normsurgeon.graph.sites import find_sites as find_sites
    from normsurgeon.inference.evaluate import Evaluation as Evaluation
    from normsurgeon.inference.evaluate import evaluate as evaluate
    from normsurgeon.inference.predict import Prediction as Prediction
    from normsurgeon.inference.predict import Predictions as Predictions
    from normsurgeon.inference.predict import predict as predict
    from normsurgeon.models.checkpoint import save as save
    from normsurgeon.models.load import load as load
    from normsurgeon.norms.targets import TARGETS as TARGETS
    from normsurgeon.recovery.calibrate import CalibrationRecord as CalibrationRecord
    from normsurgeon.recovery.calibrate import calibrate as calibrate
    from normsurgeon.recovery.calibrate import calibrate_ as calibrate_
    from normsurgeon.recovery.config import ReconstructionConfig as ReconstructionConfig
    from normsurgeon.recovery.reconstruct import ReconstructionRecord as ReconstructionRecord
    from normsurgeon.recovery.reconstruct import reconstruct as reconstruct
    from normsurgeon.recovery.reconstruct import reconstruct_ as reconstruct_
    from normsurgeon.study.answer import Answer as Answer
    from normsurgeon.study.experiment import run_study as run_study
    from normsurgeon.surgery.convert import Conversion as Conversion
    from normsurgeon.surgery.convert import convert as convert
    from normsurgeon.surgery.convert import convert_ as convert_
    from normsurgeon.surgery.plain_swap import plain_swap as plain_swap
    from normsurgeon.surgery.plan import ConversionPlan as ConversionPlan
    from normsurgeon.surgery.plan import plan as plan
    from normsurgeon.surgery.swap_layers import swap_layers as swap_layers


_HOME = {
    "analyze": "analysis.analyze",
    "save": "models.checkpoint",
    "DataConfig": "data.transforms",
    "Evaluation": "inference.evaluate",
    "evaluate": "inference.evaluate",
    "plain_swap": "surgery.plain_swap",
    "Answer": "study.answer",
    "run_study": "study.experiment",
    "NormSite": "graph.sites",
    "find_sites": "graph.sites",
    "inspect": "graph.inspect",
    "load": "models.load",
    "TARGETS": "norms.targets",
    "Prediction": "inference.predict",
    "Predictions": "inference.predict",
    "predict": "inference.predict",
    "CalibrationRecord": "recovery.calibrate",
    "calibrate": "recovery.calibrate",
    "calibrate_": "recovery.calibrate",
    "ReconstructionConfig": "recovery.config",
    "ReconstructionRecord": "recovery.reconstruct",
    "reconstruct": "recovery.reconstruct",
    "reconstruct_": "recovery.reconstruct",
    "Report": "analysis.report",
    "ConversionPlan": "surgery.plan",
    "plan": "surgery.plan",
    "Conversion": "surgery.convert",
    "convert": "surgery.convert",
    "convert_": "surgery.convert",
    "swap_layers": "surgery.swap_layers",
    "Curves": "finetuning.curves",
    "FinetuneConfig": "finetuning.config",
    "FinetuneRecord": "finetuning.record",
    "finetune": "finetuning.finetune",
}

__all__ = ["NormSurgeonError", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normsurgeon' has no attribute {name!r}")
    from normsurgeon._util.imports import explained_imports

    with explained_imports():
        value = getattr(import_module(f"normsurgeon.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
