"""The README's commands, as tests run them."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def commands() -> list[str]:
    """In the order of the README, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def is_too_large(command: str) -> bool:
    """It wants ImageNet weights and 32 identities: its flags are tried."""
    return re.search("--preset (paper|strong)", command) is not None


def on_fixtures(command: str, people: Path) -> str:
    """With the synthetic `people` for a user's data, and the run of the commands before for the one on it."""
    command = command.replace("/path/to/market1501", str(people)).replace("runs/market/", "runs/first/")
    return command.replace("/path/to/person.jpg", str(next((people / "query").iterdir())))
