import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from pmm.artifacts.artifact import manifest_path, read_manifest
from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.artifacts.native_contracts import EngineContract
from pmm.artifacts.onnx_content import graph_digest
from pmm.data.preprocessing import Preprocessing
from pmm.export import triton as module
from pmm.export.triton import write_model_repository
from pmm.export.triton_config import Serving, model_config
from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, examples, run_here
from tests.refusals import refuses

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
HEIGHT, WIDTH, DIM = 6, 4, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_manifest(**changes) -> Manifest:
    values = {
        "checkpoint_sha256": "c" * 64,
        "method": "pmm",
        "preprocessing": Preprocessing(height=HEIGHT, width=WIDTH, mean=MEAN, std=STD),
        "input": InputContract.of("uint8", "rgb"),
        "embedding": EmbeddingContract(dim=DIM),
        "precision": "fp32",
        "precision_found": "fp32",
        "precision_share": {"fp32": 1.0},
        "macs": 100,
        "opset": 20,
        "versions": {"torch": "2.14.1"},
    }
    return Manifest(**{**values, **changes})


def make_onnx(path: Path, kind="uint8", *, beside=True, inside=False, **changes) -> Path:
    """images -> float -> mean over the pixels -> a matrix product: [batch, DIM]."""
    import onnx
    from onnx import TensorProto, helper

    manifest = make_manifest(**{"input": InputContract.of(kind, "rgb"), **changes})
    nhwc = kind == "uint8"
    shape = ["batch", *manifest.input.shape(manifest.preprocessing)]
    weights = np.arange(3 * DIM, dtype=np.float32).reshape(3, DIM)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["embeddings"]),
    ]
    initialisers = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2] if nhwc else [2, 3]),
        helper.make_tensor("weights", TensorProto.FLOAT, [3, DIM], weights.ravel()),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8 if nhwc else TensorProto.FLOAT, shape)
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM])
    graph = helper.make_graph(nodes, "tiny", [images], [embeddings], initialisers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if inside:
        entry = proto.metadata_props.add()
        of_graph = dataclasses.replace(manifest, graph=graph_digest(proto))
        entry.key, entry.value = "pmm_manifest", of_graph.to_json()
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    if beside:
        write_manifest(path, manifest)
    return path


def make_engine(path: Path, content=b"engine", flavor="tensorrt", batch=(1, 4, 16), more=(), **changes) -> Path:
    engine = EngineContract(
        flavor=flavor,
        version="10.13.3",
        batch=BatchProfiles(tuple(BatchProfile(least=a, best=b, most=c) for a, b, c in (batch, *more))),
        onnx_sha256="0" * 64,
        platform="linux-x86_64",
        gpu="NVIDIA L4",
        compute_capability="8.9",
        hardware_compatibility="none",
        driver="13.0",
        flags=(),
        precision_read_from="parsed network and engine inspector",
    )
    path.write_bytes(content)
    write_manifest(path, make_manifest(engine=engine, **changes))
    return path


def write_manifest(path: Path, manifest: Manifest) -> None:
    manifest_path(path).write_text(dataclasses.replace(manifest, sha256=sha256(path)).to_json())


def parse(text: str):
    """The configuration as Triton's own protobuf definition reads it; an unknown field or word fails."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def as_dict(text: str) -> dict:
    """Every field that is set; parameters as a flat table."""
    config = MessageToDict(parse(text), preserving_proto_field_name=True)
    config["parameters"] = {key: value["string_value"] for key, value in config["parameters"].items()}
    return config


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Scratch folders: hidden, wherever they are."""
    return [str(p) for p in folder.rglob(".*")]


def contract(source: Path, **changes) -> dict[str, str]:
    table = json.loads(manifest_path(source).read_text())["for_clients"]
    values = {
        "pmm_for_clients": json.dumps(table),
        "pmm_sha256": sha256(source),
        "pmm_checkpoint_sha256": "c" * 64,
        "pmm_method": "pmm",
        "pmm_precision": "fp32",
        "pmm_colour": "rgb",
        "pmm_interpolation": "bilinear",
        "pmm_antialias": "true",
        "pmm_padding": "null",
        "pmm_normalised_by": "graph",
        "pmm_mean": "[0.485, 0.456, 0.406]",
        "pmm_std": "[0.229, 0.224, 0.225]",
        "pmm_metric": "euclidean",
        "pmm_embedding_normalised": "false",
    }
    return values | changes


NO_TF32 = {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "cuda", "parameters": {"use_tf32": "0"}}]}}


