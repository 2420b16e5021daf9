import dataclasses

from pmm.presets import preset
from pmm.training.data_setup import check_unchanged
from pmm.utils.errors import ConflictingOptions
from tests.refusals import refuses


def test_a_run_goes_on_where_its_data_were_moved_but_not_with_others(tmp_path, monkeypatch):
    def config(root):
        return dataclasses.replace(preset("tiny"), data=dataclasses.replace(preset("tiny").data, root=str(root)))

    run = tmp_path / "runs" / "first"
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    check_unchanged(run, config("data"), config(tmp_path / "data"))  # the same folder
    with refuses(ConflictingOptions, run, "data.root: data -> ", tmp_path / "other", options=("--resume",)):
        check_unchanged(run, config("data"), config(tmp_path / "other"))
    (tmp_path / "data").rename(tmp_path / "other")
    check_unchanged(run, config("data"), config(tmp_path / "other"))
    longer = dataclasses.replace(config("other"), recipe=dataclasses.replace(preset("tiny").recipe, epochs=9))
    with refuses(ConflictingOptions, run, "recipe.epochs: ", " -> 9", options=("--resume",)) as changed:
        check_unchanged(run, config("data"), longer)
    assert "data.root" not in str(changed.value)
