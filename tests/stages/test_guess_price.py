"""The price of a guessed token is measured for what ships, and the run time goes by it."""

from __future__ import annotations

from pathlib import Path

import hfaccel
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.runtime.generation.model import GenerationModel

OFF_TARGET = "cpu-arm-dotprod"
DEFAULT = GenerationSettings.__dataclass_fields__["guess_price"].default


def price(folder: Path) -> float:
    model = hfaccel.load(folder)
    assert isinstance(model, GenerationModel)
    assert model.decoder.gives_several_logits
    return model.decoder.settings.guess_price


def test_it_is_measured_on_the_target_and_left_at_the_default_elsewhere(tiny_decoder: Path, tmp_path: Path) -> None:
    settings = ["quantize.enabled=false"]
    here = hfaccel.compile(tiny_decoder, output=tmp_path / "here", task="text-generation", overrides=settings, use_cache=False)
    assert 0.02 <= price(here.folder) <= 1
    assert price(here.folder) == here.manifest["contract"]["generation"]["guess_price"]
    there = hfaccel.compile(
        tiny_decoder, output=tmp_path / "there", task="text-generation", target=OFF_TARGET, overrides=settings, use_cache=False
    )
    assert price(there.folder) == DEFAULT
