"""The catalogue: names to folders, and the folders that it refuses."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from typing import Any

import huggingface_hub
import pytest
from safetensors.numpy import load_file, save_file

from schemas.errors import SignalError
from tests.support.tiny import make_tiny_model
from workers.catalogue import Catalogue, ModelFolderError
from workers.settings import Settings


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), vocab=300, context=128, hidden=32)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(copytree(tiny_folder, tmp_path / "a model"))


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return make_catalogue(tmp_path)


def make_catalogue(tmp_path: Path, *, allow_hub: bool = False) -> Catalogue:
    data = tmp_path / "data"
    settings = Settings(
        data_dir=data,
        redis_url="",
        database_url="",
        secret="",
        models_file=data / "models.json",
        allow_hub=allow_hub,
    )
    return Catalogue(settings)


def test_an_empty_catalogue(catalogue: Catalogue) -> None:
    assert catalogue.names() == []
    assert catalogue.entries() == []
    with pytest.raises(SignalError) as caught:
        catalogue.entry("tiny")
    assert (caught.value.code, caught.value.param) == ("unknown_model", "base_model")


def test_an_added_model(catalogue: Catalogue, folder: Path) -> None:
    added = catalogue.add("owner/tiny-1.0", folder)
    entry = catalogue.entry("owner/tiny-1.0")
    assert entry == added
    assert catalogue.names() == ["owner/tiny-1.0"]
    assert catalogue.entries() == [entry]
    assert entry.path == folder
    assert (entry.architecture, entry.family) == ("LlamaForCausalLM", "llama")
    assert (entry.context_length, entry.vocab_size, entry.hidden_size) == (128, 300, 32)
    assert (entry.num_layers, entry.num_attention_heads) == (2, 4)
    assert (entry.torch_dtype, entry.has_chat_template) == ("float32", True)


def test_parameters_come_from_the_weights(catalogue: Catalogue, folder: Path) -> None:
    entry = catalogue.add("tiny", folder)
    tensors = load_file(folder / "model.safetensors")
    assert entry.num_parameters == sum(tensor.size for tensor in tensors.values())
    # Per layer: q_proj is 32 x 32, k_proj 16 x 32.
    assert entry.adapter_parameters(8, ["q_proj"]) == 8 * 2 * (32 + 32)
    assert entry.adapter_parameters(8, ["k_proj", "no_such"]) == 8 * 2 * (16 + 32)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "a/..", "a..b", "a/b/c", ".a", "a\n", "a b", "x" * 201, "../a"],
)
def test_a_path_is_no_name(catalogue: Catalogue, folder: Path, name: str) -> None:
    with pytest.raises(ModelFolderError, match="cannot name a model"):
        catalogue.add(name, folder)
    with pytest.raises(SignalError) as caught:
        catalogue.entry(name)
    assert caught.value.code == "unknown_model"


def test_a_folder_is_not_a_name(catalogue: Catalogue, folder: Path) -> None:
    catalogue.add("tiny", folder)
    with pytest.raises(SignalError):
        catalogue.entry(str(folder))


def test_another_process_sees_what_was_added(tmp_path: Path, folder: Path) -> None:
    reader, writer = make_catalogue(tmp_path), make_catalogue(tmp_path)
    assert reader.names() == []
    writer.add("one", folder)
    assert reader.names() == ["one"]
    writer.add("two", folder)
    assert reader.names() == ["one", "two"]
    writer.remove("one")
    assert reader.names() == ["two"]


def test_a_name_can_be_given_to_another_folder(catalogue: Catalogue, folder: Path) -> None:
    catalogue.add("tiny", folder)
    moved = folder.rename(folder.with_name("moved"))
    catalogue.add("tiny", moved)
    assert catalogue.names() == ["tiny"]
    assert catalogue.entry("tiny").path == moved


def test_the_file_is_private_and_says_when(
    catalogue: Catalogue, folder: Path, tmp_path: Path
) -> None:
    catalogue.add("tiny", folder)
    file = tmp_path / "data" / "models.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    row = json.loads(file.read_text())["models"][0]
    assert row["path"] == str(folder)
    assert row["added_at"].endswith("Z")


def test_a_file_written_by_hand(catalogue: Catalogue, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "models.json"
    file.write_text(json.dumps({"models": [{"name": "tiny", "path": "../a model"}]}))
    assert catalogue.entry("tiny").vocab_size == 300
    file.write_text('{"models": [{"name": "tiny"}]}')
    with pytest.raises(ModelFolderError, match="must hold"):
        catalogue.names()


def test_a_folder_that_is_gone(catalogue: Catalogue, folder: Path) -> None:
    catalogue.add("tiny", folder)
    folder.rename(folder.with_name("moved"))
    with pytest.raises(SignalError) as caught:
        catalogue.entry("tiny")
    assert caught.value.code == "model_load_failed"
    assert str(folder) not in caught.value.message
    assert catalogue.entries() == []


def test_a_changed_configuration_is_read_again(catalogue: Catalogue, folder: Path) -> None:
    catalogue.add("tiny", folder)
    change_config(folder, max_position_embeddings=64)
    os.utime(folder / "config.json", ns=(1, 1))
    assert catalogue.entry("tiny").context_length == 64


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, other: str) -> None:
    """Split the weights over two files, one of them under the name `other` in the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in (("one.safetensors", names[::2]), ("two.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = dict.fromkeys(names[::2], "one.safetensors") | dict.fromkeys(names[1::2], other)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_shards(catalogue: Catalogue, folder: Path) -> None:
    whole = catalogue.add("tiny", folder).num_parameters
    shard(folder, "two.safetensors")
    assert catalogue.add("shards", folder).num_parameters == whole


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (lambda folder: change_config(folder, vocab_size="300"), "has no vocab_size"),
        (lambda folder: change_config(folder, hidden_size=0), "has no hidden_size or n_embd"),
        (only_pickles, "convert its .bin files first"),
        (truncate, "copy it again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "not a safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors"),
        (lambda folder: shard(folder, "../a model/two.safetensors"), "not in the folder"),
        (lambda folder: shard(folder, "three.safetensors"), "not in the folder"),
    ],
)
def test_a_folder_that_cannot_be_served(
    catalogue: Catalogue, folder: Path, break_it: Callable[[Path], object], reason: str
) -> None:
    break_it(folder)
    with pytest.raises(ModelFolderError, match=reason):
        catalogue.add("tiny", folder)
    assert catalogue.names() == []


def test_facts_that_a_family_spells_otherwise(catalogue: Catalogue, folder: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_positions": 64,
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    entry = catalogue.add("gpt2", folder)
    assert (entry.architecture, entry.context_length, entry.num_layers) == ("gpt2", 64, 2)
    (folder / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": config}))
    assert catalogue.add("vlm", folder).hidden_size == 32


def test_the_tokenizers_files(catalogue: Catalogue, folder: Path) -> None:
    catalogue.add("tiny", folder)
    (folder / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    files = {file.name: file for file in catalogue.tokenizer_files("tiny")}
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name, file in files.items():
        raw = (folder / name).read_bytes()
        assert file.content.encode() == raw
        assert (file.size_bytes, file.sha256) == (len(raw), sha256(raw).hexdigest())


def test_the_hub_is_off_unless_the_operator_allows_it(catalogue: Catalogue) -> None:
    with pytest.raises(ModelFolderError, match="SIGNAL_ALLOW_HUB=1"):
        catalogue.add_hub("tiny", "owner/tiny")


def test_the_hub_gives_weights_and_no_code(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, *, local_dir: Path, **options: Any) -> None:
        asked.update(options, hub_id=hub_id)
        copytree(folder, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    entry = make_catalogue(tmp_path, allow_hub=True).add_hub("tiny", "owner/tiny")
    assert entry.path == tmp_path / "data" / "models" / "owner--tiny"
    assert asked["hub_id"] == "owner/tiny"
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
    assert asked["ignore_patterns"] == ["*/*"]
    row = json.loads((tmp_path / "data" / "models.json").read_text())["models"][0]
    assert row["hub_id"] == "owner/tiny"


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    catalogue = make_catalogue(tmp_path, allow_hub=True)
    with pytest.raises(ModelFolderError, match="could not be downloaded: no route"):
        catalogue.add_hub("tiny", "owner/tiny")
    with pytest.raises(ModelFolderError, match="is not a hub id"):
        catalogue.add_hub("tiny", "../../tiny")
