from pmm.artifacts.dataset_location import resolve_data_root


def test_a_relative_root_is_found_from_the_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "work" / "runs" / "demo" / "data").mkdir(parents=True)
    checkpoint = tmp_path / "work" / "runs" / "demo" / "best.pth"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resolve_data_root("runs/demo/data", checkpoint) == str(tmp_path / "work" / "runs" / "demo" / "data")
    assert resolve_data_root("runs/other", checkpoint) == "runs/other"
    assert resolve_data_root("", checkpoint) == ""
    assert resolve_data_root(str(tmp_path / "none"), checkpoint) == str(tmp_path / "none")
    # what is there, seen from here, is meant
    (elsewhere / "runs" / "demo" / "data").mkdir(parents=True)
    assert resolve_data_root("runs/demo/data", checkpoint) == "runs/demo/data"
