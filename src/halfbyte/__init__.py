"""Halfbyte: a trained PyTorch network in, one that runs on integers out, with an exported file proven equal to the simulation.

Names are loaded on first use, so that ``halfbyte --help`` does not wait for torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.affine import Grid, dequantize, fake_quantize
    from halfbyte.affine import quantize as quantize_tensor
    from halfbyte.allocate import Allocation, allocate, best, front, greedy, select, several
    from halfbyte.benchmark import benchmark
    from halfbyte.blocks import Blocks, refine
    from halfbyte.budgets import Budget
    from halfbyte.calibrate import calibrate
    from halfbyte.capabilities import targets
    from halfbyte.capture import capture
    from halfbyte.check import check
    from halfbyte.compare import compare
    from halfbyte.correct import correct_bias
    from halfbyte.costs import CostTable, costs
    from halfbyte.descent import Descent
    from halfbyte.diagnose import diagnose
    from halfbyte.diagnosis import Diagnosis
    from halfbyte.doctor import doctor
    from halfbyte.dual import Dual, dual
    from halfbyte.encodings import export_encodings
    from halfbyte.errors import HalfbyteError, ParityError, UsageError
    from halfbyte.evaluate import evaluate
    from halfbyte.export_onnx import export_onnx
    from halfbyte.formats import Bits, Format, bits
    from halfbyte.grids import MSE, MinMax, Percentile
    from halfbyte.inspection import inspect
    from halfbyte.integer import predict, run_integer
    from halfbyte.latency import EngineLatency
    from halfbyte.local import LayerSolver, Problem, Solution
    from halfbyte.lower import lower
    from halfbyte.methods.adaquant import AdaQuant
    from halfbyte.methods.adaround import AdaRound
    from halfbyte.mixed import Tradeoff, Widths
    from halfbyte.model import LogEntry, Moments, QModel, Target
    from halfbyte.moments import propagate
    from halfbyte.output import report
    from halfbyte.parity import Parity
    from halfbyte.place import place
    from halfbyte.plan import Plan, plan
    from halfbyte.preprocess import Preprocess
    from halfbyte.prove import prove
    from halfbyte.quantize import quantize
    from halfbyte.reconstruct import reconstruct
    from halfbyte.reexport import export
    from halfbyte.refine_ranges import refine_ranges
    from halfbyte.run import run, simulate
    from halfbyte.search import search
    from halfbyte.sensitivity import SensitivityTable, output_loss, sensitivity
    from halfbyte.store import load, save
    from halfbyte.tradeoff import tradeoff
    from halfbyte.transforms.absorb_bias import absorb_bias
    from halfbyte.transforms.equalize import equalize
    from halfbyte.transforms.fold_batchnorm import fold_batchnorm
    from halfbyte.transforms.rotate import rotate
    from halfbyte.transforms.split_tensor import split_tensor
    from halfbyte.tune import tune
    from halfbyte.tune_statistics import tune_statistics
    from halfbyte.walk import walk

__version__ = "0.1.0"

_WHERE = {
    "Allocation": "allocate",
    "Bits": "formats",
    "Budget": "budgets",
    "CostTable": "costs",
    "EngineLatency": "latency",
    "SensitivityTable": "sensitivity",
    "allocate": "allocate",
    "best": "allocate",
    "bits": "formats",
    "costs": "costs",
    "front": "allocate",
    "greedy": "allocate",
    "output_loss": "sensitivity",
    "select": "allocate",
    "sensitivity": "sensitivity",
    "several": "allocate",
    "Grid": "affine",
    "dequantize": "affine",
    "fake_quantize": "affine",
    "quantize_tensor": "affine:quantize",
    "calibrate": "calibrate",
    "check": "check",
    "compare": "compare",
    "capture": "capture",
    "correct_bias": "correct",
    "absorb_bias": "transforms.absorb_bias",
    "propagate": "moments",
    "prove": "prove",
    "walk": "walk",
    "Blocks": "blocks",
    "refine": "blocks",
    "Descent": "descent",
    "LayerSolver": "local",
    "Problem": "local",
    "Solution": "local",
    "AdaQuant": "methods.adaquant",
    "AdaRound": "methods.adaround",
    "reconstruct": "reconstruct",
    "refine_ranges": "refine_ranges",
    "HalfbyteError": "errors",
    "ParityError": "errors",
    "UsageError": "errors",
    "export_encodings": "encodings",
    "export_onnx": "export_onnx",
    "Format": "formats",
    "MSE": "grids",
    "MinMax": "grids",
    "Percentile": "grids",
    "run_integer": "integer",
    "lower": "lower",
    "LogEntry": "model",
    "Moments": "model",
    "QModel": "model",
    "Target": "model",
    "Parity": "parity",
    "place": "place",
    "Plan": "plan",
    "plan": "plan",
    "Preprocess": "preprocess",
    "quantize": "quantize",
    "tradeoff": "tradeoff",
    "Tradeoff": "mixed",
    "Widths": "mixed",
    "predict": "integer",
    "run": "run",
    "simulate": "run",
    "load": "store",
    "save": "store",
    "equalize": "transforms.equalize",
    "rotate": "transforms.rotate",
    "fold_batchnorm": "transforms.fold_batchnorm",
    "split_tensor": "transforms.split_tensor",
    "Dual": "dual",
    "doctor": "doctor",
    "dual": "dual",
    "tune": "tune",
    "tune_statistics": "tune_statistics",
    "diagnose": "diagnose",
    "Diagnosis": "diagnosis",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "inspect": "inspection",
    "report": "output",
    "targets": "capabilities",
    "export": "reexport",
    "search": "search",
}

__all__ = [
    "MSE",
    "AdaQuant",
    "AdaRound",
    "Allocation",
    "Bits",
    "Blocks",
    "Budget",
    "CostTable",
    "Descent",
    "Diagnosis",
    "Dual",
    "EngineLatency",
    "Format",
    "Grid",
    "HalfbyteError",
    "LayerSolver",
    "LogEntry",
    "MinMax",
    "Moments",
    "Parity",
    "ParityError",
    "Percentile",
    "Plan",
    "Preprocess",
    "Problem",
    "QModel",
    "SensitivityTable",
    "Solution",
    "Target",
    "Tradeoff",
    "UsageError",
    "Widths",
    "absorb_bias",
    "allocate",
    "benchmark",
    "best",
    "bits",
    "calibrate",
    "capture",
    "check",
    "compare",
    "correct_bias",
    "costs",
    "dequantize",
    "diagnose",
    "doctor",
    "dual",
    "equalize",
    "evaluate",
    "export",
    "export_encodings",
    "export_onnx",
    "fake_quantize",
    "fold_batchnorm",
    "front",
    "greedy",
    "inspect",
    "load",
    "lower",
    "output_loss",
    "place",
    "plan",
    "predict",
    "propagate",
    "prove",
    "quantize",
    "quantize_tensor",
    "reconstruct",
    "refine",
    "refine_ranges",
    "report",
    "rotate",
    "run",
    "run_integer",
    "save",
    "search",
    "select",
    "sensitivity",
    "several",
    "simulate",
    "split_tensor",
    "targets",
    "tradeoff",
    "tune",
    "tune_statistics",
    "walk",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'halfbyte' has no attribute '{name}'")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(f"halfbyte.{module}"), attribute or name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Functions and the modules that hold them share names (``place.place``); in the package the function has the name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _WHERE):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
