from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfaccel.errors import ExportError, SourceError, UsageError
from hfaccel.source.resolve import resolve_source

Make = Callable[..., Path]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def problem(folder: Path, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        resolve_source(str(folder), **options)
    assert caught.value.where == str(folder)
    return caught.value.what


def test_sound_checkpoint(make_checkpoint: Make) -> None:
    folder = make_checkpoint(num_labels=3)
    source = resolve_source(str(folder))
    assert (source.id, source.revision, source.folder) == (str(folder), None, folder)
    assert (source.model_type, source.task) == ("bert", "text-classification")
    assert source.weight_files == ("model.safetensors",)
    assert source.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert source == resolve_source(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_hash_follows_the_files(make_checkpoint: Make, name: str) -> None:
    folder = make_checkpoint()
    before = resolve_source(str(folder)).sha256
    with (folder / name).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    assert resolve_source(str(folder)).sha256 != before


def test_resolving_imports_neither_torch_nor_transformers(make_checkpoint: Make) -> None:
    code = (
        "import sys; from hfaccel.source.resolve import resolve_source; resolve_source(sys.argv[1]); "
        "sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(make_checkpoint())], check=False).returncode == 0


def test_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(SourceError) as caught:
        resolve_source(missing)
    assert str(caught.value) == f"{missing}: is neither a folder nor a hub id (check the path)"


def test_hub_id_while_offline() -> None:
    code = "from hfaccel.source.resolve import resolve_source as r; r('nobody-at-all/no-such-checkpoint')"
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert result.stderr.splitlines()[-1] == (
        "hfaccel.errors.SourceError: nobody-at-all/no-such-checkpoint: is neither a folder nor reachable on the hub "
        "(HF_HUB_OFFLINE is set and the local hub cache does not hold it; or give a local folder)"
    )


def test_file_instead_of_folder(make_checkpoint: Make) -> None:
    path = make_checkpoint() / "config.json"
    assert problem(path) == "is a file, not a checkpoint folder"


def test_revision_of_a_folder(make_checkpoint: Make) -> None:
    with pytest.raises(UsageError, match="a local folder has no revisions"):
        resolve_source(str(make_checkpoint()), revision="main")


def test_no_config(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    assert problem(folder) == "no config.json: not a transformers checkpoint"


def test_config_not_json(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert problem(folder).startswith("config.json is not valid JSON: Expecting property name")


def test_no_model_type(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    edit_json(folder / "config.json", model_type=None)
    assert problem(folder) == "config.json has no model_type: transformers cannot tell the architecture"


def test_remote_code(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.Model"})
    assert problem(folder) == (
        "config.json asks to run Python code of the checkpoint (auto_map): "
        "pass --trust-remote-code if you trust where it comes from"
    )
    assert resolve_source(str(folder), trust_remote_code=True).trust_remote_code


def test_pickle_only(make_checkpoint: Make) -> None:
    import torch

    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert problem(folder) == (
        "weights are pickled only (pytorch_model.bin), and a pickle can run code: convert them to model.safetensors with "
        "save_pretrained of transformers, or pass --allow-pickle if you trust where they come from"
    )
    assert resolve_source(str(folder), allow_pickle=True).weight_files == ("pytorch_model.bin",)
    (folder / "pytorch_model.bin").write_bytes(b"PK half a file")
    assert problem(folder, allow_pickle=True) == ("pytorch_model.bin is truncated or not a torch checkpoint: download it again")


def test_no_weights(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    assert problem(folder) == "no weights: neither model.safetensors nor model.safetensors.index.json"


def test_damaged_safetensors(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    for content, expected in (
        (sound[:-100], f"is truncated: {len(sound) - 100} bytes of {len(sound)}"),
        (sound + b"\0", f"is corrupt: {len(sound) + 1} bytes where its header says {len(sound)}"),
        (sound[:4], "is truncated: 4 bytes"),
        (sound[:8] + b"x" + sound[9:], "is corrupt: its header is not a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer, not the weights"),
    ):
        path.write_bytes(content)
        assert problem(folder) == f"model.safetensors {expected}: download it again"


def test_shards(make_checkpoint: Make) -> None:
    from transformers import BertForSequenceClassification

    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    whole = make_checkpoint(name="whole")
    BertForSequenceClassification.from_pretrained(whole).save_pretrained(folder, max_shard_size="50KB")
    shards = resolve_source(str(folder)).weight_files
    assert len(shards) > 1
    (folder / shards[1]).unlink()
    assert problem(folder) == f"weight file '{shards[1]}' is named by the index but missing: download it again"
    shutil.copy(folder / shards[0], folder / shards[1])
    assert problem(folder).startswith("model.safetensors.index.json names tensors that no shard holds: ")


def test_no_tokenizer(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    assert problem(folder) == "no tokenizer: neither tokenizer.json nor a vocabulary file (vocab.txt, vocab.json, *.model)"


def test_unreadable_tokenizer(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.json").write_text("[1]", encoding="utf-8")
    assert problem(folder) == "tokenizer.json is not a JSON object"
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert problem(folder) == "tokenizer.json is not a tokenizer of the tokenizers library"


def test_tokenizer_of_another_model(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    edit_json(folder / "config.json", vocab_size=20)
    assert problem(folder) == (
        "tokenizer.json has token ids up to 31, but config.json says vocab_size 20: the tokenizer is of another model"
    )


def test_all_problems_at_once(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).unlink()
    assert problem(folder).splitlines() == [
        "3 problems with the checkpoint:",
        "  1. no config.json: not a transformers checkpoint",
        "  2. no weights: neither model.safetensors nor model.safetensors.index.json",
        "  3. no tokenizer: neither tokenizer.json nor a vocabulary file (vocab.txt, vocab.json, *.model)",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "generative architecture 'GPT2DoubleHeadsModel' is not supported yet"),
        (
            {"architectures": ["BartModel"], "is_encoder_decoder": True},
            "encoder-decoder architecture 'BartModel' is not supported yet",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights quantized with 'gptq' are not supported yet"),
    ],
)
def test_unsupported_architecture(make_checkpoint: Make, changes: dict[str, Any], expected: str) -> None:
    folder = make_checkpoint()
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ExportError) as caught:
        resolve_source(str(folder))
    assert caught.value.what == expected
