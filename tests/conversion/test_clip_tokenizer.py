"""The tokenizer of a converted folder: OpenAI's ids, the source's own files, another's refused."""

import gzip
import html
import json
import re
import shutil
from pathlib import Path

import ftfy
import openai_reference
import pytest
import torch
import transformers
from transformers import CLIPTokenizer

import vit_embed
from vit_embed import VitEmbedTextConfig
from vit_embed.conversion.openai_files import BPE_FILE, find_openai_file
from vit_embed.conversion.tokenizer import (
    clip_bpe_vocabulary,
    clip_tokenizer_files,
    padding_id,
    read_tokenizer,
    write_tokenizer,
)
from vit_embed.convert_checkpoint import convert_checkpoint as convert

PAGE = Path(vit_embed.__file__).with_name("docs") / "convert.md"


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A folder converted from a model with OpenAI's vocabulary and context."""
    folder = tmp_path_factory.mktemp("vocabulary")
    model = openai_reference.openai_clip(vocab_size=49408, context_length=77)
    torch.save(openai_reference.openai_state_dict(model), folder / "clip.pt")
    convert(folder / "clip.pt", folder / "out")
    return folder / "out"


def test_the_tokenizer_gives_openais_ids(with_tokenizer):
    tokenizer = CLIPTokenizer.from_pretrained(with_tokenizer)
    openais = openai_reference.openai_tokenizer()
    texts = [
        "a red apple",
        "A photo of a Dog!",
        "it's 50% off, I'll go",
        "naïve café — déjà vu",
        "汉字 🍎",
        "two\n lines",
        "",
    ]
    for text in texts:
        assert tokenizer(text).input_ids == [49406, *openais.encode(text), 49407]
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("word " * 100, truncation=True).input_ids) == 77
    assert tokenizer.pad_token_id == 49407


def test_bpe_vocabulary_has_the_size_asked_for():
    path = find_openai_file(BPE_FILE)
    vocab, merges = clip_bpe_vocabulary(path)
    assert sorted(vocab.values()) == list(range(49408)) and len(merges) == 48894
    assert vocab == openai_reference.openai_tokenizer().encoder
    pruned, first_merges = clip_bpe_vocabulary(path, num_merges=10)
    assert first_merges == merges[:10] and len(pruned) == 524
    assert [pruned[token] for token in ("<|startoftext|>", "<|endoftext|>")] == [522, 523]
    assert list(pruned)[:522] == list(vocab)[:522]


def tiny_tokenizer_folder(folder: Path, num_tokens: int = 100) -> Path:
    """A vocabulary of single letters and no merges, with CLIP's special tokens last."""
    vocab, _ = clip_bpe_vocabulary(find_openai_file(BPE_FILE), num_merges=0)
    tokens = [*list(vocab)[: num_tokens - 2], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_a_tokenizer_folder_is_taken_if_it_fits(source, tmp_path):
    convert(source.file, tmp_path / "out", tokenizer=tiny_tokenizer_folder(tmp_path / "fits"))
    assert CLIPTokenizer.from_pretrained(tmp_path / "out")("").input_ids == [98, 99]
    with pytest.raises(ValueError, match="100, but .* has 90 tokens"):
        convert(source.file, tmp_path / "out2", tokenizer=tiny_tokenizer_folder(tmp_path / "small", num_tokens=90))
    with pytest.raises(ValueError, match="100, but .* has 49408 tokens"):
        convert(source.file, tmp_path / "out2", tokenizer=find_openai_file(BPE_FILE))
    vocab = json.loads((tmp_path / "fits" / "vocab.json").read_text())
    vocab["<|endoftext|>"], vocab["!"] = vocab["!"], vocab["<|endoftext|>"]
    (tmp_path / "fits" / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"wrong: \['<\|endoftext\|>'\]"):
        convert(source.file, tmp_path / "out2", tokenizer=tmp_path / "fits")
    (tmp_path / "fits" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        convert(source.file, tmp_path / "out2", tokenizer=tmp_path / "fits")
    assert not (tmp_path / "out2").exists()


def test_without_a_tokenizer_the_log_names_the_option(source, tmp_path, caplog):
    convert(source.file, tmp_path / "out")
    assert "give --tokenizer a folder with vocab.json and merges.txt" in caplog.text
    assert not (tmp_path / "out" / "vocab.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"header\na b\n"), gzip.compress(b"\xff"), gzip.compress(b"a b c\n" * 50000)],
    ids=["empty", "no gzip", "too few merges", "no text", "three words a line"],  # gzip writes the time into its header
)
def test_a_foreign_bpe_file_is_refused(tmp_path, content):
    (tmp_path / "bpe.gz").write_bytes(content)
    with pytest.raises(ValueError, match="must be OpenAI's bpe_simple_vocab_16e6.txt.gz"):
        clip_bpe_vocabulary(tmp_path / "bpe.gz")


# What OpenAI's tokenizer does to a text before it looks the words up


def strings_of_the_page() -> dict[str, str]:
    """The table of docs/convert.md of texts that stock CLIPTokenizer reads otherwise: {kind: text}."""
    table = PAGE.read_text(encoding="utf-8").partition("| kind of text | example |")[2]
    rows = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("| ")]
    return {
        kind: json.loads(f'"{text}"')
        for kind, text in (re.match(r"\| ([^|]+) \| `(.*?)` \|", row).groups() for row in rows)
    }


def test_the_page_names_what_differs_and_its_cure_works(with_tokenizer):
    tokenizer, openais = CLIPTokenizer.from_pretrained(with_tokenizer), openai_reference.openai_tokenizer()
    examples = strings_of_the_page()
    assert len(examples) == 8
    for kind, text in examples.items():
        expected = [49406, *openais.encode(text), 49407]
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))  # the line of docs/convert.md
        if not transformers.__version__.startswith("5."):  # of version 4 this class calls ftfy and Python's lower()
            assert tokenizer(cleaned).input_ids == expected, kind
            continue
        assert tokenizer(text).input_ids != expected, kind
        # The tokenizers library's lower() does not know a final sigma.
        assert (tokenizer(cleaned).input_ids == expected) == (kind != "final sigma"), kind


