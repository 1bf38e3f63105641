"""gRPC: `inference.GRPCInferenceService` over the same directory and data planes as HTTP. Imported only when asked for.

`frames`, `streams` and `http2` are the transport; `heads` and `calls` what gRPC lays over it; `messages` are the
protocol's, `codec` tensors, `service` the calls, `listener` the port.
"""
