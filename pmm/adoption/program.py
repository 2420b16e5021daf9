"""A user's nn.Module -> its network as a graph of operators, proved to compute the same."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pmm.adoption.embeddings import EmbeddingNetwork, check_shape, choose_output, outputs_of
from pmm.adoption.probes import BATCHES, UNIT_NORM, alike, check_batches, check_numbers, probes
from pmm.adoption.user_code import CannotAdopt, is_user_code, line_of, user_code
from pmm.data.preprocessing import Preprocessing
from pmm.models.adopted import AdoptedNetwork
from pmm.models.graph_json import graph_from_json, graph_to_json
from pmm.models.graph_passes import attention_of_heads
from pmm.runtime.torch_graph import quiet
from pmm.utils.errors import reason_of

TRACED = 3
"""Images that it is exported with: a number that no code singles out."""
ONNX_HINT = "or export it to ONNX yourself, and adopt that file"
BATCH_CAUSES = "its code makes a plain number of the batch, or branches on it"
BATCH_HINT = "leave x.shape[0] as it is, without int(), len() or if, and write x.view(x.shape[0], -1) or x.flatten(1)"


@dataclass(frozen=True, kw_only=True)
class TracedNetwork:
    """A network as a graph, and what was noticed."""

    network: AdoptedNetwork
    read: frozenset[str]
    """Names in the module's state dict of the weights that the embeddings need."""
    notes: tuple[str, ...]


def trace(
    module: nn.Module, size: Preprocessing, *, output: str = "", bgr: bool = False, cosine: bool = False
) -> TracedNetwork:
    """The network of `module`, in eval mode and in fp32 on the CPU, for RGB images as `size` has them.

    Args:
        module: images [N, 3, H, W] -> embeddings [N, D], or several outputs.
        output: the name or index of that to take, if there are several.
        bgr: the module takes BGR.
        cosine: embeddings are to have norm 1.

    Raises CannotAdopt for a module that raises, makes no embeddings, behaves otherwise in batches or each time, or
    cannot be exported; InvalidValue for an output that it does not have.
    """
    notes = []
    module = module.eval()
    crops = probes(size)[: max(BATCHES)]
    noise = torch.randn(crops.shape[0], 3, size.height, size.width, generator=torch.Generator().manual_seed(0))
    batches = [noise, torch.from_numpy(size.normalise(crops))]
    with torch.no_grad(), quiet():
        value = _run(module, batches[1][:2])
        name = choose_output(value, output)
        chosen = outputs_of(value)[name]
        check_shape(chosen, 2)
        if chosen.dim() == 4:
            notes.append(f"its output {list(chosen.shape)} is taken as {list(chosen.flatten(1).shape)}")
        normalise = cosine and not _has_unit_norm(chosen.flatten(1))
        wrapped = EmbeddingNetwork(module, name, bgr=bgr, normalise=normalise).eval()
        expected = [[_run(wrapped, images[:count].clone()) for count in BATCHES] for images in batches]
        notes += _check_behaviour(wrapped, batches[1], expected[1])
        graph, names = _with_own_names(_exported(wrapped, noise[:TRACED]))
        try:
            network = AdoptedNetwork(
                graph_from_json(*graph_to_json(graph)),
                (size.height, size.width),
                normalised=all(_has_unit_norm(each) for each in (expected[0][-1], expected[1][-1])),
            )
        except ValueError as error:
            raise CannotAdopt(
                f"it needs what the file cannot hold: {error}", hint=f"write it otherwise, {ONNX_HINT}"
            ) from error
        for images, results in zip(batches, expected, strict=True):
            for count, result in zip(BATCHES, results, strict=True):
                if not torch.equal(network(images[:count]), result):
                    raise CannotAdopt(
                        f"what torch.export makes of it computes something else for {count} images",
                        path=_line_on_batch(wrapped, noise, one=True) or _line_of_forward(module),
                        hint=f"does its code look at values or at the batch? write it otherwise, {ONNX_HINT}",
                    )
    state = module.state_dict()
    places = {_place(state[name]) for name in names if name in state}
    read = frozenset(name for name, tensor in state.items() if _place(tensor) in places)
    return TracedNetwork(network=network, read=read, notes=tuple(notes))


def _run(module: nn.Module, images: Tensor) -> Tensor:
    shape = list(images.shape)
    hint = "it must take any number of float32 images [N, 3, H, W] of this size, and run on the CPU (without .cuda())"
    with user_code(f"its network fails on images {shape}:", _line_of_forward(module) or "", hint=hint):
        return module(images)


