"""CLIP's tokenizer against OpenCLIP's, and where its vocabulary comes from."""

import gzip
import importlib.util
import io
import json
import pickle
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from cases import run_python

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

from fastclip.clip import vocabulary
from fastclip.clip.tokenizer import BpeTokenizer, ClipTokenizer, load_tokenizer
from fastclip.clip.vocabulary import find_vocabulary, read_merges
from fastclip.errors import UserError

CAPTIONS = ["a photo of a cat", "a photo of a dog", "two dogs and a cat's tail", "naïve café ☃"] * 5
# What a rule on runs of signs, letters and digits can get wrong.
NAMED = {
    "empty": "",
    "blank": " \t\r\n\u2028",
    "over-long": "many words " * 60,
    "one long word": "a" * 3000,
    "exactly full": "cat " * 75,
    "one too many": "cat " * 76,
    "special tokens": "<start_of_text> hi <END_OF_TEXT>",
    "special after letter": "hi<end_of_text>",
    "special after sign": "!<end_of_text> ?<start_of_text><end_of_text>",
    "special after special": "<start_of_text><end_of_text>x",
    "special with long s": "<\u017ftart_of_text><end_of_text> 1<\u017ftart_of_text>",
    "other special": "<|startoftext|> <|endoftext|></w>",
    "contractions": "it's they're I'll we'VE don't I'd 'tis 'S '\u017f rock'n'roll",
    "ligatures behind markup": "<b>&#xFB05;art '&#xFB06;",
    "entities": "&lt;b&gt; &amp;amp; &amp;lt; &#0; &#xD800; &notanentity; &copy; &amp;amp;lt;",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "surrogates": "\ud83d\ude00 \udcff\udc80 \ud800x",
    "bad utf-8": b"caf\xe9 \xff\xfe \xf0\x9f\x98".decode("utf-8", "replace"),
    "mojibake": "sch\u00c3\u00b6n \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "iota": "a\u0345b !\u0345! \u0345<end_of_text>",
    "combining": "e\u0301\u0302 a\u0308 \u0915\u094d\u0937",
    "digits": "1234 \u0661\u0662 \u00b2\u00bd \u2167 12th",
    "control": "a\x00b\x07c\x1bd\x7fe\x85f\x1cg \x1b[31mred",
    "cased": "\u0130STANBUL STRASSE \u1e9e \u212a\u212b \u03a3\u03a3",
}


def caption(rng: random.Random) -> str:
    """Some parts of any kind, joined with or without spaces."""
    blocks = ((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00))
    blocks += ((0x1100, 0x1200), (0x2000, 0x2C00), (0x3000, 0xA000), (0xAC00, 0xD800), (0xDC00, 0xE000))
    blocks += ((0xE000, 0xE100), (0xF900, 0x10000), (0x1D400, 0x1D800), (0x1F000, 0x1FB00), (0, 0x110000))
    words = [
        "A photo of",
        "the",
        "black chess",
        "QUEEN",
        ",",
        "Dr. O'Neill's",
        "3.5%",
        "isn't",
        "(here)",
        "\u201cyes\u201d",
    ]

    def part() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(words)
        if kind < 0.5:
            return rng.choice(list(NAMED.values()))[:200]
        if kind < 0.55:
            return bytes(rng.randrange(256) for _ in range(6)).decode(
                "utf-8", rng.choice(["replace", "surrogateescape"])
            )
        first, last = rng.choice(blocks)
        return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 8)))

    text = rng.choice(["", " ", " ", " ", "  \n"]).join(part() for _ in range(rng.randrange(0, 14)))
    # The two libraries' tables differ in what the newest Unicode has added.
    return "".join(c for c in text if unicodedata.category(c) != "Cn")


@pytest.fixture(scope="module")
def open_clips():
    """OpenCLIP's tokenizer module by itself: the package imports torchvision, which its tokenizer does not use."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed")
    spec = importlib.util.spec_from_file_location(
        "open_clips_tokenizer", Path(package.origin).with_name("tokenizer.py")
    )
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the module sets
        spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def clips(open_clips):
    return ClipTokenizer.load()


@pytest.fixture(scope="module")
def own():
    return ClipTokenizer.train(CAPTIONS, vocabulary=600, context=16)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No vocabulary can be found, until a test puts one somewhere."""
    monkeypatch.delenv("FASTCLIP_VOCABULARY", raising=False)
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary, "installed", lambda: [])
    return tmp_path


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_ids_are_open_clips_in_named_cases(open_clips, clips, text):
    assert clips(text).tolist() == open_clips(text).tolist()


