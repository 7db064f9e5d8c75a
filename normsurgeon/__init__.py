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
    from normsurgeon.checkpoints import save as save
    from normsurgeon.data.preprocessing import DataConfig as DataConfig
    from normsurgeon.demonstration import demonstrate as demonstrate
    from normsurgeon.evaluation import Evaluation as Evaluation
    from normsurgeon.evaluation import evaluate as evaluate
    from normsurgeon.graph.inventory import inspect as inspect
    from normsurgeon.graph.sites import NormSite as NormSite
    from normsurgeon.graph.sites import find_sites as find_sites
    from normsurgeon.loading import load as load
    from normsurgeon.norms.catalogue import TARGETS as TARGETS
    from normsurgeon.prediction import Prediction as Prediction
    from normsurgeon.prediction import Predictions as Predictions
    from normsurgeon.prediction import predict as predict
    from normsurgeon.recovery.calibration import Calibration as Calibration
    from normsurgeon.recovery.calibration import calibrate as calibrate
    from normsurgeon.recovery.reconstruction import Reconstruction as Reconstruction
    from normsurgeon.recovery.reconstruction import reconstruct as reconstruct
    from normsurgeon.reporting.records import Report as Report
    from normsurgeon.study.answer import Answer as Answer
    from normsurgeon.study.experiment import run_study as run_study
    from normsurgeon.surgery.plain import plain_swap as plain_swap
    from normsurgeon.surgery.planning import ConversionPlan as ConversionPlan
    from normsurgeon.surgery.planning import plan as plan
    from normsurgeon.surgery.rewriting import Conversion as Conversion
    from normsurgeon.surgery.rewriting import convert as convert
    from normsurgeon.surgery.rewriting import convert_ as convert_
    from normsurgeon.surgery.swapping import swap_layers as swap_layers
    from normsurgeon.training.finetuning import Finetuned as Finetuned
    from normsurgeon.training.finetuning import finetune as finetune
    from normsurgeon.training.history import History as History


_HOME = {
    "analyze": "analysis.analyze",
    "save": "checkpoints",
    "DataConfig": "data.preprocessing",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "demonstrate": "demonstration",
    "plain_swap": "surgery.plain",
    "Answer": "study.answer",
    "run_study": "study.experiment",
    "NormSite": "graph.sites",
    "find_sites": "graph.sites",
    "inspect": "graph.inventory",
    "load": "loading",
    "TARGETS": "norms.catalogue",
    "Prediction": "prediction",
    "Predictions": "prediction",
    "predict": "prediction",
    "Calibration": "recovery.calibration",
    "calibrate": "recovery.calibration",
    "Reconstruction": "recovery.reconstruction",
    "reconstruct": "recovery.reconstruction",
    "Report": "reporting.records",
    "ConversionPlan": "surgery.planning",
    "plan": "surgery.planning",
    "Conversion": "surgery.rewriting",
    "convert": "surgery.rewriting",
    "convert_": "surgery.rewriting",
    "swap_layers": "surgery.swapping",
    "Finetuned": "training.finetuning",
    "finetune": "training.finetuning",
    "History": "training.history",
}

__all__ = ["NormSurgeonError", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normsurgeon' has no attribute {name!r}")
    from normsurgeon.environment import explained_imports

    with explained_imports():
        value = getattr(import_module(f"normsurgeon.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
