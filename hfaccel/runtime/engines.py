"""The engines that can run a graph: onnxruntime, which is always there, and openvino, which is optional."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from hfaccel.artifact.contract import ENGINES, Engine, SessionSettings
from hfaccel.errors import IntegrityError
from hfaccel.runtime.openvino_session import OpenVinoSession
from hfaccel.runtime.session import GraphSession

_DEFAULT_SETTINGS = SessionSettings()


class EngineFallbackWarning(UserWarning):
    """The engine that a model was compiled for is not installed, and onnxruntime runs it instead."""


def open_graph(path: Path, settings: SessionSettings = _DEFAULT_SETTINGS) -> GraphSession | OpenVinoSession:
    """Open a graph in the engine that its settings name.

    Raises:
        IntegrityError: the file is missing, the engine cannot open it, or this version does not know the engine.
        MissingExtraError: the engine is not installed.
    """
    _check_known(settings)
    return OpenVinoSession(path, settings) if settings.engine == "openvino" else GraphSession(path, settings)


def engine_available(name: Engine) -> bool:
    """Whether an engine is installed; nothing is imported for the answer."""
    if name == "onnxruntime":
        return True
    if name in sys.modules:
        return sys.modules[name] is not None  # None is how an import is blocked
    return importlib.util.find_spec(name) is not None


def with_installed_engine(settings: SessionSettings) -> SessionSettings:
    """The settings, or where their engine is not installed those of onnxruntime, with an ``EngineFallbackWarning``.

    Raises:
        IntegrityError: this version does not know the engine.
    """
    _check_known(settings)
    missing = next((engine for engine in settings.engines if not engine_available(engine)), None)
    if missing is None:
        return settings
    warnings.warn(
        f"the model was compiled for {missing}, which is not installed: onnxruntime runs it, with other speed and "
        f"slightly other numbers than were measured (run: pip install 'hfaccel[{missing}]')",
        EngineFallbackWarning,
        stacklevel=3,
    )
    return replace(settings, engine="onnxruntime", encoder_engine="onnxruntime", inference_precision="f32")


def _check_known(settings: SessionSettings) -> None:
    unknown = set(settings.engines).difference(ENGINES)
    if unknown:
        raise IntegrityError(
            f"this version does not know the engine {unknown.pop()!r}",
            hint=f"known engines: {', '.join(ENGINES)}; update hfaccel",
        )