def test_ids_are_open_clips_on_20000_strings(open_clips, clips):
    rng = random.Random(5)
    texts = [caption(rng) for _ in range(20_000)]
    ours, theirs = clips(texts), open_clips(texts)
    assert ours.dtype == torch.int64 and ours.shape == (20_000, 77)
    # The corpus is what it should be: long and short, and most of it not ASCII.
    assert 500 < (ours[:, -1] != 0).sum() < 15_000 and sum(not text.isascii() for text in texts) > 10_000
    wrong = (ours != theirs).any(1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} differ, the first is {texts[wrong[0]]!r}"


@pytest.mark.parametrize("context", [2, 3, 16, 256], ids=["none left", "one piece", "short", "longer"])
def test_other_contexts(open_clips, context):
    rng = random.Random(6)
    texts = [*NAMED.values(), *(caption(rng) for _ in range(300))]
    assert ClipTokenizer.load(context=context)(texts).tolist() == open_clips(texts, context).tolist()


def test_words_with_lone_surrogates():
    words = BpeTokenizer.train(CAPTIONS, vocabulary=200, context=9)
    assert torch.equal(words("a \udcff cat\ud800"), words("a ? cat?"))
    assert words.truncated(["\udcff"]).tolist() == [False]


def test_size_and_special_tokens_are_clips(clips):
    assert len(clips) == 49408 and (clips.start, clips.end) == (49406, 49407)


def test_truncated_tells_which(clips, own):
    assert clips.truncated([NAMED["exactly full"], NAMED["one too many"], ""]).tolist() == [False, True, False]
    words = BpeTokenizer.train(CAPTIONS, vocabulary=200, context=3)
    assert words.truncated(["a cat", "a photo of a cat"]).tolist() == [False, True]


def test_one_text_or_several_or_none(own):
    assert own("a cat").shape == (1, 16) and own(["a cat"] * 3).shape == (3, 16)
    assert own([]).shape == (0, 16) and own([]).dtype == torch.int64
    assert BpeTokenizer.train(CAPTIONS, vocabulary=200, context=3)([]).shape == (0, 3)


def test_trained_on_ones_own_captions(own):
    ids = own(["a PHOTO of a cat", "zebra \N{SNOWMAN} ☂ unseen", ""])
    assert 514 < len(own) <= 600 and own.end == len(own) - 1
    # Start, five whole words, end: learnt words are one piece.
    assert (ids[0] != 0).sum() == 7 and ids[0, 0] == own.start and ids[0, 6] == own.end
    # The end token is the highest id, which the text towers look for.
    assert ids.argmax(1).tolist() == [6, (ids[1] == own.end).nonzero().item(), 1]
    # Nothing is unknown: the bytes spell what was never seen.
    assert bytes_of(own, "zebra ☂") == "zebra☂".encode()
    with pytest.raises(ValueError, match="at least 514"):
        ClipTokenizer.train(CAPTIONS, vocabulary=513)


def bytes_of(tokenizer: ClipTokenizer, text: str) -> bytes:
    byte = {character: number for number, character in enumerate(vocabulary.byte_characters())}
    order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order += [number for number in range(256) if number not in order]
    pieces = [tokenizer.tokenizer.id_to_token(i) for i in tokenizer(text)[0].tolist() if 0 < i < tokenizer.start]
    return bytes(order[byte[c]] for c in "".join(pieces).replace("</w>", ""))


def test_training_twice_gives_the_same(own):
    assert ClipTokenizer.train(CAPTIONS, vocabulary=600, context=16).to_json() == own.to_json()


@pytest.mark.parametrize("kind", ["clip", "words"])
def test_tokenizer_survives_its_folder_and_pickle(own, tmp_path, kind):
    before = own if kind == "clip" else BpeTokenizer.train(CAPTIONS, vocabulary=200, context=5)
    (tmp_path / "tokenizer.json").write_text(before.to_json(), encoding="utf-8")
    for after in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(before))):
        assert type(after) is type(before)
        assert (after.context, len(after)) == (before.context, len(before))
        assert torch.equal(after(CAPTIONS), before(CAPTIONS))
    assert load_tokenizer(tmp_path, context=3)("a photo of a cat").shape == (1, 3)


