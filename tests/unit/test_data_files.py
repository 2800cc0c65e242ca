"""Where files are found, how they are fetched, and what the errors say."""

import gzip
import hashlib
import io
import struct
import urllib.error

import numpy as np
import pytest

from sterna.data import DataError, files, idx, mnist
from sterna.data.files import Published
from sterna.data.idx import IdxDataset, IdxFile

CONTENT = b"the published bytes"
FILE = Published(
    name="data.bin",
    checksum=hashlib.sha256(CONTENT).hexdigest(),
    urls=("https://first.example/data.bin", "https://second.example/data.bin"),
)


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """An empty cache, no STERNA_DATA, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STERNA_DATA", raising=False)
    monkeypatch.setattr(files, "_open", no_network)


def no_network(url):
    raise urllib.error.URLError("no route to host")


def answering(monkeypatch, answers):
    """Answer each URL with the bytes given, or raise the error given; keep what was asked."""
    asked = []

    def answer(url):
        asked.append(url)
        if isinstance(answers[url], Exception):
            raise answers[url]
        return io.BytesIO(answers[url])

    monkeypatch.setattr(files, "_open", answer)
    return asked


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def test_folders_in_order(tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "sterna"
    assert files.folders("mnist") == (cache / "mnist", cache)
    monkeypatch.setenv("STERNA_DATA", str(tmp_path))
    assert files.folders("mnist")[:2] == (tmp_path / "mnist", tmp_path)
    given = tmp_path / "given"
    given.mkdir()
    assert files.folders("mnist", given) == (given / "mnist", given, cache / "mnist", cache)


def test_the_cache_is_in_the_home_folder_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert files.cache() == tmp_path / ".cache" / "sterna"


def test_a_named_folder_must_exist(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"--data-dir must name a folder that exists; got '.*typo'"):
        mnist.load(tmp_path / "typo")
    monkeypatch.setenv("STERNA_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match=r"STERNA_DATA must name a folder that exists"):
        mnist.load()


def test_missing_without_network_names_file_places_url_and_way_out(tmp_path):
    with pytest.raises(DataError) as caught:
        mnist.load(tmp_path)
    message = str(caught.value)
    for part in (
        "train-images-idx3-ubyte.gz was not found in",
        str(tmp_path / "mnist"),
        str(tmp_path / "cache" / "sterna"),
        "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
        "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
        "no route to host",
        "--data-dir",
        "STERNA_DATA",
    ):
        assert part in message
    assert "\n" not in message


def test_fetch_goes_to_the_cache_once(monkeypatch, tmp_path):
    asked = answering(monkeypatch, {FILE.urls[0]: CONTENT})
    path = files.obtain(FILE, "things")
    assert path == tmp_path / "cache" / "sterna" / "things" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert files.obtain(FILE, "things") == path
    assert asked == [FILE.urls[0]]


@pytest.mark.parametrize(
    "first", [b"<html>log in</html>", CONTENT[:-1], OSError("refused"), TimeoutError()]
)
def test_fetch_turns_to_the_next_home_and_leaves_nothing_behind(monkeypatch, tmp_path, first):
    asked = answering(monkeypatch, {FILE.urls[0]: first, FILE.urls[1]: CONTENT})
    path = files.obtain(FILE, "things")
    assert asked == list(FILE.urls)
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]


def test_fetch_keeps_nothing_that_is_not_the_published_file(monkeypatch, tmp_path):
    answering(monkeypatch, {FILE.urls[0]: b"x", FILE.urls[1]: TimeoutError()})
    with pytest.raises(DataError, match=r"first.*\(other content: sha256 .*second.*TimeoutError"):
        files.obtain(FILE, "things")
    assert list((tmp_path / "cache" / "sterna" / "things").iterdir()) == []


def test_fetch_waits_ten_seconds_at_most(monkeypatch):
    seen = {}
    monkeypatch.undo()
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda url, timeout: seen.update(url=url, timeout=timeout)
    )
    files._open("https://first.example/x")
    assert seen == {"url": "https://first.example/x", "timeout": 10.0}


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    answering(monkeypatch, dict.fromkeys(FILE.urls, CONTENT))
    with pytest.raises(DataError, match=r"could not be fetched.*cache"):
        files.obtain(FILE, "things")


@pytest.mark.parametrize(
    ("checksum", "kind"),
    [(FILE.checksum, "sha256"), (hashlib.md5(CONTENT).hexdigest(), "md5")],
)
def test_a_wrong_checksum_names_file_expected_got_and_way_out(tmp_path, checksum, kind):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    assert files.read_checked(path, checksum) == CONTENT
    path.write_bytes(b"other")
    got = hashlib.new(kind, b"other").hexdigest()
    with pytest.raises(
        DataError, match=rf"data.bin .*{kind} must be {checksum}; got {got}.*Delete"
    ):
        files.read_checked(path, checksum)


def test_an_unreadable_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        files.read_checked(tmp_path, FILE.checksum)
    with pytest.raises(DataError, match="cannot be read"):
        idx.read(tmp_path)


def test_idx_with_and_without_gzip(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for content in (idx_bytes(array), gzip.compress(idx_bytes(array))):
        path = tmp_path / "x"
        path.write_bytes(content)
        assert np.array_equal(idx.read(path), array)


WHOLE = idx_bytes(np.arange(40))
ZIPPED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be 00 00 08 and the number of dimensions; got an empty file"),
        (b"\0\0\x0d\x01" + WHOLE[4:], "got 00 00 0d 01"),
        (b"\0\0\x08\x00" + WHOLE[4:], "got 00 00 08 00"),
        (b"\0\0\x08\x03\0\0", "cut off in its header: 16 bytes needed; got 6"),
        (WHOLE[:-1], r"must hold 40 values, shape \(40,\) as its header says; got 39"),
        (WHOLE + b"\0", "got 41"),
        (ZIPPED[:-9], "not a whole gzip file"),
        (ZIPPED[:12], "not a whole gzip file"),
        (ZIPPED[:-8] + b"\0" * 8, "not a whole gzip file"),
        (ZIPPED[:15] + b"\xff\xff\xff" + ZIPPED[18:], "not a whole gzip file"),
    ],
)
def test_a_damaged_idx_file_is_named(content, message):
    with pytest.raises(DataError, match=f"some.idx .*{message}"):
        idx.parse(content, "some.idx")


def tiny(folder, counts=(4, 4, 2, 2)):
    """A data set of four small IDX files in ``folder``, as an `IdxDataset` that knows them."""
    made = []
    for k, (name, n) in enumerate(zip(("a", "b", "c", "d"), counts, strict=True)):
        array = np.full((n, 2, 3), 10 * k) if k % 2 == 0 else np.arange(n)
        plain = idx_bytes(np.asarray(array))
        zipped = gzip.compress(plain, mtime=0)
        (folder / f"{name}.gz").write_bytes(zipped)
        made.append(
            IdxFile(
                name=f"{name}.gz",
                checksum=hashlib.sha256(zipped).hexdigest(),
                plain=hashlib.sha256(plain).hexdigest(),
                urls=(),
            )
        )
    return IdxDataset(name="tiny", subfolder="tiny", mean=0.5, std=0.25, files=tuple(made))


@pytest.mark.parametrize("subfolder", ["", "tiny"])
@pytest.mark.parametrize("unzip", [False, True])
def test_all_layouts_are_read(tmp_path, subfolder, unzip):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    description = tiny(folder)
    if unzip:
        for path in folder.glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    data = description.load(tmp_path)
    assert data.train.inputs.shape == (4, 1, 2, 3)
    assert data.train.inputs.unique().tolist() == [-2.0]
    assert data.test.inputs.unique().item() == pytest.approx((20 / 255 - 0.5) / 0.25)
    assert data.train.targets.tolist() == [0, 1, 2, 3]


def test_images_and_labels_must_belong_together(tmp_path):
    with pytest.raises(DataError, match=r"tiny: images .* got \(4, 2, 3\) and \(3,\)"):
        tiny(tmp_path, counts=(4, 3, 2, 2)).load(tmp_path)