def _line_of_forward(module: nn.Module) -> str | None:
    """None if it is no user's code."""
    code = getattr(type(module).forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code and is_user_code(code.co_filename) else None


def _check_behaviour(module: nn.Module, images: Tensor, results: list[Tensor]) -> list[str]:
    """What to say of the embeddings of unlike `images`, which `results` are. Raises CannotAdopt if they are not the
    same each time, depend on the others of a batch, or are not finite."""
    for count, result in zip(BATCHES, results, strict=True):
        check_shape(result, count)
    *fewer, all_of_them = [result.numpy() for result in results]
    check_numbers(all_of_them, "its embeddings", CannotAdopt)
    if not torch.equal(_run(module, images.clone()), results[-1]):
        hint = "dropout in its forward must follow self.training, as nn.Dropout does"
        raise CannotAdopt("it gives other embeddings each time, for the same images", hint=hint)

    def refuse_one(problem: str, *, expected: str, hint: str) -> CannotAdopt:
        if line := _line_on_batch(module, images, one=True):
            return CannotAdopt(f"it treats one image otherwise: {BATCH_CAUSES}", path=line, hint=BATCH_HINT)
        return CannotAdopt(problem, expected=expected, hint=hint)

    one, *others = fewer
    check_batches(all_of_them, others, CannotAdopt)
    check_batches(all_of_them, [one], refuse_one)
    return [f"warning: {words}"] if (words := alike(all_of_them)) else []


def _export(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _exported(module: EmbeddingNetwork, images: Tensor) -> fx.GraphModule:
    try:
        # what writes into its input becomes what does not, and dropout goes
        program = _export(module, images).run_decompositions({})
    except Exception as error:  # a dozen kinds
        raise _refusal(error, module, images) from error
    written = program.graph_signature.buffers_to_mutate
    if written:
        names = ", ".join(str(name).removeprefix("module.") for name in written.values())
        hint = "is a batch-norm in training mode? call eval() where it is made, and do not undo it in forward"
        raise CannotAdopt(f"it changes itself when it runs: {names[:200]}", hint=hint)
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for node in list(graph.graph.nodes):  # of a network that writes into its images, which are its caller's
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder" and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    return attention_of_heads(graph)


def _refusal(error: Exception, module: EmbeddingNetwork, images: Tensor) -> CannotAdopt:
    """What torch.export did not manage, at the line of the user's code."""
    text, forward = str(error), _line_of_forward(module.module)
    if "specialized" in text or "Constraints violated" in text:
        numbers = "one number" if "specialized" in text else "some numbers"
        return CannotAdopt(
            f"it works for {numbers} of images only: {BATCH_CAUSES}",
            path=_line_on_batch(module, images, one=False) or forward,
            hint=BATCH_HINT,
        )
    place = line_of(error) or forward
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return CannotAdopt(
            "what it computes depends on the values of the images, which cannot be exported",
            path=place,
            hint=f"write it without looking at values (torch.where in place of if), {ONNX_HINT}",
        )
    reason = re.split(r"\.\s+(?=[A-Z])", reason_of(error))[0]  # what follows is for those who know torch
    return CannotAdopt(
        f"torch.export cannot follow it ({type(error).__name__}: {reason})",
        path=place,
        hint=f"write it otherwise, {ONNX_HINT}",
    )


def _line_on_batch(module: nn.Module, images: Tensor, *, one: bool) -> str | None:
    """The first line of the user's code that restricts the number of images; if `one`, also to more than one, which
    torch takes for granted."""
    import torch.fx.experimental._config as config

    with _lines_of_guards() as lines, suppress(Exception), config.patch(backed_size_oblivious=one):  # type: ignore[attr-defined]
        _export(module, images[:TRACED])
    return lines[0] if lines else None


@contextmanager
def _lines_of_guards() -> Iterator[list[str]]:
    """Lines of the user's code that restrict a size, as torch logs them."""
    lines: list[str] = []

    class GuardListener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match(r"eval .*\[guard added\]", record.getMessage()):
                stack = traceback.extract_stack()[:-1]
                begin = max(at for at, frame in enumerate(stack) if frame.filename == __file__)
                own = [frame for frame in stack[begin:] if is_user_code(frame.filename)]
                if own:
                    lines.append(f"{own[-1].filename}:{own[-1].lineno}")

    logger, listener = logging.getLogger("torch.fx.experimental.symbolic_shapes"), GuardListener()
    level, handlers, propagate = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _with_own_names(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """`graph` whose tensors have the names that they have in the module, as far as a file can have them, and those
    names in the module."""
    tensors: dict[str, Tensor] = {}
    names = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner, _, last = str(node.target).rpartition(".")
            value = getattr(graph.get_submodule(owner), last)
            names.append(str(node.target).removeprefix("module."))
            name = re.sub(r"[^A-Za-z0-9_.]", "_", names[-1])
            while tensors.get(name, value) is not value:
                name += "_"
            tensors[name] = value
            node.target = name
    return fx.GraphModule(tensors, graph.graph), names


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _has_unit_norm(embeddings: Tensor) -> bool:
    return bool(((embeddings.norm(dim=1) - 1).abs() < UNIT_NORM).all())