def write_as(kind: str, merges, folder: Path) -> None:
    """`merges` in the file that OpenAI or Hugging Face would publish them in."""
    text = "#version\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    if kind == "gz":
        (folder / vocabulary.FILE).write_bytes(gzip.compress(text.encode()))
    elif kind == "merges":
        names = [*vocabulary.pieces(merges), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
        (folder / "merges.txt").write_text(text, encoding="utf-8")
    else:
        pairs = [" ".join(pair) for pair in merges] if kind == "old json" else merges
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": pairs}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


@pytest.mark.parametrize("kind", ["gz", "merges", "json", "old json"])
def test_every_published_file_gives_the_same_ids(open_clips, clips, tmp_path, kind):
    write_as(kind, read_merges(find_vocabulary()), tmp_path)
    again = load_tokenizer(tmp_path)
    assert again(CAPTIONS).tolist() == open_clips(CAPTIONS).tolist() and len(again) == 49408


def test_vocabulary_is_searched_in_order(nowhere, own, monkeypatch):
    places = {name: nowhere / name for name in ("path", "variable", "package", "cache")}
    for place in places.values():
        place.mkdir()
        write_as("gz", [("a", "b</w>")], place)
    monkeypatch.setenv("FASTCLIP_VOCABULARY", str(places["variable"]))
    monkeypatch.setattr(vocabulary, "installed", lambda: [nowhere / "none", places["package"]])
    assert find_vocabulary(places["path"]).parent == places["path"]
    assert find_vocabulary(places["path"] / vocabulary.FILE).parent == places["path"]
    assert find_vocabulary().parent == places["variable"]
    monkeypatch.delenv("FASTCLIP_VOCABULARY")
    assert find_vocabulary().parent == places["package"]
    monkeypatch.setattr(vocabulary, "installed", lambda: [])
    assert find_vocabulary().parent == places["cache"]
    (places["cache"] / vocabulary.FILE).unlink()
    with pytest.raises(UserError, match=r"install open_clip_torch, run `fastclip vocabulary --download`"):
        find_vocabulary()


def test_a_vocabulary_asked_for_is_never_replaced_by_another(nowhere, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"the vocabulary .*gone is neither"):
        find_vocabulary(tmp_path / "gone")
    monkeypatch.setenv("FASTCLIP_VOCABULARY", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"\$FASTCLIP_VOCABULARY .*gone is neither"):
        find_vocabulary()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (vocabulary.FILE, b"not gzip", "cannot be read"),
        (vocabulary.FILE, gzip.compress(b"#v\na b\nc d e\n")[:-9], "cannot be read"),
        (vocabulary.FILE, gzip.compress(b"#v\na b\nc d e\n"), "two pieces a line"),
        ("merges.txt", b"", "two pieces a line"),
        ("merges.txt", b"#v\n\xff \xfe\n", "cannot be read"),
        ("tokenizer.json", b"{", "cannot be read"),
        ("tokenizer.json", b"[]", "cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "neither CLIP's nor fastclip's"),
    ],
    ids=["gz", "cut gz", "three", "no line", "utf-8", "no json", "list", "other model"],
)
def test_damaged_vocabulary_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_vocab_json_that_numbers_otherwise_is_refused(tmp_path):
    write_as("merges", [("a", "b</w>"), ("c", "d</w>")], tmp_path)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    ids["ab</w>"], ids["cd</w>"] = ids["cd</w>"], ids["ab</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match="does not number its 516 pieces as CLIP does"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_download_is_checked(nowhere, open_clips, monkeypatch, changed):
    data = Path(importlib.util.find_spec("open_clip").origin).with_name(vocabulary.FILE).read_bytes()
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(data[:-1] if changed else data)

    monkeypatch.setattr(vocabulary.urllib.request, "urlopen", answer)
    if changed:
        with pytest.raises(UserError, match="has changed: expected sha256 924691ac"):
            vocabulary.download()
        assert not list(nowhere.rglob("*.gz"))
    else:
        assert vocabulary.download() == find_vocabulary() and len(ClipTokenizer.load()) == 49408
    assert asked == [vocabulary.ADDRESS]


def test_context_must_hold_two_tokens():
    with pytest.raises(ValueError, match="got 1"):
        ClipTokenizer([], context=1)


def test_without_ftfy_plain_ascii_still_works(own, monkeypatch):
    expected = own("A photo of  a cat")
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert torch.equal(own("A photo of  a cat"), expected)
    with pytest.raises(ModuleNotFoundError, match="pip install ftfy") as caught:
        own("café")
    assert caught.value.name == "ftfy"


def test_finding_the_vocabulary_imports_neither_package():
    code = """
import sys
from fastclip.clip.vocabulary import installed
installed()
assert not {"open_clip", "clip", "tokenizers"} & set(sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
