"""Whether an exported file, and whoever runs it, give the right embeddings; if not, by which mistake.

pmm selftest ARTIFACT|DIR [--backend NAME] [--device DEVICE]       run it here
pmm selftest ARTIFACT --write-images DIR                           the crops, for programs that read files
pmm selftest ARTIFACT --embeddings FILE [--precision PRECISION]    what another program made of them
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pmm.artifacts.bundle import is_bundle, read_bundle
from pmm.runtime.runner_flags import RunnerFlags
from pmm.selftest.judge import describe_verdict
from pmm.selftest.run import judge_embeddings, open_selftest, run_selftest, write_images
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, printable


@dataclass(frozen=True, kw_only=True)
class SelftestCommand:
    """`pmm selftest ARTIFACT`"""

    artifact: Annotated[Path, Arg("ARTIFACT", positional=True)]
    """ONNX file, AOTInductor package or engine, its selftest beside it; or a folder of pmm ship, all of whose files are
    checked first."""
    embeddings: Annotated[Path | None, Arg("FILE")] = None
    """Judge these instead of running the file: what a program made of the crops, a line of numbers for each in their
    order (.csv), or an array (.npy)."""
    precision: Literal["", "fp32", "tf32", "fp16", "bf16", "int8"] = ""
    """Precision that the embeddings were, or are to be, computed in (default: that of the file)."""
    write_images: Annotated[Path | None, Arg("DIR")] = None
    """Write the crops to this new folder, as PNG files whose sorted names are their order, and run nothing."""
    json: bool = False
    """Print the verdict as JSON."""
    running: RunnerFlags = field(default_factory=RunnerFlags)

    def __post_init__(self) -> None:
        other = "--embeddings" if self.embeddings else "--write-images" if self.write_images else ""
        given = [f"--{name}" for name, value in vars(self.running).items() if value != getattr(RunnerFlags, name)]
        if other and given:
            problem = f"{other} runs nothing, so {', '.join(given)} would change nothing"
            raise ConflictingOptions(problem, other, *given, hint="leave it out")
        if self.write_images and (self.embeddings or self.precision or self.json):
            rest = next(f"--{name}" for name in ("embeddings", "precision", "json") if getattr(self, name))
            problem = f"--write-images judges nothing, so {rest} would change nothing"
            raise ConflictingOptions(problem, "--write-images", rest, hint="leave it out")


def main(prog: str) -> int:
    """Entry point: 0 for right embeddings, 1 for others."""
    command = command_line.parse(SelftestCommand, prog=prog, description=__doc__ or "")
    if is_bundle(command.artifact):
        command = _of_bundle(command)
    if command.write_images:
        paths = write_images(open_selftest(command.artifact), command.write_images)
        print(printable(f"{command.write_images}: {', '.join(path.name for path in paths)}"))
        return 0
    if command.embeddings:
        verdict = judge_embeddings(command.artifact, command.embeddings, precision=command.precision)
    else:
        verdict = run_selftest(
            command.artifact,
            command.running.backend,
            device=command.running.device,
            threads=command.running.threads,
            precision=command.precision,
        )
    if command.json:
        print(json.dumps(dataclasses.asdict(verdict), indent=2))
    else:
        print(printable(f"{command.artifact}: {describe_verdict(verdict)}"))
        for line in verdict.advice:
            print(printable(f"  {line}"))
    return 0 if verdict.passed else 1


def _of_bundle(command: SelftestCommand) -> SelftestCommand:
    """The same of the exported file in a folder of pmm ship, which runs as it was measured where nothing else is asked
    for."""
    bundle = read_bundle(command.artifact)
    command = dataclasses.replace(command, artifact=command.artifact / bundle.artifact)
    if command.embeddings or command.write_images or command.running.backend != "auto":
        return command
    running = dataclasses.replace(command.running, backend=bundle.backend)
    return dataclasses.replace(command, running=running, precision=command.precision or bundle.precision)
