"""qpass: compile a float ONNX model into an integer one that its engine really runs in integers.

    import qpass
    report = qpass.optimize("model.onnx", data="calibration.npz", target="ort-x86")

The names below are the public interface; everything else may change.
"""

from __future__ import annotations

from qpass.api import calibrate, compare, optimize, plan, verify
from qpass.lint import lint
from qpass.report.model import Report
from qpass.targets import load_target
from qpass.version import __version__

__all__ = [
    "Report",
    "__version__",
    "calibrate",
    "compare",
    "lint",
    "load_target",
    "optimize",
    "plan",
    "verify",
]
