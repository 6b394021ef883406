from pathlib import Path

import pytest
from webdataset.shardlists import expand_urls

from datamodules.webdataset.urls import expand_shards, is_local, is_pipe


@pytest.fixture
def folder(tmp_path):
    """Shards as img2dataset leaves them: numbers with gaps, and other files beside them."""
    for name in ("00010.tar", "00002.tar", "00000.tar", "00000.parquet", "00000_stats.json", "00002.tar.tmp"):
        (tmp_path / name).touch()
    return tmp_path


def names(shards):
    return [Path(shard).name for shard in shards]


@pytest.mark.parametrize(
    "text",
    [
        "http://host/{00000..00012}.tar",
        "s3://bucket/{a,b}/{0..2}.tar::gs://other/x.tar",
        "data/{08..11}.tar",
        "pipe:aws s3 cp s3://bucket/{000..002}.tar -",
    ],
)
def test_braces_are_expanded_as_webdataset_does(text):
    assert expand_shards(text) == expand_urls(text)


def test_a_variable_of_the_environment_is_expanded_as_webdataset_does(monkeypatch):
    monkeypatch.setenv("WDS_PLACE", "http://host")
    assert expand_shards("${PLACE}/{0..1}.tar") == ["http://host/0.tar", "http://host/1.tar"]


@pytest.mark.parametrize("spec", ["{}", "{}/*.tar", "{}/000*.tar", "file://{}"])
def test_a_folder_or_wildcard_is_its_shards_in_order_whatever_the_gaps(folder, spec):
    assert names(expand_shards(spec.format(folder))) == ["00000.tar", "00002.tar", "00010.tar"]


def test_a_path_with_braces_in_its_name_is_that_path(tmp_path):
    place = tmp_path / "{a,b}"
    place.mkdir()
    (place / "x.tar").touch()
    assert expand_shards(place) == expand_shards(str(place)) == [str(place / "x.tar")]


@pytest.mark.parametrize("form", ["@{}", "{}"])
def test_a_text_file_lists_shards_one_part_a_line(tmp_path, folder, form):
    listed = tmp_path / "shards.txt"
    listed.write_text(f"# ours\n{folder}\n\n  http://host/{{0..1}}.tar  \n")
    found = expand_shards(form.format(listed))
    assert names(found) == ["00000.tar", "00002.tar", "00010.tar", "0.tar", "1.tar"]


def test_a_list_keeps_its_order(folder):
    found = expand_shards([f"{folder}/00010.tar", "http://host/{0..1}.tar", f"{folder}/00000.tar"])
    assert names(found) == ["00010.tar", "0.tar", "1.tar", "00000.tar"]


@pytest.mark.parametrize("spec", ["{}/empty", "{}/*.zip", "{}/missing.txt", "@{}/missing", "{}/nothing.txt"])
def test_what_has_no_shards_is_named(tmp_path, spec):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("# nothing\n")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        expand_shards(spec.format(tmp_path))


def test_no_shards_at_all_and_shards_listed_twice_are_refused(folder):
    with pytest.raises(ValueError, match="no shards"):
        expand_shards([])
    with pytest.raises(ValueError, match=r"00002\.tar is listed twice"):
        expand_shards([str(folder), str(folder / "00002.tar")])


def test_local_shards_and_commands_are_told_apart():
    urls = ("/data/a:b.tar", "file:///data/a.tar", "a.tar", "s3://b/a.tar", "https://h/a.tar", "pipe:cat a.tar")
    assert [is_local(url) for url in urls] == [True, True, True, False, False, False]
    assert [is_pipe(url) for url in urls] == [False] * 5 + [True]