# Other tokenizers


def word_tokenizer(folder: Path, words: list[str], settings: dict | None = None) -> Path:
    """A folder with the tokenizer.json of a word-level vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings or {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def test_a_tokenizer_json_travels_with_the_context_length(tmp_path):
    folder = word_tokenizer(tmp_path / "words", ["<unk>", "a", "dog"])
    config = VitEmbedTextConfig(vocab_size=3, pooling_type="last", eos_token_id=2, bos_token_id=None, pad_token_id=0)
    files = read_tokenizer(None, sorted(folder.iterdir()), config)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 77
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", files)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a dog").input_ids == [1, 2]
    assert read_tokenizer(folder, [], config) == files


@pytest.mark.parametrize(
    ("vocab_size", "pooling_type", "message"),
    [
        (2, "last", "must have at most the text tower's 2 tokens, but the source has 3"),
        (3, "eos", "ends a text with 2, the text tower reads 1"),
    ],
)
def test_a_tokenizer_json_of_another_model_is_refused(tmp_path, vocab_size, pooling_type, message):
    folder = word_tokenizer(tmp_path / "words", ["<unk>", "a", "<|endoftext|>"])
    fields = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    config = VitEmbedTextConfig(vocab_size=vocab_size, pooling_type=pooling_type, **fields)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(None, sorted(folder.iterdir()), config)


def test_a_tokenizer_with_code_or_of_rubbish_is_refused(tmp_path):
    config = VitEmbedTextConfig(vocab_size=9, pooling_type="last", eos_token_id=1, bos_token_id=None, pad_token_id=0)
    coded = word_tokenizer(tmp_path / "coded", ["a"], {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    with pytest.raises(ValueError, match="with no code"):
        read_tokenizer(coded, [], config)
    for content in (b"{", b"[]", b"\xff", b"{}", b"[" * 100_000):
        (coded / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read|with no code"):
            read_tokenizer(coded, [], config)
    (coded / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="must hold a tokenizer.json"):
        read_tokenizer(coded, [], config)


def test_an_old_folder_of_vocabulary_and_merges_gets_its_fast_form(with_tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(with_tokenizer / name, tmp_path)
    files = read_tokenizer(None, sorted(tmp_path.iterdir()), VitEmbedTextConfig())
    vocab, merges = clip_bpe_vocabulary(find_openai_file(BPE_FILE))
    assert files == clip_tokenizer_files(vocab, merges, 77)
    write_tokenizer(tmp_path, files)
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pad_token": "dog"}, 2),
        ({"pad_token": {"content": "a"}}, 1),
        ({"pad_token": "cat", "added_tokens_decoder": {"7": {"content": "cat"}}}, 7),
        ({}, None),
        ([1], "cannot be read"),
        ({"pad_token": {"no": "content"}}, "cannot be read"),
        ({"pad_token": "cat", "added_tokens_decoder": 3}, "cannot be read"),
    ],
)
def test_padding_is_what_the_tokenizer_states(tmp_path, settings, expected):
    folder = word_tokenizer(tmp_path / "words", ["<unk>", "a", "dog"])
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    if expected == "cannot be read":
        with pytest.raises(ValueError, match=expected):
            padding_id(files)
    else:
        assert padding_id(files) == expected
