"""The protocol's messages, made from the table below in a descriptor pool of their own.

Names and numbers of fields are those of the Open Inference Protocol and of Triton's extensions to it. What a client
sends beyond them is skipped, as protobuf does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
_TABLE = """
ServerLiveRequest
ServerLiveResponse: live=1 bool
ServerReadyRequest
ServerReadyResponse: ready=1 bool
ModelReadyRequest: name=1 string, version=2 string
ModelReadyResponse: ready=1 bool
ServerMetadataRequest
ServerMetadataResponse: name=1 string, version=2 string, extensions=3 *string
ModelMetadataRequest: name=1 string, version=2 string
ModelMetadataResponse: name=1 string, versions=2 *string, platform=3 string, inputs=4 *TensorMetadata, outputs=5 *TensorMetadata
ModelMetadataResponse.TensorMetadata: name=1 string, datatype=2 string, shape=3 *int64
InferParameter: parameter_choice{bool_param=1 bool, int64_param=2 int64, string_param=3 string, double_param=4 double, uint64_param=5 uint64}
InferTensorContents: bool_contents=1 *bool, int_contents=2 *int32, int64_contents=3 *int64, uint_contents=4 *uint32, uint64_contents=5 *uint64, fp32_contents=6 *float, fp64_contents=7 *double, bytes_contents=8 *bytes
ModelInferRequest: model_name=1 string, model_version=2 string, id=3 string, parameters=4 map InferParameter, inputs=5 *InferInputTensor, outputs=6 *InferRequestedOutputTensor, raw_input_contents=7 *bytes
ModelInferRequest.InferInputTensor: name=1 string, datatype=2 string, shape=3 *int64, parameters=4 map InferParameter, contents=5 InferTensorContents
ModelInferRequest.InferRequestedOutputTensor: name=1 string, parameters=2 map InferParameter
ModelInferResponse: model_name=1 string, model_version=2 string, id=3 string, parameters=4 map InferParameter, outputs=5 *InferOutputTensor, raw_output_contents=6 *bytes
ModelInferResponse.InferOutputTensor: name=1 string, datatype=2 string, shape=3 *int64, parameters=4 map InferParameter, contents=5 InferTensorContents
ModelStreamInferResponse: error_message=1 string, infer_response=2 ModelInferResponse
ModelConfigRequest: name=1 string, version=2 string
ModelConfigResponse: config=1 ModelConfig
ModelConfig: name=1 string, platform=2 string, max_batch_size=4 int32, input=5 *ModelInput, output=6 *ModelOutput, dynamic_batching=11 ModelDynamicBatching, backend=17 string
ModelInput: name=1 string, data_type=2 DataType, dims=4 *int64
ModelOutput: name=1 string, data_type=2 DataType, dims=3 *int64
ModelDynamicBatching: max_queue_delay_microseconds=2 uint64
ModelStatisticsRequest: name=1 string, version=2 string
StatisticDuration: count=1 uint64, ns=2 uint64
InferStatistics: success=1 StatisticDuration, fail=2 StatisticDuration, queue=3 StatisticDuration, compute_input=4 StatisticDuration, compute_infer=5 StatisticDuration, compute_output=6 StatisticDuration, cache_hit=7 StatisticDuration, cache_miss=8 StatisticDuration
InferBatchStatistics: batch_size=1 uint64, compute_input=2 StatisticDuration, compute_infer=3 StatisticDuration, compute_output=4 StatisticDuration
ModelStatistics: name=1 string, version=2 string, last_inference=3 uint64, inference_count=4 uint64, execution_count=5 uint64, inference_stats=6 InferStatistics, batch_stats=7 *InferBatchStatistics
ModelStatisticsResponse: model_stats=1 *ModelStatistics
ModelRepositoryParameter: parameter_choice{bool_param=1 bool, int64_param=2 int64, string_param=3 string, bytes_param=4 bytes}
RepositoryIndexRequest: repository_name=1 string, ready=2 bool
RepositoryIndexResponse: models=1 *ModelIndex
RepositoryIndexResponse.ModelIndex: name=1 string, version=2 string, state=3 string, reason=4 string
RepositoryModelLoadRequest: repository_name=1 string, model_name=2 string, parameters=3 map ModelRepositoryParameter
RepositoryModelLoadResponse
RepositoryModelUnloadRequest: repository_name=1 string, model_name=2 string, parameters=3 map ModelRepositoryParameter
RepositoryModelUnloadResponse
"""  # noqa: E501
_ENUM = "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL, "int32": _Field.TYPE_INT32, "int64": _Field.TYPE_INT64, "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64, "float": _Field.TYPE_FLOAT, "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES,
}  # fmt: skip


def _fields(text: str) -> Iterator[tuple[str, int, str, str]]:
    """Name, number, kind (empty, `*` or `map`), type."""
    for part in filter(None, text.split(", ")):
        name, _, rest = part.partition("=")
        number, *words = rest.split()
        kind = "map" if words[0] == "map" else "*" if words[0].startswith("*") else ""
        yield name, int(number), kind, words[-1].lstrip("*")


def _add_field(message: Any, path: str, field: tuple[str, int, str, str], nested: set[str]) -> Any:
    name, number, kind, type_name = field
    added = message.field.add(name=name, number=number, label=_Field.LABEL_REPEATED if kind else _Field.LABEL_OPTIONAL)
    if type_name in _SCALARS:
        added.type = _SCALARS[type_name]
    elif type_name == "DataType":
        added.type, added.type_name = _Field.TYPE_ENUM, f".{PACKAGE}.DataType"
    else:
        added.type = _Field.TYPE_MESSAGE
        inside = f"{path}.{type_name}"
        added.type_name = f".{PACKAGE}.{inside if inside in nested else type_name}"
    if kind == "map":
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
        entry.field.add(
            name="value", number=2, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_MESSAGE, type_name=added.type_name
        )
        added.type_name = f".{PACKAGE}.{path}.{entry.name}"
    return added


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="millrace/inference.proto", package=PACKAGE, syntax="proto3")
    enum = file.enum_type.add(name="DataType")
    for number, name in enumerate(_ENUM.split()):
        enum.value.add(name=f"TYPE_{name}", number=number)
    lines = [line.partition(":") for line in _TABLE.strip().splitlines()]
    nested = {path for path, _, _ in lines if "." in path}
    messages: dict[str, Any] = {}
    for path, _, text in lines:
        outer, _, name = path.rpartition(".")
        message = messages[path] = (messages[outer].nested_type if outer else file.message_type).add(name=name)
        oneof, brace, inside = text.strip().partition("{")
        if brace:
            message.oneof_decl.add(name=oneof)
        for field in _fields(inside.rstrip("}") if brace else oneof):
            added = _add_field(message, path, field, nested)
            if brace:
                added.oneof_index = 0
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_describe().SerializeToString())


def message_type(name: str) -> Any:
    """The class of a message.

    Example:
        >>> live = message_type("ServerLiveResponse")
        >>> live.FromString(live(live=True).SerializeToString()).live
        True
    """
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
