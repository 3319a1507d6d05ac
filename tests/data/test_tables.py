"""Tables, folders, saved data sets and glyphs: what each sample is, and what is said about the rest."""

import os

import numpy as np
import pytest
import torch
from numbered import Letters, captions_json, noisy, numbers, picture, plain, texts, write_table

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

import pyarrow as pa
import pyarrow.parquet as pq

from fastclip.data.characters import GlyphSource
from fastclip.data.config import DataConfig
from fastclip.data.folder import FolderSource
from fastclip.data.loader import make_loader
from fastclip.data.sample import BadSample, captions_in, to_text
from fastclip.data.sources import kind_of
from fastclip.data.tables import TableSource
from fastclip.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    """Four pictures below tmp_path/images."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def table(pictures, text: str, name: str = "t.csv", image: str = "path", captions=("caption",)) -> TableSource:
    (pictures / name).write_bytes(text.encode())
    return TableSource(str(pictures / name), image, captions, None)


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(pictures):
    found = table(pictures, '\ufeffpath,caption\n"images/0.png","a ""black"" cat,\nasleep"\nimages/1.png,dog\n')
    assert [list(found[i].captions) for i in range(2)] == [[b'a "black" cat,\nasleep'], [b"dog"]]
    assert found[0].image == picture(0) and found[0].name == "images/0.png"


def test_tsv_own_columns_and_several_caption_columns(pictures):
    text = "title\tfile\talt\nzero\timages/0.png\t0\none, 1\timages/1.png\t\n"
    found = table(pictures, text, "t.tsv", "file", ("title", "alt"))
    assert [list(found[i].captions) for i in range(2)] == [[b"zero", b"0"], [b"one, 1"]]


def test_rows_of_one_path_are_one_sample_wherever_they_stand(pictures):
    found = table(pictures, "path,caption\nimages/1.png,a\nimages/0.png,b\nimages/1.png,c\nimages/1.png,d\n")
    assert len(found) == 2
    assert [(found[i].name, list(found[i].captions)) for i in range(2)] == [
        ("images/1.png", [b"a", b"c", b"d"]),
        ("images/0.png", [b"b"]),
    ]


def test_rows_with_a_wrong_number_of_cells_are_left_out_and_named(pictures):
    found = table(pictures, "path,caption\nimages/0.png,a,b\nimages/1.png\nimages/2.png,c\n")
    assert len(found) == 1 and found.problems.counts == {"bad row": 2}
    assert found.problems.names["bad row"][0] == "t.csv: row 2 has 3 cells, not 2"


def test_paths_relative_to_the_table_to_a_root_and_absolute(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "t.csv"
    elsewhere.write_text(f"path,caption\n1.png,a\n{pictures}/images/2.png,b\n")
    config = DataConfig(str(elsewhere), root=str(pictures / "images"))
    loader = make_loader(config, Letters(), plain, 2)
    assert {n for batch in loader for n in numbers(batch)} == {1, 2}
    with pytest.raises(BadSample, match="No such file"):
        TableSource(str(elsewhere), "path", ("caption",), None)[0]


@pytest.mark.parametrize("type_", ["string", "large_string", "binary", "dictionary"])
def test_parquet_with_strings_bytes_lists_and_nulls(pictures, type_):
    paths = pa.array(["images/0.png", "images/1.png", "images/1.png", None])
    paths = paths.dictionary_encode() if type_ == "dictionary" else paths.cast(getattr(pa, type_)())
    one = pa.array(["a", None, "b", "c"])
    several = pa.array([["d", "e"], [], None, ["f"]], pa.list_(pa.string()))
    pq.write_table(pa.table({"path": paths, "one": one, "several": several, "x": one}), pictures / "t.parquet")
    found = TableSource(str(pictures / "t.parquet"), "path", ("one", "several"), None)
    assert [list(found[i].captions) for i in range(2)] == [["a", "d", "e"], ["b"]]
    with pytest.raises(BadSample, match=r"t\.parquet: row 4 has no path"):
        found[2]


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("a,b\n1,2\n", "t.csv", "no column 'path'; it has 'a', 'b'"),
        ("path,caption\n", "t.csv", "has no rows"),
        ("", "t.csv", "cannot read the table .*Empty CSV"),
        ("nonsense", "t.parquet", "cannot read the table"),
    ],
    ids=["columns", "no-rows", "empty", "no-parquet"],
)
def test_tables_that_cannot_be_read_are_one_line(tmp_path, content, name, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        TableSource(str(tmp_path / name), "path", ("caption",), None)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read the table"):
        TableSource(str(tmp_path / f"none-{name}"), "path", ("caption",), None)


def test_a_large_table_stays_in_arrows_memory(tmp_path):
    """200,000 rows, opened in a second or so; Python strings for them would be lists."""
    paths = pa.array([f"{i}.png" for i in range(200_000)])
    pq.write_table(pa.table({"path": paths, "caption": paths}), tmp_path / "t.parquet")
    found = TableSource(str(tmp_path / "t.parquet"), "path", ("caption",), None)
    assert len(found) == 200_000 and isinstance(found.paths, pa.Array) and isinstance(found.rows, np.ndarray)


def test_folder_takes_txt_and_json_beside_the_image(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("  a cat\nasleep ")
    (tmp_path / "sub" / "b.JPG").write_bytes(picture(1, "JPEG"))
    (tmp_path / "sub" / "b.json").write_bytes(captions_json("one", "two"))
    (tmp_path / "c.png").write_bytes(picture(2))
    (tmp_path / "notes.md").write_text("not data")
    found = FolderSource(str(tmp_path), ("caption",))
    assert [sample.name for sample in map(found.__getitem__, range(3))] == [
        "a.png",
        "c.png",
        os.path.join("sub", "b.JPG"),
    ]
    assert [list(found[i].captions) for i in range(3)] == [[b"  a cat\nasleep "], [], ["one", "two"]]


def test_folders_without_images_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        FolderSource(str(tmp_path), ("caption",))
    with pytest.raises(UserError, match=r"cannot list .*: No such file"):
        FolderSource(str(tmp_path / "none"), ("caption",))


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b'{"caption": "a"}', ["a"]),
        (b'{"caption": ["a", 5, "b"], "x": "c"}', ["a", "b"]),
        (b'["a", "b"]', ["a", "b"]),
        (b'"a"', ["a"]),
        (b'{"caption": null}', []),
        (b"{", []),
        (b"[" * 10**5, []),
        (b'{"caption": "a", "n": ' + b"9" * 10**5 + b"}", ["a"]),
        ('\ufeff{"caption": "a"}'.encode(), ["a"]),
    ],
    ids=["string", "list", "bare-list", "bare", "null", "cut", "deep", "long-number", "mark"],
)
def test_captions_in_json(content, captions):
    assert captions_in("json", content, ("caption",)) == captions


MARK = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("given", "text", "damaged"),
    [
        (b" a\n\tb ", "a b", False),
        ("a\u2003b", "a b", False),
        (b"\xef\xbb\xbfa", "a", False),
        (b"caf\xe9", "caf" + MARK, True),
        # A half of a surrogate pair is three bytes of no character.
        (captions_in("json", b'"caf\xe9"', ())[0], "caf" + 3 * MARK, True),
        ("a\ud800", "a" + 3 * MARK, True),
    ],
    ids=["spaces", "wide-space", "mark", "latin-1", "json-latin-1", "surrogate"],
)
def test_captions_become_unicode_in_single_spaces(given, text, damaged):
    assert to_text(given) == (text, damaged)


def test_saved_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
        }
    )
    rows = {
        "image": [{"bytes": picture(i), "path": None} for i in range(6)],
        "caption": [[f"number {i}"] for i in range(6)],
        "label": list(range(6)),
    }
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    saved.save_to_disk(str(tmp_path / "one"))
    config = DataConfig(str(tmp_path / "one"))
    assert kind_of(config) == "hf"
    for workers in (0, 1):
        found = [
            pair
            for batch in make_loader(config, Letters(), noisy, 3, workers=workers)
            for pair in zip(numbers(batch), texts(batch), strict=True)
        ]
        assert sorted(found) == [(i, f"number {i}") for i in range(6)]
    with pytest.raises(UserError, match="no column 'text'; it has 'image', 'caption', 'label'"):
        make_loader(DataConfig(str(tmp_path / "one"), captions=("text",)), Letters(), noisy, 3)
    datasets.DatasetDict(train=saved, test=saved.select([5])).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"one of the splits .* with --data.split: train, test"):
        make_loader(DataConfig(str(tmp_path / "two")), Letters(), noisy, 3)
    (batch,) = make_loader(DataConfig(str(tmp_path / "two"), split="test"), Letters(), noisy, 1)
    assert numbers(batch) == [5]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the data set in") as error:
        make_loader(config, Letters(), noisy, 3)
    assert "\n" not in str(error.value)


def test_glyphs_are_printed_black_on_white_and_split_by_face():
    pytest.importorskip("matplotlib")
    faces = ("DejaVuSerif", "STIXGeneral")
    test, train = (GlyphSource(32, split, faces) for split in ("test", "train"))
    whole = GlyphSource(32, None, faces)
    assert len(test) + len(train) == len(whole) == len(whole.glyphs)
    sample = test[0]
    assert sample.captions[0] in test.glyphs.names and "DejaVuSerif" in sample.name
    assert np.asarray(sample.image)[0, 0] == 255
    assert torch.equal(torch.from_numpy(255 - np.asarray(sample.image)), torch.from_numpy(test.glyphs.images[0]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("glyphs", "glyphs"),
        ("x-{0..9}.TAR", "shards"),
        ("s3://b/*.tar.gz", "shards"),
        ("x.tsv", "table"),
        ("x.parquet", "table"),
    ],
)
def test_the_kind_follows_from_the_name(name, kind):
    assert kind_of(DataConfig(name)) == kind
    assert kind_of(DataConfig(name, kind="folder")) == "folder"


def test_the_kind_of_a_folder_follows_from_its_files(tmp_path):
    write_table(tmp_path / "set", 1)
    assert kind_of(DataConfig(str(tmp_path / "set"))) == "folder"
    (tmp_path / "set" / "0.tar").touch()
    assert kind_of(DataConfig(str(tmp_path / "set"))) == "shards"
