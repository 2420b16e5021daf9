import dataclasses

import pytest

from pmm.config import preset
from pmm.training.data_setup import refuse_changes
from pmm.utils.errors import UserError


def test_a_run_goes_on_where_its_data_were_moved_but_not_with_others(tmp_path, monkeypatch):
    def config(root):
        return dataclasses.replace(preset("tiny"), data=dataclasses.replace(preset("tiny").data, root=str(root)))

    run = tmp_path / "runs" / "first"
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse_changes(run, config("data"), config(tmp_path / "data"))  # the same folder
    with pytest.raises(UserError, match=r"data.root: data -> .*other"):
        refuse_changes(run, config("data"), config(tmp_path / "other"))
    (tmp_path / "data").rename(tmp_path / "other")
    refuse_changes(run, config("data"), config(tmp_path / "other"))
    longer = dataclasses.replace(config("other"), recipe=dataclasses.replace(preset("tiny").recipe, epochs=9))
    with pytest.raises(UserError, match=r"\(recipe.epochs: "):
        refuse_changes(run, config("data"), longer)
