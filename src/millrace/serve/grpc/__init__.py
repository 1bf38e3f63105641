"""gRPC: `inference.GRPCInferenceService` over the same directory and data planes as HTTP. Imported only when asked for.

`messages` are the protocol's; `frames` and `http2` the transport; `codec` tensors; `service` the calls.
"""