HEURISTIC = {"cudnn_conv_algo_search": "1"}


def warm_up(*batches, data_type="TYPE_UINT8", dims=("6", "4", "3")):
    black = {"data_type": data_type, "dims": list(dims), "zero_data": True}
    return [{"name": f"batch {batch}", "batch_size": batch, "inputs": {"images": black}} for batch in batches]


def graphs(*ranges):
    return [{"batch_size": most, "graph_lower_bound": {"batch_size": least}} for least, most in ranges]


def test_an_onnx_file_with_uint8_input(tmp_path):
    source = make_onnx(tmp_path / "pmm.onnx")
    done = run_here("export/to_triton.py", source, "--repo", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "pmm"
    assert as_dict((folder / "config.pbtxt").read_text()) == {
        "name": "pmm",
        "backend": "onnxruntime",
        "max_batch_size": 64,
        "input": [
            {"name": "images", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": ["6", "4", "3"]},
        ],
        "output": [{"name": "embeddings", "data_type": "TYPE_FP32", "dims": ["5"]}],
        "instance_group": [{"count": 1}],  # KIND_AUTO is 0, and so not listed
        "dynamic_batching": {"preferred_batch_size": [8, 64], "max_queue_delay_microseconds": "500"},
        "optimization": NO_TF32,
        "model_warmup": warm_up(1, 8, 64),
        "parameters": contract(source, **HEURISTIC),
    }
    assert "kind: KIND_AUTO\n" in (folder / "config.pbtxt").read_text()
    assert sorted(tree(folder)) == ["1/model.onnx", "1/model.onnx.json", "config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == source.read_bytes()
    assert manifest_path(folder / "1" / "model.onnx").read_text() == manifest_path(source).read_text()
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"{folder}: onnxruntime, fp32, max batch 64, input images uint8 [batch, 6, 4, 3], "
        "output embeddings float32 [batch, 5]"
    )
    assert lines[1] == f"serve: tritonserver --model-repository={tmp_path / 'models'}"
    assert "docker run" in lines[2]
    assert len(lines) == 3, "no word of engines where there is none"
    assert not leftovers(tmp_path)


def test_an_onnx_file_with_float_input_and_every_flag(tmp_path):
    source = make_onnx(
        tmp_path / "a.onnx",
        "float",
        input=InputContract.of("float", "bgr"),
        embedding=EmbeddingContract(dim=DIM, normalised=True, metric="cosine"),
    )
    flags = ["--name", "reid.v2", "--max-batch", "6", "--queue-delay-us", "0", "--instances", "3"]
    done = run_here("export/to_triton.py", source, "--repo", tmp_path / "models", *flags)
    assert done.returncode == 0, done.stderr
    config = as_dict((tmp_path / "models" / "reid.v2" / "config.pbtxt").read_text())
    assert config == {
        "name": "reid.v2",
        "backend": "onnxruntime",
        "max_batch_size": 6,
        "input": [{"name": "images", "data_type": "TYPE_FP32", "format": "FORMAT_NCHW", "dims": ["3", "6", "4"]}],
        "output": [{"name": "embeddings", "data_type": "TYPE_FP32", "dims": ["5"]}],
        "instance_group": [{"count": 3}],
        "dynamic_batching": {"preferred_batch_size": [6]},  # a delay of 0 is not listed
        "optimization": NO_TF32,
        "model_warmup": warm_up(1, 6, data_type="TYPE_FP32", dims=["3", "6", "4"]),
        "parameters": contract(
            source,
            **HEURISTIC,
            pmm_colour="bgr",
            pmm_normalised_by="caller",
            pmm_metric="cosine",
            pmm_embedding_normalised="true",
        ),
    }


@pytest.mark.parametrize("suffix", [".plan", ".engine"])
def test_an_engine(tmp_path, suffix):
    source = make_engine(tmp_path / f"pmm{suffix}", precision_found="fp16")
    done = run_here("export/to_triton.py", source, "--repo", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "pmm"
    assert as_dict((folder / "config.pbtxt").read_text()) == {
        "name": "pmm",
        "backend": "tensorrt",
        "max_batch_size": 16,
        "input": [
            {"name": "images", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": ["6", "4", "3"]},
        ],
        "output": [{"name": "embeddings", "data_type": "TYPE_FP32", "dims": ["5"]}],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "dynamic_batching": {"preferred_batch_size": [4, 16], "max_queue_delay_microseconds": "500"},
        "optimization": {
            "cuda": {"graphs": True, "graph_spec": graphs((1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (13, 16))}
        },
        "model_warmup": warm_up(1, 4, 16),
        "parameters": contract(
            source,
            pmm_precision="fp16",
            pmm_tensorrt_version="10.13.3",
            pmm_platform="linux-x86_64",
            pmm_gpu="NVIDIA L4",
            pmm_compute_capability="8.9",
            pmm_hardware_compatibility="none",
        ),
    }
    assert tree(folder)["1/model.plan"] == b"engine"
    assert read_manifest(folder / "1" / "model.plan", sha256(folder / "1" / "model.plan")) is not None
    assert "TensorRT is 10.13.3" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("asked", "preferred"), [(2, [2]), (4, [4]), (10, [4, 10]), (16, [4, 16])])
def test_an_engine_may_be_served_with_smaller_batches(tmp_path, asked, preferred):
    source = make_engine(tmp_path / "pmm.plan")
    [(_, model)] = write_model_repository([source], tmp_path / "models", serving=Serving(max_batch=asked))
    config = parse(model.config)
    assert config.max_batch_size == asked
    assert list(config.dynamic_batching.preferred_batch_size) == preferred


@pytest.mark.parametrize("batch", [(1, 1, 1), (1, 4, 16), (1, 7, 10), (1, 8, 64), (1, 65, 100), (1, 96, 256)])
def test_every_batch_up_to_64_and_those_that_the_batcher_prefers_run_as_one_graph(tmp_path, batch):
    """By the rules of ValidateGraphSpec and FindClosestCudaGraph in the backend's instance_state.cc."""
    source = make_engine(tmp_path / "pmm.plan", batch=batch)
    [(_, model)] = write_model_repository([source], tmp_path / "models")
    config = parse(model.config)
    specs = [(spec.graph_lower_bound.batch_size, spec.batch_size) for spec in config.optimization.cuda.graph_spec]
    assert all(1 <= least <= most <= config.max_batch_size for least, most in specs)
    assert len(specs) <= 14
    for size in (*range(1, min(batch[2], 64) + 1), *config.dynamic_batching.preferred_batch_size):
        assert sum(least <= size <= most for least, most in specs) == 1
    assert [warm.batch_size for warm in config.model_warmup] == sorted(set(batch))


def test_an_engine_of_several_profiles_is_served_with_all_of_them(tmp_path):
    """Triton's model configuration: without `profile`, an instance has the first one alone."""
    source = make_engine(tmp_path / "pmm.plan", batch=(1, 1, 4), more=[(1, 8, 64)])
    [(_, model)] = write_model_repository([source], tmp_path / "models")
    config = as_dict(model.config)
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "profile": ["0", "1"]}]
    assert config["model_warmup"] == warm_up(1, 8, 64)
    assert config["max_batch_size"] == 64
    gap = make_engine(tmp_path / "gap.plan", batch=(1, 1, 1), more=[(4, 8, 64)])
    with refuses(InvalidFile, "2 images", path=gap, hint="--batch 1 1 1 --batch 2 8 64"):
        write_model_repository([gap], tmp_path / "models")


def test_bf16_needs_a_gpu(tmp_path):
    source = make_onnx(tmp_path / "pmm.onnx", precision="bf16", precision_found="bf16")
    [(_, model)] = write_model_repository([source], tmp_path / "models")
    assert as_dict(model.config)["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_the_copy_runs_as_its_configuration_says(tmp_path, kind):
    import onnxruntime as ort

    [(artifact, model)] = write_model_repository([make_onnx(tmp_path / "a.onnx", kind)], tmp_path / "models")
    config = parse(model.config)
    session = ort.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    dtype = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}[as_dict(model.config)["input"][0]["data_type"]]
    for batch in (1, 3):
        images = np.ones((batch, *config.input[0].dims), dtype)
        (embeddings,) = session.run([config.output[0].name], {config.input[0].name: images})
        assert embeddings.shape == (batch, *config.output[0].dims)
        assert embeddings.dtype == np.float32


def test_a_manifest_inside_the_onnx_file_does(tmp_path):
    source = make_onnx(tmp_path / "pmm.onnx", beside=False, inside=True)
    [(artifact, model)] = write_model_repository([source], tmp_path / "models")
    assert as_dict(model.config)["parameters"]["pmm_sha256"] == sha256(source)
    manifest = read_manifest(artifact.path, sha256(source))
    assert manifest == artifact.manifest
    assert manifest.sha256 == sha256(source)


def test_several_models_and_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    onnx_file, engine = make_onnx(tmp_path / "pmm.onnx"), make_engine(tmp_path / "pmm.plan")
    other = make_onnx(tmp_path / "b" / "..my  pérson model!.onnx")
    write_model_repository([onnx_file, engine, other], tmp_path / "models")
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["my-p-rson-model", "pmm-onnx", "pmm-trt"]
    for folder in (tmp_path / "models").iterdir():
        assert parse((folder / "config.pbtxt").read_text()).name == folder.name
    write_model_repository([onnx_file, engine], tmp_path / "named", name="x")
    assert sorted(p.name for p in (tmp_path / "named").iterdir()) == ["x-onnx", "x-trt"]


def test_a_file_name_without_a_single_allowed_character(tmp_path):
    write_model_repository([make_onnx(tmp_path / "人.onnx")], tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model"]


def test_the_same_artifacts_give_the_same_bytes(tmp_path):
    source = make_onnx(tmp_path / "pmm.onnx")
    for out in ("one", "two"):
        write_model_repository([source], tmp_path / out)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# --- the text format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['a "quoted" \\ name', "line\nbreak\ttab\r\0", "pérson 人", "'", "\\n", "\x7f", ""])
def test_strings_are_escaped(text):
    manifest = make_manifest(method=text)
    config = model_config("m", "onnxruntime", manifest, 8, Serving())
    assert config.isascii()
    assert parse(config).parameters["pmm_method"].string_value == text


@examples(200)
@given(st.text(), st.text(), st.text(), st.text())
def test_any_string_survives_the_round_trip(name, method, images, embeddings):
    manifest = make_manifest(
        method=method,
        input=dataclasses.replace(InputContract.of("float", "rgb"), name=images),
        embedding=EmbeddingContract(dim=DIM, name=embeddings),
    )
    config = parse(model_config(name, "onnxruntime", manifest, 8, Serving()))
    assert (config.name, config.parameters["pmm_method"].string_value) == (name, method)
    assert (config.input[0].name, config.output[0].name) == (images, embeddings)


@examples(100)
@given(
    st.tuples(*[st.integers(1, 2**31 - 1)] * 3).map(sorted),
    st.integers(1, 2**31 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(1, 2**31 - 1),
)
def test_any_numbers_that_are_let_in_are_kept_and_allowed_by_triton(batch, most, delay, instances):
    serving = Serving(max_batch=most, queue_delay_us=delay, instances=instances)
    config = parse(model_config("m", "onnxruntime", make_manifest(), most, serving))
    assert config.max_batch_size == most
    assert config.dynamic_batching.max_queue_delay_microseconds == delay
    assert config.instance_group[0].count == instances
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert max(preferred) == most
    assert min(preferred) == min(8, most)


@examples(200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0")))
def test_any_file_name_becomes_an_allowed_model_name(stem):
    assert module.NAME.fullmatch(module._clean(stem))
    assert module._clean(module._clean(stem)) == module._clean(stem)


def test_half_a_surrogate_pair_does_not_break_the_export():
    parse(model_config("m", "onnxruntime", make_manifest(method="\ud800"), 8, Serving()))


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, *args, expected: tuple[str, ...]) -> None:
    before = tree(tmp_path)
    done = run_here("export/to_triton.py", *args, "--repo", tmp_path / "deep" / "models")
    assert_one_line_error(done, *expected)
    assert tree(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def test_no_model(tmp_path):
    refused(tmp_path, expected=("MODEL", "--help"))


def test_no_repository(tmp_path):
    assert_one_line_error(run_here("export/to_triton.py", make_onnx(tmp_path / "a.onnx")), "--repo")


def test_a_checkpoint(tmp_path):
    (tmp_path / "best.pth").write_bytes(b"weights")
    refused(tmp_path, tmp_path / "best.pth", expected=("best.pth", "pmm export onnx"))


@pytest.mark.parametrize("file", ["none.onnx", "none.plan"])
def test_a_file_that_is_not_there(tmp_path, file):
    refused(tmp_path, tmp_path / file, expected=(file, "does not exist"))


def test_files_without_a_manifest(tmp_path):
    refused(tmp_path, make_onnx(tmp_path / "a.onnx", beside=False), expected=("a.onnx", "pmm export onnx"))
    (tmp_path / "a.plan").write_bytes(b"engine")
    refused(tmp_path, tmp_path / "a.plan", expected=("a.plan", "manifest", "a.plan.json"))


def test_an_engine_with_the_manifest_of_an_onnx_file(tmp_path):
    (tmp_path / "a.plan").write_bytes(b"engine")
    write_manifest(tmp_path / "a.plan", make_manifest())
    refused(tmp_path, tmp_path / "a.plan", expected=("a.plan", "manifest", "engine"))


@pytest.mark.parametrize("make", [make_onnx, make_engine])
def test_a_file_that_was_changed(tmp_path, make):
    source = make(tmp_path / ("a.onnx" if make is make_onnx else "a.plan"))
    manifest = json.loads(manifest_path(source).read_text())
    manifest_path(source).write_text(json.dumps(manifest | {"sha256": "f" * 64}))
    refused(tmp_path, source, expected=(source.name, "sha256", "changed or replaced"))


def test_an_rtx_engine(tmp_path):
    source = make_engine(tmp_path / "a.plan", flavor="rtx")
    refused(tmp_path, source, expected=("a.plan", "TensorRT-RTX", "ONNX file", "--flavor tensorrt"))


def test_an_engine_that_takes_no_single_image(tmp_path):
    source = make_engine(tmp_path / "a.plan", batch=(2, 4, 16))
    refused(tmp_path, source, expected=("a.plan", "batches of 2 to 16", "--batch 1 4 16"))


def test_batches_larger_than_the_engine(tmp_path):
    source = make_engine(tmp_path / "a.plan")
    refused(
        tmp_path, source, "--max-batch", "17", expected=("--max-batch is 17", "at most 16", "a.plan", "--batch 1 4 17")
    )


@pytest.mark.parametrize("name", ["a b", "../up", ".hidden", "-x", "a/b", "é", "a\n"])
def test_impossible_names(tmp_path, name):
    refused(tmp_path, make_onnx(tmp_path / "a.onnx"), f"--name={name}", expected=("--name", "expected letters"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-batch", "0"),
        ("--max-batch", "-1"),
        ("--max-batch", str(2**31)),
        ("--queue-delay-us", "-1"),
        ("--queue-delay-us", str(2**31)),
        ("--instances", "0"),
        ("--instances", "x"),
    ],
)
def test_impossible_numbers(tmp_path, flag, value):
    refused(tmp_path, make_onnx(tmp_path / "a.onnx"), f"{flag}={value}", expected=(flag, value))


def test_two_models_that_no_suffix_tells_apart(tmp_path):
    (tmp_path / "b").mkdir()
    first, second = make_onnx(tmp_path / "a.onnx"), make_onnx(tmp_path / "b" / "a.onnx")
    refused(tmp_path, first, second, expected=(str(first), str(second), "model 'a-onnx'", "--name"))
    engine, third = make_engine(tmp_path / "a.plan"), make_onnx(tmp_path / "a-onnx.onnx")
    refused(tmp_path, first, engine, third, expected=("model 'a-onnx'",))


def test_types_that_triton_has_no_name_for(tmp_path):
    source = make_onnx(tmp_path / "a.onnx", embedding=EmbeddingContract(dim=DIM, dtype="float8"))
    refused(tmp_path, source, expected=("float8", "expected uint8 or float32"))


def test_nothing_is_written_if_one_of_several_is_refused(tmp_path):
    good, bad = make_onnx(tmp_path / "a.onnx"), make_engine(tmp_path / "b.plan", flavor="rtx")
    refused(tmp_path, good, bad, expected=("b.plan",))
    write_model_repository([make_onnx(tmp_path / "z.onnx")], tmp_path / "models")
    with refuses(CannotWrite, "exists", path=tmp_path / "models" / "z", hint="--overwrite"):
        write_model_repository([good, tmp_path / "z.onnx"], tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["z"]


def test_a_repository_that_is_a_file(tmp_path):
    source, repository = make_onnx(tmp_path / "a.onnx"), tmp_path / "models"
    repository.write_text("mine")
    assert_one_line_error(run_here("export/to_triton.py", source, "--repo", repository), str(repository))
    assert repository.read_text() == "mine"


# --- replacing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def old_and_new(tmp_path):
    """A repository that holds model m, and another artifact to become m."""
    write_model_repository([make_onnx(tmp_path / "old.onnx")], tmp_path / "models", name="m")
    return tmp_path / "models", make_engine(tmp_path / "new.plan", b"new engine")


def test_an_existing_model_is_kept(old_and_new):
    repository, new = old_and_new
    before = tree(repository)
    done = run_here("export/to_triton.py", new, "--repo", repository, "--name", "m")
    assert_one_line_error(done, str(repository / "m"), "exists", "--overwrite")
    assert tree(repository) == before


def test_an_existing_model_is_replaced_as_a_whole(old_and_new):
    repository, new = old_and_new
    done = run_here("export/to_triton.py", new, "--repo", repository, "--name", "m", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert sorted(tree(repository)) == ["m/1/model.plan", "m/1/model.plan.json", "m/config.pbtxt"]
    assert parse((repository / "m" / "config.pbtxt").read_text()).backend == "tensorrt"
    assert not leftovers(repository.parent)


def test_the_artifact_in_the_repository_can_be_written_over_itself(old_and_new):
    repository, _ = old_and_new
    before = tree(repository)
    served = repository / "m" / "1" / "model.onnx"
    write_model_repository([served], repository, name="m", overwrite=True)
    assert tree(repository) == before


@pytest.mark.parametrize("place", ["write", "rename away", "rename in"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_model_whole(old_and_new, monkeypatch, place, error):
    repository, new = old_and_new
    before, calls = tree(repository), []

    def failing(real, due):
        def call(*args):
            calls.append(args)
            if len(calls) == due:
                raise error
            return real(*args)

        return call

    if place == "write":
        monkeypatch.setattr(module, "_put", failing(module._put, 2))
    else:
        monkeypatch.setattr(Path, "rename", failing(Path.rename, 1 if place == "rename away" else 2))
    with pytest.raises(CannotWrite if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write_model_repository([new], repository, name="m", overwrite=True)
    monkeypatch.undo()
    assert calls
    if isinstance(error, OSError):
        assert str(repository / "m") in str(raised.value)
        assert "No space left" in str(raised.value)
    assert tree(repository) == before
    assert not leftovers(repository.parent)


def test_a_failure_leaves_no_part_of_a_new_model(tmp_path, monkeypatch):
    def full(path, content):
        if path.name == "config.pbtxt":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(module, "_put", full)
    done = run_here("export/to_triton.py", make_onnx(tmp_path / "a.onnx"), "--repo", tmp_path / "models")
    assert_one_line_error(done, str(tmp_path / "models" / "a"), "No space left")
    assert list((tmp_path / "models").iterdir()) == []
    assert not leftovers(tmp_path)


def test_an_old_model_that_cannot_be_put_back_is_not_deleted(old_and_new, monkeypatch):
    repository, new = old_and_new
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return real(self, target)

    before = tree(repository / "m")
    monkeypatch.setattr(Path, "rename", rename)
    with refuses(CannotWrite, "Input/output error", path=repository / "m"):
        write_model_repository([new], repository, name="m", overwrite=True)
    monkeypatch.undo()
    [scratch] = repository.parent.glob(".m.*")
    assert tree(scratch / "old" / "m") == before


def test_a_server_never_sees_a_part(old_and_new, monkeypatch):
    """While the files are written, the repository holds the old model and no other folder."""
    repository, new = old_and_new
    seen, put = [], module._put

    def watched(path, content):
        seen.append(sorted(p.name for p in repository.iterdir()))
        put(path, content)

    monkeypatch.setattr(module, "_put", watched)
    write_model_repository([new], repository, name="m", overwrite=True)
    assert seen == [["m"]] * 3


def test_where_nothing_can_be_written_beside_the_repository(old_and_new, monkeypatch):
    repository, new = old_and_new
    monkeypatch.setattr(module.os, "access", lambda path, mode: path != repository.parent)
    write_model_repository([new], repository, name="m", overwrite=True)
    assert parse((repository / "m" / "config.pbtxt").read_text()).backend == "tensorrt"
    assert not leftovers(repository.parent)


def test_folders_that_hold_more_are_not_replaced(old_and_new):
    repository, new = old_and_new
    for extra in ("2/model.onnx", "labels.txt", "1/notes"):
        path = repository / "m" / extra
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = tree(repository)
        done = run_here("export/to_triton.py", new, "--repo", repository, "--name", "m", "--overwrite")
        assert_one_line_error(done, "did not write", str(repository / "m" / extra.partition("/")[0]))
        assert tree(repository) == before
        path.unlink()
        if path.parent.name == "2":
            path.parent.rmdir()


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_names_that_are_taken_by_something_else(tmp_path, kind):
    source, repository = make_onnx(tmp_path / "a.onnx"), tmp_path / "models"
    repository.mkdir()
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        (repository / "a").write_text("mine")
    else:
        (repository / "a").symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with refuses(CannotWrite, "not a folder", path=repository / "a"):
        write_model_repository([source], repository, overwrite=True)
    with refuses(CannotWrite, "exists", path=repository / "a"):
        write_model_repository([source], repository)
    assert [p.name for p in repository.iterdir()] == ["a"]


def test_the_model_is_readable_by_the_user_that_the_server_runs_as(tmp_path):
    write_model_repository([make_onnx(tmp_path / "a.onnx")], tmp_path / "models")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    folder = tmp_path / "models" / "a"
    for made, plain in ((folder, "plain"), (folder / "1", "plain"), (folder / "1" / "model.onnx", "plain/file")):
        assert made.stat().st_mode == (tmp_path / plain).stat().st_mode


def test_help_and_a_relative_repository(tmp_path):
    done = run_here("export/to_triton.py", "--help")
    assert done.returncode == 0
    for flag in ("--repo", "--name", "--max-batch", "--queue-delay-us", "--instances", "--overwrite"):
        assert flag in done.stdout
    source = make_onnx(tmp_path / "a.onnx")
    done = run_here("export/to_triton.py", source.name, "--repo", "my models", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("my models/a: ")
    assert f"--model-repository='{tmp_path}/my models'" in done.stdout
