"""What a user may name as a source: files, folders, OpenAI's published names, fetched from a server on loopback."""

import functools
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vit_embed.conversion import openai_files
from vit_embed.conversion.download import download_openai
from vit_embed.conversion.openai_files import OPENAI_MODELS, find_openai_file
from vit_embed.conversion.source import find_source
from vit_embed.convert_checkpoint import main

STATE = {"w": torch.arange(6.0)}


# OpenAI's names


@pytest.fixture
def openai_server(source, tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that a server on loopback gives out in place of OpenAI's, with a small model as its ViT-B/32."""
    root = tmp_path / "served"
    digest = hashlib.sha256(source.archive.read_bytes()).hexdigest()
    (root / digest).mkdir(parents=True)
    shutil.copy(source.archive, root / digest / "ViT-B-32.pt")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(openai_files, "OPENAI_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(OPENAI_MODELS, "ViT-B/32", ("ViT-B-32.pt", digest))
        monkeypatch.setenv("VIT_EMBED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield root / digest / "ViT-B-32.pt"
        server.shutdown()


def test_the_published_names_are_openais():
    clip = Path(find_openai_file("clip/clip.py")).read_text()
    for file, digest in OPENAI_MODELS.values():
        assert f'"{openai_files.OPENAI_ADDRESS}/{digest}/{file}"' in clip


def test_a_published_name_is_converted_and_fetched_once_unless_it_was_changed(openai_server, tmp_path):
    assert main(["ViT-B/32", "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    cached = tmp_path / "cache" / "ViT-B-32.pt"
    assert cached.read_bytes() == openai_server.read_bytes()
    assert [path.name for path in cached.parent.iterdir()] == ["ViT-B-32.pt"]
    cached.write_bytes(b"changed")
    assert download_openai("ViT-B/32").read_bytes() == openai_server.read_bytes()
    openai_server.unlink()
    assert download_openai("ViT-B/32") == cached  # no server needed
    assert find_source("ViT-B/32").files == (cached,)


@pytest.mark.parametrize("change", ["another byte", "cut short"])
def test_a_file_with_another_hash_is_refused_and_does_not_stay(openai_server, tmp_path, caplog, change):
    content = bytearray(openai_server.read_bytes())
    content[1000] ^= 1
    openai_server.write_bytes(content if change == "another byte" else content[:-5])
    assert main(["ViT-B/32", "--output_dir", str(tmp_path / "out")]) == 1
    assert "SHA-256" in caplog.text and f"published is {OPENAI_MODELS['ViT-B/32'][1]}" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_fetched_is_named(openai_server, tmp_path, caplog):
    openai_server.unlink()
    assert main(["ViT-B/32", "--output_dir", str(tmp_path / "out")]) == 1
    assert "cannot be fetched" in caplog.text and "give its path" in caplog.text


# Files and folders


def folder_of(tmp_path: Path, **files: bytes | dict) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_a_folder_gives_weights_config_and_what_travels_along(tmp_path):
    folder = folder_of(
        tmp_path, config__json={"model_type": "clip"}, preprocessor_config__json={"size": 3}, merges__txt=b"m"
    )
    save_file(STATE, folder / "model.safetensors")
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    source = find_source(folder)
    assert source.weights == folder / "model.safetensors" and torch.equal(source.state_dict()["w"], STATE["w"])
    assert source.config == {"model_type": "clip"} and source.preprocessor == {"size": 3}
    assert source.tokenizer_files == (folder / "merges.txt",) and source.licence == "apache-2.0"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert source.sha256() == {"model.safetensors": digest}


def test_a_lone_file_takes_the_config_beside_it_and_nothing_else(tmp_path):
    folder = folder_of(tmp_path, open_clip_config__json={"model_cfg": {}}, config__json={"a": 1}, merges__txt=b"m")
    torch.save(STATE, folder / "any name.pt")
    source = find_source(folder / "any name.pt")
    assert source.config == {"model_cfg": {}}  # open_clip's folders hold a config.json of transformers besides
    assert source.tokenizer_files == () and source.preprocessor is None and source.licence is None
    assert find_source(folder).weights.name == "any name.pt"  # the only one there


def test_the_clip_inside_a_folder_of_sentence_transformers_is_found(tmp_path):
    folder = folder_of(tmp_path, modules__json=b"[]")
    inner = folder / "0_CLIPModel"
    inner.mkdir()
    save_file(STATE, inner / "model.safetensors")
    (inner / "config.json").write_text('{"model_type": "clip"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    source = find_source(folder)
    assert source.weights == inner / "model.safetensors" and source.config == {"model_type": "clip"}
    assert source.licence == "mit"
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    assert find_source(folder).weights == folder / "model.safetensors"  # its own come first
    (inner / "model.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder/0_CLIPModel must hold weights"):
        find_source(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config__json": {}}, "there is none"),
        ({"a__pt": b"1", "b__pt": b"2"}, "there are several: a.pt, b.pt; name one"),
        ({"a__pt": b"1", "config__json": b"{"}, "config.json cannot be read as JSON"),
        ({"a__pt": b"1", "config__json": b"[1]"}, "config.json must hold a JSON object, got list"),
        ({"a__pt": b"1", "config__json": b"\xff"}, "config.json cannot be read as JSON"),
        ({"a__pt": b"1", "config__json": b"[" * 100_000}, "config.json cannot be read as JSON"),
    ],
)
def test_an_unfit_folder_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        find_source(folder_of(tmp_path, **files))


@pytest.mark.parametrize("name", ["nowhere.pt", "ViT-B/99/x", "/no/such/folder", "ViT-B/32 "])
def test_a_name_of_nothing_is_refused_with_what_could_be_given(name):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*give a file, a folder, .*ViT-L/14@336px"):
        find_source(name)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("license: cc-by-nc-4.0 (see below)", "cc-by-nc-4.0 (see below)"),
        ("license: [mit, apache-2.0]", None),
        ("tags: [a]", None),
        ("license: 'x\n\n# A heading of its own'", None),
        ("license: {a: b", None),
    ],
)
def test_the_licence_is_what_the_card_states_on_one_line(tmp_path, front, licence):
    folder = folder_of(tmp_path)
    torch.save(STATE, folder / "a.pt")
    (folder / "README.md").write_text(f"---\n{front}\n---\ntext\n")
    assert find_source(folder).licence == licence
    (folder / "README.md").unlink()
    (folder / "config.json").write_text('{"pretrained_cfg": {"license": "apache-2.0"}}')  # timm's
    assert find_source(folder).licence == "apache-2.0"
    (folder / "config.json").write_text('{"pretrained_cfg": ["license"]}')
    (folder / "processor_config.json").write_text('{"image_processor": 3}')
    assert find_source(folder).licence is find_source(folder).preprocessor is None
